"""Fair shares of a pipe that is full: clients get equal parts of it, however many connections each has.

Work-conserving: who wants less keeps what it wants, the others share what is left; where there is room for all, nobody is
held back. The kernel does the holding back, connection by connection (SO_MAX_PACING_RATE); here is only computed how much.
"""

from collections.abc import Mapping
from typing import Final

INTERVAL: Final = 1.0  # seconds between two reckonings
_STEADY: Final = 1.1  # room to grow for a client whose rate does not change
_GROWING: Final = 2.0  # and for one whose rate has grown by a tenth
_CLIENTS_TOLD: Final = 300  # those that send most; who sends little is not held back anyway
_CALM: Final = 3  # reckonings in which there must be room for all before nobody is held back any more
_AT_THE_LEVEL: Final = 0.85  # of what it may send: such a client is held back
_FOOTHOLD: Final = 0.02  # part of the pipe, shared by all, that even a client with next to nothing has room to grow into


def fair_level(demands: Mapping[str, float], pipe: float) -> float | None:
    """Return the level L at which the sum of min(demand, L) is `pipe`; None if all demands fit. Bytes a second."""
    if sum(demands.values()) <= pipe:
        return None
    left, level = pipe, 0.0
    rising = sorted(demands.values())
    for number, demand in enumerate(rising):
        level = left / (len(rising) - number)
        if demand > level:
            break
        left -= demand
    return level


class Shares:
    """One worker's part of the reckoning. Every worker comes to the same level: all see the same reports."""

    def __init__(self, pipe: int) -> None:
        """`pipe` is what all workers together may send, bytes a second."""
        self._pipe = pipe
        self._sent: dict[bytes, int] = {}
        self._active: dict[bytes, set[int]] = {}
        self._since: float | None = None
        self._before: dict[str, float] = {}
        self._calm = 0  # reckonings in a row in which there was room for all
        self._held: dict[str, int] | None = None  # what was returned last
        self._level: float | None = None  # what a client may send, if anybody is held back

    def sent(self, client: bytes, fd: int, count: int) -> None:
        """A connection of this client has sent something."""
        self._sent[client] = self._sent.get(client, 0) + count
        self._active.setdefault(client, set()).add(fd)

    def due(self, now: float) -> bool:
        """Whether it is time to reckon."""
        if self._since is None:
            self._since = now
        return now >= self._since + INTERVAL

    def rates(self, now: float) -> dict[str, tuple[float, int]]:
        """Return what was sent here since the last time, by client: bytes a second and connections; and begin anew."""
        seconds = max(now - (self._since or now), INTERVAL / 2)
        most = sorted(self._sent, key=self._sent.__getitem__, reverse=True)[:_CLIENTS_TOLD]
        rates = {name.hex(): (self._sent[name] / seconds, len(self._active[name])) for name in most}
        self._since = now
        self._sent, self._active = {}, {}
        return rates

    def reckon(self, everywhere: list[Mapping[str, tuple[float, int]]]) -> dict[str, int] | None:
        """Return what one connection of each client may send (bytes a second), None if nobody is held back.

        `everywhere` has the rates of all workers, this one's included.
        """
        rates: dict[str, float] = {}
        connections: dict[str, int] = {}
        for part in everywhere:
            for name, (rate, count) in part.items():
                rates[name] = rates.get(name, 0.0) + rate
                connections[name] = connections.get(name, 0) + count
        foothold = self._pipe * _FOOTHOLD / max(len(rates), 1)
        demands: dict[str, float] = {}
        for name, rate in rates.items():
            if self._level is not None and rate > _AT_THE_LEVEL * self._level:
                demands[name] = self._pipe  # held back: it wants more, nobody knows how much
                continue
            growing = rate > 1.1 * self._before.get(name, 0.0)
            demands[name] = max(rate * (_GROWING if growing else _STEADY), foothold)
        self._before = rates
        level = fair_level(demands, self._pipe)
        if level is None:
            # What is in the sockets' buffers goes out without being seen here: one quiet second is no sign of room.
            self._calm += 1
            if self._calm >= _CALM:
                self._level, self._held = None, None
            return self._held
        self._level, self._calm = level, 0
        self._held = {name: max(int(level / count), 1) for name, count in connections.items()}
        return self._held
