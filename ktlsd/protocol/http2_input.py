"""A client's bytes to whole HTTP/2 frames, each paid for before it costs anything (RFC 9113 §3.4, §4, §10.5)."""

from collections.abc import Iterator
from typing import Final, NamedTuple

from ktlsd.errors import Http2Error
from ktlsd.protocol import engine as wire
from ktlsd.protocol.budgets import Budgets

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_FRAME: Final = 16_384  # bytes of payload: what we allow a client to send, the least there is
LAST_STREAM: Final = (1 << 31) - 1
_MAX_BLOCK: Final = 65_536  # bytes of HEADERS and CONTINUATION together
_MAX_CONTINUATIONS: Final = 16
_SLIVER: Final = 256  # bytes; DATA below it is paid for like a frame that says nothing
_NAMES: Final = {
    wire.DATA: "tiny DATA",
    wire.PRIORITY: "PRIORITY",
    wire.RST_STREAM: "RST_STREAM",
    wire.SETTINGS: "SETTINGS",
    wire.PING: "PING",
    wire.GOAWAY: "GOAWAY",
    wire.WINDOW_UPDATE: "WINDOW_UPDATE",
    wire.PRIORITY_UPDATE: "PRIORITY_UPDATE",
}


class Frame(NamedTuple):
    """`raw` is header and payload; the rest is what the header says."""

    raw: bytes
    kind: int
    flags: int
    stream_id: int


class Input:
    """Cuts frames off what has come."""

    __slots__ = ("_block_left", "_budgets", "_buffer", "_continuations", "_started", "settled")

    def __init__(self, budgets: Budgets) -> None:
        self._budgets = budgets
        self._buffer = bytearray()
        self._started = False  # the preface has come
        self._block_left = -1  # bytes the header block that has begun may still have; -1: none has begun
        self._continuations = 0
        self.settled = False  # the client's SETTINGS have come

    @property
    def begun(self) -> bool:
        """Whether part of something has come and the rest has not: the preface, a frame, a header block."""
        return not self.settled or bool(self._buffer) or self.in_block

    @property
    def in_block(self) -> bool:
        """Whether a header block has begun: nothing but its CONTINUATION may come."""
        return self._block_left >= 0

    def clear(self) -> None:
        """Forget what has come."""
        self._buffer.clear()

    def frames(self, data: bytes, now: float) -> Iterator[Frame]:
        """Yield the frames that are whole with `data`. Raises Http2Error; nothing may be read behind it."""
        buffer = self._buffer
        buffer += data
        if not self._started:
            if not buffer.startswith(PREFACE[: len(buffer)]):
                raise Http2Error("PROTOCOL_ERROR", "this is no HTTP/2 preface")
            if len(buffer) < len(PREFACE):
                return
            self._started = True
            del buffer[: len(PREFACE)]
        came, at = bytes(buffer), 0
        end = len(came)
        buffer.clear()
        while end - at >= 9:
            length = came[at] << 16 | came[at + 1] << 8 | came[at + 2]
            if length > MAX_FRAME:
                raise Http2Error("FRAME_SIZE_ERROR", f"a frame of {length} bytes, {MAX_FRAME} are allowed")
            following = at + 9 + length
            if following > end:
                break
            stream_id = int.from_bytes(came[at + 5 : at + 9], "big") & LAST_STREAM
            frame = Frame(came[at:following], came[at + 3], came[at + 4], stream_id)
            at = following
            self._admit(frame, length, now)
            yield frame
        buffer += came[at:]

    def _admit(self, frame: Frame, length: int, now: float) -> None:
        """Raise Http2Error for a frame that has no place here, or can't be paid for."""
        raw, kind, flags, _ = frame
        if kind == wire.SETTINGS:
            self._check_settings(raw, flags)
        if kind == wire.HEADERS and self.settled:
            if not flags & wire.END_HEADERS:
                self._block_left, self._continuations = _MAX_BLOCK - length, 0
            return
        if not self.settled:
            if kind != wire.SETTINGS or flags & wire.ACK:
                raise Http2Error("PROTOCOL_ERROR", "the first frame is not SETTINGS")
            self.settled = True
        elif kind == wire.CONTINUATION:
            self._continue(flags, length)
        elif kind != wire.DATA or (length < _SLIVER and not flags & wire.END_STREAM):
            self._pay(kind, now)

    def _check_settings(self, raw: bytes, flags: int) -> None:
        """What h2 doesn't ask (RFC 9113 §6.5, RFC 9218 §2.1)."""
        if flags & wire.ACK and len(raw) > 9:
            raise Http2Error("FRAME_SIZE_ERROR", "an acknowledgement of SETTINGS says something")
        for at in range(9, len(raw) - 5, 6):
            if int.from_bytes(raw[at : at + 2], "big") == wire.NO_RFC7540_PRIORITIES and raw[at + 2 : at + 6] > b"\0\0\0\1":
                raise Http2Error("PROTOCOL_ERROR", "SETTINGS_NO_RFC7540_PRIORITIES is 0 or 1")

    def _continue(self, flags: int, length: int) -> None:
        """Bound what a header block may be before it is whole (CVE-2024-27316)."""
        if self._block_left < 0:
            return  # h2 knows what is wrong with it
        self._block_left -= length
        self._continuations += 1
        if self._block_left < 0 or self._continuations > _MAX_CONTINUATIONS:
            raise Http2Error("ENHANCE_YOUR_CALM", "flood of CONTINUATION")
        if flags & wire.END_HEADERS:
            self._block_left = -1

    def _pay(self, kind: int, now: float) -> None:
        budgets = self._budgets
        bucket = budgets.control
        if kind == wire.WINDOW_UPDATE:
            bucket = budgets.windows
        if not bucket.spend(now):
            raise Http2Error("ENHANCE_YOUR_CALM", f"flood of {_NAMES.get(kind, 'unknown')} frames")
