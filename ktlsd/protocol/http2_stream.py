"""One request of an HTTP/2 connection and its response, as far as they have come."""

from collections import deque

from h2.errors import ErrorCodes
from h2.stream import H2Stream

from ktlsd.protocol.bodies import MAX_BODY
from ktlsd.protocol.messages import Stream as Source
from ktlsd.protocol.priorities import UNSAID, Priority
from ktlsd.slices import FileSlice


class Stream:
    """One request and its response."""

    __slots__ = (
        "body",
        "body_dropped",
        "body_left",
        "body_sent",
        "h2",
        "head_only",
        "held",
        "id",
        "malformed",
        "paused",
        "priority",
        "request_open",
        "responded",
        "seen_at",
        "seen_sent",
        "served",
        "source",
        "source_idle",
        "status",
    )

    def __init__(self, stream_id: int, h2: H2Stream) -> None:
        self.id = stream_id
        self.h2 = h2
        self.priority: Priority = UNSAID
        self.head_only = False
        self.malformed = False
        self.request_open = False  # the client may still send content
        self.body_left: int | None = None  # bytes of it announced and not come
        self.body_dropped = 0
        self.responded = False
        self.status = 0
        self.body: deque[bytes | memoryview | FileSlice] = deque()
        self.source: Source | None = None
        self.source_idle = False  # it had nothing when last asked
        self.held = False  # its file is being read into memory
        self.body_sent = 0
        self.seen_sent = -1  # bytes of the body, when it was last looked at whether it moves
        self.seen_at = 0.0
        self.paused = False  # it had no window when it was its turn
        self.served = 0  # bytes, counted from where the others stood when this one came, or came back

    def drop_content(self, count: int, charged: int, *, ended: bool) -> ErrorCodes | None:
        """Account for content of the request, which nobody reads: `count` bytes, `charged` to the windows.

        Return the stream error that it is (RFC 9113 §8.1.1), if it is not what was announced, or too much.
        """
        self.body_dropped += charged
        if self.body_left is not None:
            self.body_left -= count
            if self.body_left < 0 or (ended and self.body_left):
                return ErrorCodes.PROTOCOL_ERROR
        if self.body_dropped > MAX_BODY:
            return ErrorCodes.ENHANCE_YOUR_CALM
        self.request_open = not ended
        return None

    def close(self) -> None:
        """Let go of what is left of the response."""
        for segment in self.body:
            if isinstance(segment, FileSlice):
                segment.close()
        self.body.clear()
        if self.source is not None:
            self.source.close()
            self.source = None
