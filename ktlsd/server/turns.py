"""Whose turn it is: clients take turns, however many connections each of them has.

With one client nothing is held back; with two, one that has 500 connections gets as much of the loop as one that has a
single one. What is over waits here until the next round, behind those of the same client that have waited longer. Among a
client's own connections those from which something came and those that go on sending come by turns: a request does not wait
for every download that runs.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final, Generic, Protocol, TypeVar

_QUOTA: Final = 4 << 20  # bytes a client may send in a round
_LEAST: Final = 65_536  # bytes that a turn counts for even if it sends nothing


class Waiting(Protocol):
    """Something that may have to wait for its turn. It remembers by itself what woke it."""

    in_line: bool  # only `Turns` sets it

    @property
    def brief(self) -> bool:
        """Whether its turn may be so short that several have theirs together."""


_W = TypeVar("_W", bound=Waiting)


class _Line(Generic[_W]):
    """One client's connections."""

    __slots__ = ("going", "news", "news_last")

    def __init__(self) -> None:
        self.news: deque[_W] = deque()  # something came from them
        self.going: deque[_W] = deque()  # they go on with what they have begun
        self.news_last = False

    def take(self) -> _W | None:
        """Return the next, of either kind by turns."""
        if not self.news and not self.going:
            return None
        self.news_last = bool(self.news) and not (self.news_last and self.going)
        return self.news.popleft() if self.news_last else self.going.popleft()


class Turns(Generic[_W]):
    """Connections that have something to do, by client, each of them once."""

    def __init__(self) -> None:
        self._lines: dict[bytes, _Line[_W]] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, client: bytes, source: _W, *, news: bool = False) -> None:
        """A connection of this client has something to do; `news`: because something came from it."""
        if source.in_line:
            return
        source.in_line = True
        line = self._lines.get(client)
        if line is None:
            line = self._lines[client] = _Line()
        (line.news if news else line.going).append(source)

    def clients(self) -> list[bytes]:
        """Return who has something to do, for one round; `take` each one's connections until its quota is spent."""
        return list(self._lines)

    def take(self, client: bytes) -> _W | None:
        """Return this client's next connection, which may have ended meanwhile; None if there is none."""
        source = self._lines[client].take()
        if source is None:
            del self._lines[client]
        else:
            source.in_line = False
        return source

    def take_brief(self, client: bytes, most: int) -> list[_W]:
        """Return this client's next connections from which something came, as far as they are brief, and forget them."""
        line = self._lines[client]
        taken: list[_W] = []
        while line.news and len(taken) < most and line.news[0].brief:
            source = line.news.popleft()
            source.in_line = False
            line.news_last = True
            taken.append(source)
        return taken

    def put_back(self, client: bytes, sources: Sequence[_W]) -> None:
        """These are the next again: they were not so brief, or there was no time."""
        for source in reversed(sources):
            source.in_line = True
            self._lines[client].news.appendleft(source)

    def rest(self, client: bytes) -> None:
        """Have this client wait behind the others."""
        line = self._lines.pop(client, None)
        if line is not None:
            self._lines[client] = line

    @staticmethod
    def quota() -> int:
        """Return how much a client may spend in a round (bytes)."""
        return _QUOTA

    @staticmethod
    def cost(sent: int) -> int:
        """Return what a turn costs that sent so many bytes."""
        return max(_LEAST, sent)
