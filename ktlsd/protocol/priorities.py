"""Extensible priorities (RFC 9218): what a client says of a response's urgency, and whose turn it is."""

import re
from dataclasses import dataclass
from typing import Final

from ktlsd.errors import Http2Error

# A dictionary of structured fields (RFC 9651 §3.2) as far as the two known members go; others, and parameters, are passed over.
_URGENCY: Final = re.compile(rb"(?:^|,)[ \t]*u=([0-7])(?![0-9.])[^,]*")
_INCREMENTAL: Final = re.compile(rb"(?:^|,)[ \t]*i(?:=\?([01]))?[ \t]*(?:;[^,]*)?(?=,|$)")


@dataclass(frozen=True, slots=True)
class Priority:
    """`urgency` 0 goes before 7. Incremental responses of one urgency share; others go one after the other."""

    urgency: int = 3
    incremental: bool = False


# A client that says nothing at all gets fair shares: two downloads at a time must not become one after the other.
UNSAID: Final = Priority(3, incremental=True)


class Early:
    """What PRIORITY_UPDATE said of requests that have not come yet."""

    __slots__ = ("_said", "_size")

    def __init__(self, size: int) -> None:
        """It remembers so many requests; of more it knows nothing."""
        self._size = size
        self._said: dict[int, Priority] = {}

    def __len__(self) -> int:
        return len(self._said)

    def put(self, about: int, priority: Priority) -> None:
        """Remember the latest about one request."""
        if about in self._said or len(self._said) < self._size:
            self._said[about] = priority

    def take(self, about: int) -> Priority | None:
        """Return it, the request is here; None if nothing was said."""
        return self._said.pop(about, None)


def parse_priority(value: bytes) -> Priority:
    """Return what a Priority field or a PRIORITY_UPDATE says; what is malformed or missing has its default (RFC 9218 §4)."""
    urgency = _URGENCY.findall(value)
    incremental = _INCREMENTAL.findall(value)
    return Priority(int(urgency[-1]) if urgency else 3, bool(incremental) and incremental[-1] != b"0")


def parse_update(frame: bytes, stream_id: int) -> tuple[int, Priority]:
    """Return which request a PRIORITY_UPDATE is about, and what it says (RFC 9218 §7.1). Raises Http2Error."""
    if stream_id or len(frame) < 9 + 4:
        code = "PROTOCOL_ERROR" if stream_id else "FRAME_SIZE_ERROR"
        raise Http2Error(code, "PRIORITY_UPDATE on a stream, or cut short")
    about = int.from_bytes(frame[9:13], "big") & (1 << 31) - 1
    if about % 2 == 0:
        raise Http2Error("PROTOCOL_ERROR", "PRIORITY_UPDATE about no request")
    return about, parse_priority(frame[13:])
