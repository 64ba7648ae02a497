"""HTTP/2's short way: requests that came before, read and answered with no stream in between.

Between two requests a connection has no streams and nothing to say. What comes then is most often whole requests, each in
one HEADERS frame, with header blocks that leave HPACK's table alone. They are read here without changing anything, so that
whoever finds no answer to one of them hands the same bytes to `Http2Connection.receive`; who has all answers gets them as
frames, and once those have gone h2's state is made what it would be after the streams had come and gone.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from ktlsd.protocol import engine as wire
from ktlsd.protocol.engine import Engine, frame_header
from ktlsd.protocol.header_blocks import peek_block
from ktlsd.protocol.http2_input import LAST_STREAM, MAX_FRAME
from ktlsd.protocol.messages import Fields, holds_secret

_WHOLE: Final = wire.END_STREAM | wire.END_HEADERS
_REMEMBERED: Final = 2  # blocks; most clients say the same all the time, and idle connections are to be small:
_SHORT: Final = 256  # bytes of a block,
_SHORT_LIST: Final = 1_024  # and of what it says (RFC 9113 §6.5.2)


class Asked(NamedTuple):
    """What came: requests in their order, and what the connection's window has grown by."""

    ids: list[int]
    fields: list[Fields]
    credit: int  # bytes
    updates: int  # WINDOW_UPDATE frames


class Known:
    """Reads requests and writes answers on one connection that is between two requests."""

    __slots__ = ("_blocks", "_engine", "_entries", "_newest")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._blocks: dict[bytes, Fields] = {}  # what header blocks say as long as the table is as it was
        self._newest: tuple[bytes, bytes] | None = None
        self._entries = 0

    def read(self, data: bytes) -> Asked | None:
        """Return what `data` says if that is nothing but whole requests and WINDOW_UPDATEs of the connection; else None."""
        ids: list[int] = []
        found: list[Fields] = []
        credit = updates = at = 0
        last, end = self._engine.highest_inbound_stream_id, len(data)
        while at < end:
            start = at + 9
            if start > end:
                return None
            head = int.from_bytes(data[at:start], "big")
            length, kind, flags, stream_id = head >> 48, head >> 40 & 0xFF, head >> 32 & 0xFF, head & LAST_STREAM
            at = start + length
            if at > end or length > MAX_FRAME:
                return None
            if kind == wire.HEADERS and flags | wire.HAS_PRIORITY == _WHOLE | wire.HAS_PRIORITY:
                if flags & wire.HAS_PRIORITY:
                    if int.from_bytes(data[start : start + 4], "big") & LAST_STREAM == stream_id:
                        return None
                    start += 5
                if stream_id <= last or stream_id % 2 == 0 or start >= at or len(ids) >= wire.MAX_STREAMS:
                    return None
                fields = self._fields(data[start:at])
                if fields is None:
                    return None
                ids.append(stream_id)
                found.append(fields)
                last = stream_id
            elif kind == wire.WINDOW_UPDATE and stream_id == 0 and length == 4:
                increment = int.from_bytes(data[start:at], "big") & LAST_STREAM
                if not increment:
                    return None
                credit += increment
                updates += 1
            else:
                return None
        if self._engine.outbound_flow_control_window + credit > LAST_STREAM:
            return None
        return Asked(ids, found, credit, updates)

    def _fields(self, block: bytes) -> Fields | None:
        decoder = self._engine.decoder
        entries = decoder.header_table.dynamic_entries
        newest = entries[0] if entries else None
        if newest is not self._newest or len(entries) != self._entries:  # every change shows in one of them
            self._blocks.clear()
            self._newest, self._entries = newest, len(entries)
        fields = self._blocks.get(block)
        if fields is None:
            listed = peek_block(decoder, block)
            if listed is None:
                return None
            fields = tuple(listed)
            large = len(block) > _SHORT or sum([len(name) + len(value) + 32 for name, value in fields]) > _SHORT_LIST
            if large or holds_secret(fields) or (newest is not None and holds_secret((newest,))):
                return fields
            if len(self._blocks) >= _REMEMBERED:
                self._blocks.clear()
            self._blocks[block] = fields
        return fields

    def write(self, asked: Asked, sizes: Sequence[int], frames: Sequence[list[bytes]], limit: int) -> bytes | None:
        """Return the answers, each `prepare`d, with so many bytes of DATA, as they go out.

        None: the client's windows, or `limit` bytes of DATA, don't allow it now.
        """
        engine = self._engine
        total = sum(sizes)
        if total > limit or total > engine.outbound_flow_control_window + asked.credit:
            return None
        if sizes and max(sizes) > engine.remote_settings.initial_window_size:  # what each stream would begin with
            return None
        out = [stream_id.to_bytes(4, "big").join(each) for stream_id, each in zip(asked.ids, frames, strict=True)]
        return out[0] if len(out) == 1 else b"".join(out)


def prepare(block: bytes, body: bytes) -> list[bytes]:
    """Return a header block of at most 16,384 bytes and a body as frames, without the stream's number, which joins them.

    All frames are such as every client takes (RFC 9113 §4.2).
    """
    assert len(block) <= MAX_FRAME
    starts = range(0, len(body), MAX_FRAME)
    payloads = [block, *(body[at : at + MAX_FRAME] for at in starts)]
    kinds = [wire.HEADERS, *(wire.DATA for _ in starts)]
    heads = [frame_header(len(payload), kind, 0, 0)[:5] for payload, kind in zip(payloads, kinds, strict=True)]
    heads[0] = frame_header(len(block), wire.HEADERS, wire.END_HEADERS, 0)[:5]
    heads[-1] = heads[-1][:4] + bytes([heads[-1][4] | wire.END_STREAM])
    return [heads[0], *(payload + head for payload, head in zip(payloads, heads[1:], strict=False)), payloads[-1]]
