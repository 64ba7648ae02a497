"""Work that must not stop the loop, described by whoever needs it and done in a thread by the worker."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Final

from ktlsd.errors import FileCold

_WINDOW: Final = 4 << 20  # bytes read into memory before a download goes on
_AHEAD: Final = 8 << 20  # bytes behind them that the kernel is asked to read meanwhile
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
    """Have a stretch of a file read into memory, and the next one begun."""
    file, offset = cold.file.hold(), cold.offset
    end = min(offset + _WINDOW, file.size)

    def job() -> bool:
        room = bytearray(_PIECE)
        at = offset
        while at < end:
            got = os.preadv(file.fd, [memoryview(room)[: end - at]], at)
            if not got:
                break  # it has become shorter: whoever sends it finds out
            at += got
        os.posix_fadvise(file.fd, end, _AHEAD, os.POSIX_FADV_WILLNEED)
        return True

    def done(result: bool | None) -> None:
        file.warm_from, file.warm_to = offset, end
        file.asks = file.asks and bool(result)  # if it can't be read, who sends it gets the error
        file.release()

    return Later(b"read %d" % next(_numbers), job, done, needed=True, size=end - offset)
