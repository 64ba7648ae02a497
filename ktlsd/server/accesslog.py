"""The access log: a line per request, buffered for a turn of the loop and written with one call.

What a client sent goes into it only escaped: no line can be forged, no terminal commanded.
"""

import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Literal

import msgspec

from ktlsd.errors import StartError

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
    """Where entries go: a file opened for appending, or standard output. Never raises once it is open."""

    def __init__(self, target: str | None, form: Literal["combined", "json"]) -> None:
        """`target` None: nothing is logged. Raises StartError if the file can't be opened."""
        self._lines: list[bytes] = []
        self._form = _json_line if form == "json" else _combined_line
        self._fd = -1
        self.lost = 0  # lines that could not be written
        if target == "-":
            sys.stdout.flush()
            self._fd = os.dup(1)
        elif target is not None:
            try:
                self._fd = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY, 0o640)
            except OSError as exc:
                raise StartError(f"access log {target}: cannot be opened: {exc.strerror}") from exc

    @property
    def enabled(self) -> bool:
        """Whether entries go anywhere; otherwise there is no need to make them."""
        return self._fd >= 0

    def add(self, entry: Entry) -> None:
        """Keep an entry until `flush`."""
        self._lines.append(self._form(entry))

    def flush(self) -> None:
        """Write what was kept."""
        if not self._lines:
            return
        lines, self._lines = self._lines, []
        data = memoryview(b"".join(lines))
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            self.lost += len(lines)  # disk full, pipe gone: serving goes on; the worker's summary tells

    def close(self) -> None:
        """Write what was kept and close."""
        self.flush()
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
