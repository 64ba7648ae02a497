"""What a peer may ask of an HTTP/2 connection that costs it little and us much, and how much of it.

Every kind is a token bucket: a burst at once, so much per second, and, but for `slivers`, more for honest work. RFC 9113 §10.5.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Allowance:
    """`burst` tokens at first and at most, `per_second` of them coming back every second."""

    burst: float
    per_second: float
    left: float = -1.0
    since: float = 0.0

    def spend(self, now: float, amount: float = 1.0) -> bool:
        """Take tokens; False if there were not enough. `now` is monotonic seconds."""
        if self.left < 0:
            self.left, self.since = self.burst, now
        if self.left < amount:
            self.left = min(self.left + (now - self.since) * self.per_second, max(self.burst, self.left))
            self.since = now
        self.left -= amount
        if self.left < 0:
            self.left = 0
            return False
        return True

    def earn(self, amount: float) -> None:
        """Add tokens for work that was done, up to four bursts."""
        if self.left >= 0:
            self.left = min(self.left + amount, 4 * self.burst)


class Budgets:
    """The allowances of one connection.

    `resets`: streams that end in RST_STREAM through the peer's doing, its own or ours (CVE-2023-44487, CVE-2025-8671).
    `control`: PING, SETTINGS, PRIORITY, PRIORITY_UPDATE, RST_STREAM again, unknown frames, tiny DATA. `windows`: WINDOW_UPDATE.
    `slivers`: DATA frames that the peer's window made shorter than 256 bytes. CONTINUATION has no bucket: a header block may
    have 16 frames.
    """

    __slots__ = ("control", "resets", "slivers", "windows")

    def __init__(self) -> None:
        self.resets = Allowance(256, 20)  # twice as many as there can be at a time
        self.control = Allowance(1_000, 50)
        self.windows = Allowance(2_000, 200)
        self.slivers = Allowance(1_000, 10)

    def sent(self, payload: int, frames: int) -> None:
        """DATA went out: a client may well say two WINDOW_UPDATEs to each frame and each KiB, and measure by PING."""
        self.windows.earn(2 * frames + payload / 1_024)
        self.control.earn(payload / 16_384)

    def responded(self, count: int) -> None:
        """So many responses are whole: honest work, each of which may come with a PING and a cancelled one."""
        if count:
            self.resets.earn(count)
            self.control.earn(count)
            self.windows.earn(2 * count)

    def exchanged(self, payload: int, frames: int, count: int) -> None:
        """Both at once: so many responses went out whole."""
        if self.windows.left >= 0:
            self.windows.earn(2 * frames + payload / 1_024 + 2 * count)
        if self.control.left >= 0:
            self.control.earn(payload / 16_384 + count)
        if self.resets.left >= 0:
            self.resets.earn(count)
