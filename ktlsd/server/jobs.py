"""The threads of a worker: what must not stop the loop is done here, and its result is fetched by the loop."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from ktlsd.server.connection import Connection
from ktlsd.server.later import Later
from ktlsd.server.waker import Waker

_log = logging.getLogger("ktlsd")
_THREADS: Final = 2  # for what may be refused: passwords
_READERS: Final = 4  # for reading files that are not in memory
_MAX_JOBS: Final = 64  # waiting or running; more are refused
_JOB_DONE: Final = 0  # no signal has this number

Waiting = tuple[Connection, int]  # a request: its connection and stream


class Done(NamedTuple):
    """A job that has ended: with a result, or None if it failed; and who waits for it."""

    later: Later
    result: bool | None
    seconds: float
    waiting: list[Waiting]


class Jobs:
    """Jobs by key: requests that need the same thing wait for the same job."""

    def __init__(self, waker: Waker) -> None:
        self._waker = waker
        self._threads = ThreadPoolExecutor(_THREADS, "ktlsd")
        self._readers = ThreadPoolExecutor(_READERS, "ktlsd-read")
        self._reading = 0  # of those below, the jobs that are not counted
        self._waiting: dict[bytes, list[Waiting]] = {}
        self._done: deque[tuple[Later, bool | None, float]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def start(self, connection: Connection, stream_id: int, later: Later) -> bool:
        """Have a thread do what a request waits for; False at the limit. What is `needed` is never refused."""
        waiting = self._waiting.get(later.key)
        if waiting is not None:
            waiting.append((connection, stream_id))
            return True
        if len(self._waiting) - self._reading >= _MAX_JOBS and not later.needed:
            return False
        self._reading += later.needed
        self._waiting[later.key] = [(connection, stream_id)]
        (self._readers if later.needed else self._threads).submit(self._run, later)
        return True

    def _run(self, later: Later) -> None:
        result = None
        begun = time.monotonic()
        try:
            if any(connection.is_open for connection, _ in tuple(self._waiting[later.key])):
                result = later.job()
        except OSError as exc:  # of a disk: whoever sends gets it too
            _log.warning("cannot read ahead: %s", exc.strerror)
        except Exception:  # our bug: those who wait are told, and nobody tries again
            _log.exception("a job failed")
        self._done.append((later, result, time.monotonic() - begun))
        self._waker.write(_JOB_DONE)

    def finished(self) -> Iterator[Done]:
        """Yield the jobs that have ended since the last time."""
        while self._done:
            later, result, seconds = self._done.popleft()
            self._reading -= later.needed
            yield Done(later, result, seconds, self._waiting.pop(later.key))

    def close(self) -> None:
        """Wait for what runs; what has not begun is left undone."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
