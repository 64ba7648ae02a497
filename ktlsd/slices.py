"""What a response is made of: bytes, and stretches of open files that nobody reads before the channel does."""

import os
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class OpenFile:
    """An open regular file and the facts of one fstat, shared by the slices that are cut from it.

    `size` is bytes, `mtime_ns` and `ctime_ns` nanoseconds since the epoch. The descriptor closes when the last holder lets go.
    """

    fd: int
    size: int
    mtime_ns: int
    ctime_ns: int = 0  # when its inode last changed: nobody can set that back
    holders: int = 1
    close_fd: Callable[[int], None] = os.close

    def hold(self) -> "OpenFile":
        """Count one more holder; each must call `release` once."""
        self.holders += 1
        return self

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


Segment = bytes | memoryview | FileSlice
