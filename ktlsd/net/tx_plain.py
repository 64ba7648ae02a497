"""Sending without encryption: segments straight into a socket. What kernel mode does too, once the kernel has the keys."""

import socket
from collections.abc import Sequence
from typing import Final

from ktlsd.errors import FileCold, FileTruncated, PeerError
from ktlsd.net.gather import warm_count
from ktlsd.net.kernel import IOV_MAX, Buffer, Kernel
from ktlsd.slices import FileSlice, Framed, Outgoing

# One sendfile call. Longer ones save little and keep the other connections waiting. A multiple of a TLS record.
SENDFILE_MAX: Final = 2 << 20


class PlainTx:
    """The sending half of a channel whose socket takes payload as it is."""

    __slots__ = ("_kernel", "_sock")

    def __init__(self, sock: socket.socket, kernel: Kernel) -> None:
        self._sock = sock
        self._kernel = kernel

    def send(self, segments: Sequence[Outgoing]) -> int | None:
        """Send from the front of `segments`; return how many bytes were accepted, None if none. Raises FileTruncated."""
        accepted, at = 0, 0
        while at < len(segments):
            segment = segments[at]
            if isinstance(segment, FileSlice):
                at += 1
                offered = segment.length
                try:
                    sent = self._send_slice(segment, accepted) if offered else 0
                except FileCold:
                    if not accepted:
                        raise
                    break  # the caller has to know first what is gone
            elif isinstance(segment, Framed):
                raise AssertionError("frames are HTTP/2, which is spoken over TLS only")
            else:
                run = _bytes_run(segments, at)
                at += len(run)
                offered = sum(map(len, run))
                sent = self._send_bytes(run, offered, more=any(map(len, segments[at:]))) if offered else 0
            if sent is not None:
                accepted += sent
            if sent is None or sent < offered:
                break
        return accepted or None

    def _send_bytes(self, run: list[Buffer], offered: int, *, more: bool) -> int | None:
        """Send bytes; with `more` they wait for what follows, so that both leave in one segment."""
        assert offered
        return self._kernel.send(self._sock, run, more=more)

    def _send_slice(self, segment: FileSlice, before: int) -> int | None:
        """One sendfile call; `before` is how many bytes went out just before it."""
        assert before >= 0
        count = warm_count(segment.file, segment.offset, min(segment.length, SENDFILE_MAX))
        sent = self._kernel.sendfile(self._sock, segment.file.fd, segment.offset, count)
        if sent == 0:
            raise FileTruncated(f"the file ends at {segment.offset}, {segment.length} bytes short")
        return sent

    def flush(self) -> bool:
        """Whether nothing is held back here: the kernel sends on by itself."""
        return True

    def notify_close(self) -> bool:
        """Say that this is the end, behind everything else: without TLS the FIN does."""
        return True

    def all_taken(self) -> bool:
        """Whether TCP has everything."""
        return True

    def say_goodbye(self, error: PeerError) -> bool:
        """Tell the peer about `error`; whether it was: without TLS there are no alerts."""
        return False


def _bytes_run(segments: Sequence[Outgoing], at: int) -> list[Buffer]:
    """Return the buffers from `at` up to the next file slice, no more than one call takes."""
    run: list[Buffer] = []
    for segment in segments[at : at + IOV_MAX]:
        if isinstance(segment, FileSlice | Framed):
            break
        run.append(segment)
    return run
