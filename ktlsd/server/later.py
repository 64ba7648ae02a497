"""Work that must not stop the loop, described by whoever needs it and done in a thread by the worker."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Final

from ktlsd.errors import FileCold
from ktlsd.slices import FIRST_WINDOW

_WINDOW_MIN: Final = 256 << 10  # bytes read into memory before a download goes on; as many behind them are asked for
_WINDOW_MAX: Final = 16 << 20
_QUICK: Final = 0.1  # seconds for a window
_SLOW: Final = 0.5
_PIECE: Final = 1 << 20
_numbers = count()  # no two reads are the same: each holds its file until it is done


@dataclass(frozen=True, slots=True)
class Later:
    """Something to be done first: run `job` in a thread, then `done` with its result (None if it failed), then go on.

    Requests with the same `key` wait for the same job. What is `needed` by a response that has begun is never refused.
    """

    key: bytes
    job: Callable[[], bool]
    done: Callable[[bool | None], None]
    needed: bool = False
    size: int = 0  # bytes that are read


def read_ahead(cold: FileCold) -> Later:
    """Have a stretch of a file read into memory, and the next one begun.

    How much is up to the disk: the window grows as long as it is read quickly, and shrinks where that takes too long. A
    client that jumps about begins with a small one.
    """
    file, offset = cold.file.hold(), cold.offset
    residency = file.residency
    if offset != residency.warm_to:
        residency.window = FIRST_WINDOW
    end = min(offset + residency.window, file.size)
    took = 0.0

    def job() -> bool:
        nonlocal took
        begun = time.monotonic()
        room = memoryview(bytearray(_PIECE))
        at = offset
        while at < end:
            got = os.preadv(file.fd, [room[: end - at]], at)
            if not got:
                break  # it has become shorter: whoever sends it finds out
            at += got
        took = time.monotonic() - begun
        os.posix_fadvise(file.fd, end, residency.window, os.POSIX_FADV_WILLNEED)
        return True

    def done(result: bool | None) -> None:
        residency.found(offset, end, float("inf"))
        residency.asks = residency.asks and bool(result)  # if it can't be read, who sends it gets the error
        if took < _QUICK:
            residency.window = min(residency.window * 2, _WINDOW_MAX)
        elif took > _SLOW:
            residency.window = max(residency.window // 2, _WINDOW_MIN)
        file.release()

    return Later(b"read %d" % next(_numbers), job, done, needed=True, size=end - offset)
