"""How long a client may take: to take what it asked for, and to leave."""

from typing import Final

from ktlsd.errors import Overdue
from ktlsd.net.plain import PlainChannel
from ktlsd.settings import Limits

_TICK: Final = 0.05  # seconds between looks at what TCP still holds, doubling up to a second


class MinimumRate:
    """What a client takes while it is being answered: `limits.min_rate` over `limits.min_rate_grace` seconds, or it is cut."""

    __slots__ = ("_grace", "_least", "_taken", "due")

    def __init__(self, limits: Limits) -> None:
        self._least = limits.min_rate or 0
        self._grace = limits.min_rate_grace
        self._taken: int | None = None
        self.due = 0.0  # when to look again, monotonic seconds

    def rest(self) -> None:
        """It is owed nothing now."""
        self._taken, self.due = None, 0.0

    def begin(self, now: float) -> None:
        """It is owed something from now on, if it was not before."""
        self.due = self.due or now + self._grace

    def look(self, now: float, taken: int) -> None:
        """Compare with the last time, if there was one; `taken` is how many bytes its TCP has acknowledged. Raises Overdue."""
        if self._taken is not None and taken - self._taken < self._least * self._grace:
            raise Overdue(f"the client takes less than limits.min_rate, {self._least} bytes a second")
        self._taken, self.due = taken, now + self._grace


class Leave:
    """Closing without losing the tail: as long as the client's TCP makes progress it gets its time."""

    __slots__ = ("_left", "_limits", "_tick", "_until", "deadline")

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._until = now + limits.linger_timeout
        self._tick = _TICK
        self._left = 0
        self.deadline = 0.0  # when to look again, monotonic seconds

    def over(self, channel: PlainChannel, now: float) -> bool:
        """Whether it has had its time. Raises Overdue if it did not take all."""
        if now < self.deadline and self._tick > _TICK:
            return False
        left = channel.unacknowledged()
        if left != self._left:
            self._left = left
            self._until = now + (self._limits.progress_timeout if left else self._limits.linger_timeout)
        if now >= self._until:
            if left:
                raise Overdue("the client did not take the end of what was sent")
            return True
        self.deadline = min(now + self._tick, self._until)
        self._tick = min(self._tick * 2, 1.0)
        return False
