"""The one place that waits: epoll, deadlines, and the list of those who have more to do at once.

Knows nothing of connections: a source is anything with a `fileno`, and what it means is the caller's. Edge-triggered and
registered once, so that a source costs no system call per wait; whoever stops before would-block must remember that itself.
"""

import heapq
import select
from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol

_ENDED: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_READABLE: Final = select.EPOLLIN | _ENDED
_EDGES: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_NEVER: Final = float("inf")
_MAX_WAIT: Final = 3600.0  # seconds


class Source(Protocol):
    """Something with a descriptor and, perhaps, a moment at which it wants to be woken."""

    @property
    def deadline(self) -> float:
        """Monotonic seconds, inf for none."""

    def fileno(self) -> int:
        """The descriptor, the same from `add` to `remove`."""


class Event(NamedTuple):
    """What woke a source.

    `readable`: input, an end or an error may have come. `ended`: an end or an error has, behind whatever input there is,
    and there will be no further edge for it. `overdue`: the deadline has passed.
    """

    source: Source
    readable: bool = False
    ended: bool = False
    overdue: bool = False


class Poller:
    """Sources by descriptor; deadlines in a heap whose stale entries are dropped when they come up."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._sources: dict[int, Event] = {}  # with the event that is most frequent: input
        self._heap: list[tuple[float, int, int]] = []
        self._scheduled: dict[int, float] = {}  # fd -> the earliest heap entry's moment
        self._serial = 0

    def __len__(self) -> int:
        return len(self._sources)

    def add(self, source: Source, *, level_triggered: bool = False, shared: bool = False) -> None:
        """Watch a source from now on. `level_triggered` for what is read only; of all who watch a `shared` one one is woken."""
        fd = source.fileno()
        exclusive = select.EPOLLEXCLUSIVE if shared else 0
        self._epoll.register(fd, select.EPOLLIN | exclusive if level_triggered else _EDGES)
        self._sources[fd] = Event(source, readable=True)
        self.reschedule(source, fd)

    def remove(self, source: Source) -> None:
        """Stop watching a source that stays open."""
        fd = source.fileno()
        if self._of(fd) is source:
            self._epoll.unregister(fd)
            self.forget(fd)

    def _of(self, fd: int) -> Source | None:
        event = self._sources.get(fd)
        return event.source if event is not None else None

    def forget(self, fd: int) -> None:
        """Let go of a source whose descriptor has been closed, which ended epoll's own watch."""
        self._sources.pop(fd, None)
        self._scheduled.pop(fd, None)

    def reschedule(self, source: Source, fd: int) -> None:
        """Take notice of a changed deadline. A later one costs nothing: the entry there moves on when it comes up."""
        deadline = source.deadline
        if deadline < self._scheduled.get(fd, _NEVER):
            self._push(deadline, fd)

    def _push(self, deadline: float, fd: int) -> None:
        self._serial += 1
        self._scheduled[fd] = deadline
        heapq.heappush(self._heap, (deadline, self._serial, fd))

    def wait(self, now: float, until: float | None = None) -> list[tuple[int, int]]:
        """Wait until something is ready or a deadline has passed, `until` at most; return epoll's (descriptor, events)."""
        timeout = _MAX_WAIT if until is None else max(until - now, 0)
        if self._heap:
            timeout = min(max(self._heap[0][0] - now, 0), timeout)
        return self._epoll.poll(timeout)

    def events(self, ready: list[tuple[int, int]], now: float) -> Iterator[Event]:
        """Yield what `wait` returned and what is due, each source once; sources removed meanwhile are left out."""
        due = self._due(now)
        for fd, mask in ready:
            usual = self._sources.get(fd)
            if usual is None:
                continue
            if mask & _READABLE == select.EPOLLIN and not due:
                yield usual
            else:
                yield Event(usual.source, mask & _READABLE != 0, mask & _ENDED != 0, due.pop(fd, None) is not None)
        for fd, source in due.items():
            if self._of(fd) is source:
                yield Event(source, overdue=True)

    def _due(self, now: float) -> dict[int, Source]:
        due: dict[int, Source] = {}
        while self._heap and self._heap[0][0] <= now:
            moment, _, fd = heapq.heappop(self._heap)
            if self._scheduled.get(fd) != moment:
                continue
            del self._scheduled[fd]
            source = self._sources[fd].source
            if source.deadline <= now:
                due[fd] = source
            else:
                self.reschedule(source, fd)
        return due

    def close(self) -> None:
        """Let go of epoll itself."""
        self._epoll.close()


class Room:
    """Asks whether a descriptor that is not ours to make non-blocking (a pipe, a terminal) takes a write without waiting."""

    def __init__(self, fd: int) -> None:
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def there_is(self) -> bool:
        """Whether a write of PIPE_BUF (4,096) bytes would go at once, or fail at once."""
        return bool(self._poll.poll(0))
