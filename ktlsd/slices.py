"""What a response is made of: bytes, and stretches of open files that nobody reads before the channel does."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

FIRST_WINDOW: Final = 1 << 20  # bytes read ahead of a download that has to wait for a disk, the first time
FRAME_HEADER: Final = 9  # bytes, RFC 9113 §4.1


@dataclass(slots=True)
class Residency:
    """What is known of a file's being in memory, for one response or one connection's."""

    asks: bool = True  # whether to ask before reading if that would have to wait for the disk
    warm_from: int = 0  # from here to `warm_to` it was found in memory, or has been read into it for us
    warm_to: int = 0
    window: int = FIRST_WINDOW  # bytes to read the next time
    until: float = float("inf")  # monotonic seconds; what was only found there may be taken out again

    def found(self, start: int, end: int, until: float) -> None:
        """Remember that all of these bytes are in memory, or will be taken to be so long."""
        self.warm_from, self.warm_to, self.until = start, end, until

    def is_warm(self, offset: int) -> bool:
        """Whether there is no need to ask."""
        if not self.asks:
            return True
        return self.warm_from <= offset < self.warm_to and time.monotonic() < self.until


@dataclass(slots=True)
class OpenFile:
    """An open regular file and the facts of one fstat, shared by the slices that are cut from it.

    `size` is bytes, `mtime_ns` and `ctime_ns` nanoseconds since the epoch. The descriptor closes when the last holder lets go.
    """

    fd: int
    size: int
    mtime_ns: int
    ctime_ns: int = 0  # when its inode last changed: nobody can set that back
    identity: tuple[int, int] | None = None  # device and inode, by which it is known again when it is opened again
    sent_before: bool = False  # some of it has been sent already
    residency: Residency = field(default_factory=Residency)
    holders: int = 1
    close_fd: Callable[[int], None] = os.close

    def hold(self) -> "OpenFile":
        """Count one more holder; each must call `release` once."""
        self.holders += 1
        return self

    def share(self) -> "OpenFile":
        """Return another with the same descriptor, for another response: what is known of where that one reads is its own."""
        self.hold()
        return OpenFile(self.fd, self.size, self.mtime_ns, self.ctime_ns, self.identity, close_fd=lambda _: self.release())

    def release(self) -> None:
        """Count one holder less and close the descriptor behind the last."""
        self.holders -= 1
        if self.holders == 0:
            self.close_fd(self.fd)
        assert self.holders >= 0, "released more often than held"


class FileSlice:
    """`length` bytes of an open file from `offset`; holds one reference until `close`."""

    __slots__ = ("file", "length", "offset")

    def __init__(self, file: OpenFile, offset: int, length: int) -> None:
        self.file = file.hold()
        self.offset = offset
        self.length = length

    def __repr__(self) -> str:
        return f"FileSlice(fd={self.file.fd}, offset={self.offset}, length={self.length})"

    def __len__(self) -> int:
        return self.length

    def advance(self, count: int) -> None:
        """Leave out the first `count` bytes: they are gone."""
        self.offset += count
        self.length -= count

    def close(self) -> None:
        """Let go of the file."""
        self.file.release()


class Framed:
    """A stretch of a file as it goes on the wire in frames: `header` before every `step` bytes, `last_header` before the last.

    Its length counts headers too. Whoever sends it chooses how: nobody has read the file or laid out the frames before.
    Holds no reference of its own: it is made anew for every turn by someone who does.
    """

    __slots__ = ("file", "gone", "header", "last_header", "length", "offset", "step", "wire")

    def __init__(self, file: OpenFile, offset: int, length: int, *, step: int, header: bytes, last_header: bytes) -> None:
        """`length` bytes of payload (at least one) from `offset`; each header is 9 bytes."""
        self.file = file
        self.offset = offset
        self.length = length
        self.step = step
        self.header = header
        self.last_header = last_header
        self.gone = 0  # bytes of the wire, always less than the first frame
        self.wire = length + FRAME_HEADER * -(-length // step)

    def __repr__(self) -> str:
        return f"Framed(fd={self.file.fd}, offset={self.offset}, length={self.length}, step={self.step}, gone={self.gone})"

    def __len__(self) -> int:
        return self.wire - self.gone

    @property
    def frames(self) -> int:
        """How many frames it is, the one that has begun to go included."""
        return -(-self.length // self.step)

    def pieces(self) -> Iterator[bytes | tuple[int, int]]:
        """Yield what is left, in order: headers, and payloads as (offset, length)."""
        gone, at, left = self.gone, self.offset, self.length
        while left:
            count = min(self.step, left)
            left -= count
            header = self.header if left else self.last_header
            if gone < FRAME_HEADER:
                yield header[gone:]
            skipped = max(gone - FRAME_HEADER, 0)
            yield at + skipped, count - skipped
            at += count
            gone = 0

    def advance(self, count: int) -> None:
        """Leave out the first `count` bytes of the wire: they are gone."""
        count += self.gone
        if count >= self.wire:
            whole, self.gone = self.length, 0
        else:
            frames, self.gone = divmod(count, self.step + FRAME_HEADER)
            whole = frames * self.step
        self.offset += whole
        self.length -= whole
        self.wire = self.length + FRAME_HEADER * self.frames

    def first_frame(self) -> "Framed":
        """Return what is left of the frame that has begun to go."""
        length = min(self.length, self.step)
        header = self.last_header if length == self.length else self.header
        frame = Framed(self.file, self.offset, length, step=length, header=header, last_header=header)
        frame.gone = self.gone
        return frame


Segment = bytes | memoryview | FileSlice  # what a response is made of
Outgoing = Segment | Framed  # what a channel sends
