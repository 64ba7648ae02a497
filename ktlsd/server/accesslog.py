"""The access log: a line per request, buffered for a turn of the loop and written with one call.

What a client sent goes into it only escaped: no line can be forged, no terminal commanded.
"""

import errno
import logging
import os
import re
import stat
import sys
import time
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from ktlsd.errors import StartError
from ktlsd.net.poller import Room

_log = logging.getLogger("ktlsd")
# O_NONBLOCK: opening a FIFO must not wait for its reader.
_FLAGS: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
_PIPE_PIECE: Final = 4_096  # PIPE_BUF: what a pipe that has room takes without waiting
_MAX_UNWRITTEN: Final = 1 << 20  # bytes kept for a reader that has stopped
_encode = msgspec.json.encode
# JSON lets DEL and the C1 controls (in UTF-8) through; terminals obey them.
_CONTROLS = re.compile(rb"\x7f|\xc2[\x80-\x9f]")


@dataclass(frozen=True, slots=True)
class TlsFacts:
    """What the log says of a connection. `tx` is who encrypted, `why` the reason if it was not the kernel."""

    version: str
    cipher: str
    resumed: bool
    tx: str
    why: str | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One request. `bytes` counts the body bytes the channel accepted; `duration` is seconds from head to last byte."""

    time: str
    client: str
    method: str
    target: str
    protocol: str
    status: int
    bytes: int
    duration: float
    complete: bool
    tls: TlsFacts
    host: str
    range: str | None
    referer: str | None
    user_agent: str | None


class AccessLog:
    """Where entries go: a file opened for appending, or standard output. Never raises and never waits once it is open."""

    def __init__(self, target: str | None, form: Literal["combined", "json"]) -> None:
        """`target` None: nothing is logged. Raises StartError if the file can't be opened."""
        self._lines: list[bytes] = []
        self._unwritten = b""  # lines that a pipe had no room for
        self._torn = False  # the last line in the file is not whole
        self._form = _json_line if form == "json" else _combined_line
        self._fd = -1
        self._path = target if target not in (None, "-") else None
        self._room: Room | None = None
        self.lost = 0  # lines that could not be written
        if target == "-":
            sys.stdout.flush()
            self._fd = os.dup(1)
        elif target is not None:
            try:
                self._fd = os.open(target, _FLAGS, 0o640)
            except OSError as exc:
                if exc.errno == errno.ENXIO:
                    raise StartError(f"access log {target}: nobody reads this pipe; start its reader first") from exc
                raise StartError(f"access log {target}: cannot be opened: {exc.strerror}") from exc
        if self._fd >= 0 and not stat.S_ISREG(os.fstat(self._fd).st_mode):
            # Not O_NONBLOCK: it would hold for everybody who has this pipe or terminal open.
            self._room = Room(self._fd)

    @property
    def enabled(self) -> bool:
        """Whether entries go anywhere; otherwise there is no need to make them."""
        return self._fd >= 0

    def add(self, entry: Entry) -> None:
        """Keep an entry until `flush`."""
        self._lines.append(self._form(entry))

    def flush(self) -> None:
        """Write what was kept, as far as it goes; what a stopped reader makes too much is lost, and counted."""
        if not self._lines and not self._unwritten:
            return
        data = memoryview(self._unwritten + b"".join(self._lines))
        self._lines.clear()
        try:
            if self._torn:
                os.write(self._fd, b"\n")
                self._torn = False
            while data and (self._room is None or self._room.there_is()):
                data = data[os.write(self._fd, data if self._room is None else data[:_PIPE_PIECE]) :]
        except OSError as exc:
            self._lose(data, os.strerror(exc.errno or 0))  # disk full, pipe gone: serving goes on
            self._torn = True
            self._unwritten = b""
            return
        self._unwritten = bytes(data)
        if len(data) > _MAX_UNWRITTEN:
            keep = self._unwritten.index(b"\n") + 1  # it may have been begun
            self._lose(data[keep:], "its reader takes nothing")
            self._unwritten = self._unwritten[:keep]

    def reopen(self) -> None:
        """Go on in a file of the same name: the old one has been moved away by whoever rotates logs."""
        if self._path is None:
            return
        self.flush()
        try:
            fresh = os.open(self._path, _FLAGS, 0o640)
        except OSError as exc:
            _log.warning("access log %s: cannot be opened anew: %s; going on in the old file", self._path, exc.strerror)
            return
        self.go_on_in(fresh)
        os.close(fresh)

    @property
    def fd(self) -> int:
        """Where lines go, -1 for nowhere."""
        return self._fd

    def go_on_in(self, fd: int) -> None:
        """Write to another file from now on. Does not close `fd`."""
        if self._fd >= 0:
            self.flush()
            os.dup2(fd, self._fd, inheritable=False)
            self._torn = False

    def _lose(self, data: memoryview, why: str) -> None:
        if not self.lost:
            _log.warning("access log: %s; lines are lost, and counted when ktlsd ends", why)
        self.lost += bytes(data).count(b"\n")

    def close(self) -> None:
        """Write what was kept and close."""
        self.flush()
        if self._unwritten:
            self._lose(memoryview(self._unwritten), "its reader takes nothing")
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def timestamp(seconds: float) -> str:
    """Return UTC in RFC 3339 with milliseconds."""
    whole = int(seconds)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{int((seconds - whole) * 1000):03}Z"


def _json_line(entry: Entry) -> bytes:
    return _CONTROLS.sub(lambda match: b"\\u00%02x" % match[0][-1], _encode(entry)) + b"\n"


def _combined_line(entry: Entry) -> bytes:
    when = time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.strptime(entry.time[:19], "%Y-%m-%dT%H:%M:%S"))
    request = f"{entry.method} {entry.target} {entry.protocol}"
    return (
        f'{entry.client} - - [{when}] "{_escape(request)}" {entry.status} {entry.bytes}'
        f' "{_escape(entry.referer or "-")}" "{_escape(entry.user_agent or "-")}"\n'
    ).encode("ascii")


def _escape(text: str) -> str:
    """Return printable ASCII without quotes, everything else in hexadecimal like Apache and nginx."""
    return "".join(c if " " <= c <= "~" and c not in '"\\' else f"\\x{ord(c):02x}" for c in text)
