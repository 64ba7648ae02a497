"""Whose turn it is: clients take turns, however many connections each of them has.

With one client nothing is held back; with two, one that has 500 connections gets as much of the loop as one that has a
single one. What is over waits here until the next round, behind those of the same client that have waited longer.
"""

from collections import deque
from typing import Final

from ktlsd.net.poller import Event, Source

_QUOTA: Final = 4 << 20  # bytes a client may send in a round
_LEAST: Final = 65_536  # bytes that a turn counts for even if it sends nothing


class Turns:
    """Connections that have something to do, by client."""

    def __init__(self) -> None:
        self._queues: dict[bytes, deque[Source]] = {}
        self._events: dict[int, Event] = {}

    def __bool__(self) -> bool:
        return bool(self._events)

    def add(self, client: bytes, event: Event) -> None:
        """A connection of this client has something to do."""
        fd = event.source.fileno()
        before = self._events.get(fd)
        if before is None or before.source is not event.source:
            queue = self._queues.get(client)
            if queue is None:
                queue = self._queues[client] = deque()
            queue.append(event.source)
            self._events[fd] = event
            return
        self._events[fd] = Event(
            event.source,
            before.readable or event.readable,
            before.ended or event.ended,
            before.overdue or event.overdue,
        )

    def forget(self, fd: int) -> None:
        """Its connection has ended."""
        self._events.pop(fd, None)

    def clients(self) -> list[bytes]:
        """Return who has something to do, for one round; `take` each one's events until its quota is spent."""
        return list(self._queues)

    def take(self, client: bytes) -> Event | None:
        """Return this client's next event, None if there is none."""
        queue = self._queues[client]
        while queue:
            source = queue.popleft()
            event = self._events.get(source.fileno())
            if event is not None and event.source is source:  # it may have ended, and its number be another's
                del self._events[source.fileno()]
                return event
        del self._queues[client]
        return None

    @staticmethod
    def quota() -> int:
        """Return how much a client may spend in a round (bytes)."""
        return _QUOTA

    @staticmethod
    def cost(sent: int) -> int:
        """Return what a turn costs that sent so many bytes."""
        return max(_LEAST, sent)
