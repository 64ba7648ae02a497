"""How long a client may take: to take what it asked for, and to leave."""

from typing import Final

from ktlsd.errors import Overdue
from ktlsd.net.plain import PlainChannel
from ktlsd.protocol.http1 import Http1Connection
from ktlsd.protocol.http2 import Http2Connection
from ktlsd.settings import Limits

Http = Http1Connection | Http2Connection

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


class Patience:
    """How long one client is waited for: to be through with TLS, to ask, to finish asking, to take what it asked for."""

    __slots__ = ("_limits", "_progress", "_progress_due", "_rate", "_unacknowledged", "deadline")

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._rate = MinimumRate(limits) if limits.min_rate is not None else None
        self._progress = 0
        self._progress_due = 0.0
        self._unacknowledged = 0
        self.deadline = now + limits.handshake_timeout  # when to look, monotonic seconds

    def established(self, now: float) -> None:
        """The handshake is done."""
        self.deadline = now + self._limits.idle_timeout

    def moves(self, http: Http) -> bool:
        """Whether what was sent last counts: answers to a PING are none."""
        return http.progress != self._progress or not http.busy

    def achieved(self, http: Http, now: float) -> None:
        """Something was. What comes next has its own time: progress of a response, the rest of a head, a request."""
        self._progress = http.progress
        if http.busy:
            self.deadline = self._progress_due = now + self._limits.progress_timeout
            if self._rate is not None:
                self._rate.begin(now)  # it is looked at when that is due, in a turn: here nobody could be told
                self.deadline = min(self.deadline, self._rate.due)
            return
        if self._rate is not None:
            self._rate.rest()
        if http.head_begun:
            self.deadline = now + self._limits.header_timeout
        else:
            self.deadline = now + (self._limits.linger_timeout if http.leaving else self._limits.idle_timeout)

    def rested(self, now: float) -> None:
        """A request came and was answered at once, whole."""
        self.deadline = now + self._limits.idle_timeout

    def excuse(self, now: float) -> None:
        """We owe it something: the client can't help it, and it is not to be held against it."""
        self.deadline = now + self._limits.progress_timeout
        if self._rate is not None:
            self._rate.rest()

    def lasts(self, http: Http, channel: PlainChannel, sent: int, now: float) -> bool:
        """Whether a client that is past its deadline gets more time; `sent` bytes have been. Raises Overdue."""
        if self._rate is not None and http.busy and 0 < self._rate.due <= now:
            self._rate.look(now, sent - channel.unacknowledged())
            self.deadline = min(self._progress_due, self._rate.due)
            if now < self._progress_due:
                return True
        flushed = channel.try_flush()
        if flushed and not http.busy:
            return False
        left = channel.unacknowledged()
        # Slow, but it takes what TCP holds: writable comes in large steps. Where HTTP/2 has no window TCP holds only talk.
        if left != self._unacknowledged and (not flushed or http.next_output(1)):
            self._unacknowledged = left
            self.deadline = self._progress_due = now + self._limits.progress_timeout
            return True
        raise Overdue("the client takes no data")


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
