"""What an HTTP/2 connection sends next: committed bytes first, then DATA planned by priority and windows.

Committed are control frames, headers, and the rest of a frame that has begun to go. The plan is a proposal, made anew for
every call; only what the channel accepts of it is charged to windows and streams (`engine.charge_data`). So nothing ever
stands inside a frame, a WINDOW_UPDATE or a more urgent response counts at once, a stream that is reset takes nothing with it.
"""

from typing import Final

from h2.errors import ErrorCodes

from ktlsd.protocol.engine import DATA, END_STREAM, Engine, frame_header
from ktlsd.protocol.http2_stream import Stream
from ktlsd.protocol.messages import Ended, Response
from ktlsd.slices import FRAME_HEADER, FileSlice, Framed, OpenFile, Outgoing

_PLAN: Final = 4 << 20  # bytes planned at a time: what is planned and not accepted is planned again
_SHARE: Final = 65_536  # bytes at least that one stream sends before the next of the same urgency has its turn
_LARGEST_FRAME: Final = 262_144  # bytes; nothing else goes while a frame does
_SLIVER: Final = 256  # bytes; shorter frames, for want of a window, are counted


class _Unit:
    """A piece of output: committed bytes, or DATA of one stream that may still be dropped."""

    __slots__ = ("end", "file", "payload", "segment", "sliver", "stream")

    def __init__(self, segment: bytes | memoryview | Framed, stream: Stream | None = None, payload: int = 0) -> None:
        self.segment = segment
        self.stream = stream
        self.payload = payload  # bytes in DATA frames
        self.end = False  # the stream ends with it
        self.sliver = False  # made short by a window
        self.file: OpenFile | None = None  # held for the rest of a frame


class Output:
    """Streams with something to say, and in what order they say it."""

    __slots__ = ("_blocked", "_ended", "_engine", "_level", "_plan", "_queue", "progress", "queued", "streams")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: list[_Unit] = []  # a deque takes 760 bytes, for every idle connection
        self._plan: list[_Unit] = []
        self._ended: list[Ended] = []
        self.streams: dict[int, Stream] = {}
        self.queued = 0  # bytes that are committed and not gone
        self._blocked = 0  # the stream whose frame has begun and whose file is being read
        self._level = 0  # bytes: how much the stream had been served whose turn it was last
        self.progress = 0

    # --- streams ---------------------------------------------------------------------------------------------------

    def add(self, stream: Stream) -> None:
        """A request has come."""
        stream.served = self._level
        self.streams[stream.id] = stream

    def respond(self, stream: Stream, response: Response, block: bytes) -> None:
        """Queue the response's header; its body follows as windows and the others allow."""
        stream.responded, stream.status = True, response.status
        self.progress += 1
        for segment in response.body:
            if len(segment):
                stream.body.append(segment)
            elif isinstance(segment, FileSlice):
                segment.close()
        stream.source = response.stream
        unit = _Unit(b"", stream)
        unit.end = not stream.body and stream.source is None
        unit.segment = self._engine.send_response(stream.id, block, end_stream=unit.end)
        self._commit(unit)

    def control(self, frames: bytes) -> None:
        """Queue whole frames that are not DATA."""
        if frames:
            self._commit(_Unit(frames))

    def _commit(self, unit: _Unit) -> None:
        self._queue.append(unit)
        self.queued += len(unit.segment)

    def abort(self, stream_id: int) -> None:
        """Forget a stream that ends before its response is complete; a frame that has begun goes to its end."""
        stream = self._forget(stream_id)
        if stream is not None:
            stream.close()
            self._plan.clear()
            rest = self._queue[0] if self._queue else None
            if rest is not None and rest.stream is stream:  # of a frame whose payload counts as sent
                stream.body_sent -= min(len(rest.segment), rest.payload)
            self._ended.append(Ended(stream_id, stream.status, stream.body_sent, complete=False))

    def _forget(self, stream_id: int) -> Stream | None:
        stream = self.streams.pop(stream_id, None)
        if not self.streams:
            self.streams = {}  # an emptied one keeps its room
        return stream

    def abort_all(self) -> None:
        """Forget all streams."""
        for stream_id in list(self.streams):
            self.abort(stream_id)

    def clear(self) -> None:
        """Forget everything: nothing is going to be sent any more."""
        self.abort_all()
        for unit in self._queue:
            if unit.file is not None:
                unit.file.release()
        self._queue.clear()
        self.queued = 0

    @property
    def has_ended(self) -> bool:
        """Whether there are such as `take_ended` returns."""
        return bool(self._ended)

    def take_ended(self) -> list[Ended]:
        """Return the responses that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    @property
    def working(self) -> bool:
        """Whether a body is being made and there is nothing of it yet."""
        if not self.streams:
            return False
        return any(stream.source_idle and self._window(stream) > 0 for stream in self.streams.values())

    @property
    def can_go_on(self) -> bool:
        """Whether anything can be sent without another word from the client."""
        return any(self.waits_for_us(stream) or self._window(stream) > 0 for stream in self.streams.values())

    @property
    def owes_work(self) -> bool:
        """Whether nothing can be sent before something of ours is done: a body made, a file read, an answer found."""
        if self._blocked:
            return True
        streams = self.streams.values()
        if self.queued or any(not self.waits_for_us(stream) and self._window(stream) > 0 for stream in streams):
            return False
        return any(self.waits_for_us(stream) for stream in streams)

    def waits_for_us(self, stream: Stream) -> bool:
        """Whether it is not the client that a stream waits for."""
        return not stream.responded or stream.held or (stream.source_idle and self._window(stream) > 0)

    def _window(self, stream: Stream) -> int:
        return min(self._engine.outbound_flow_control_window, stream.h2.outbound_flow_control_window)

    def stalled(self, now: float, timeout: float) -> list[Stream]:
        """Return the streams whose client has given them no window for so long, though the connection has one."""
        found = []
        for stream in self.streams.values():
            moves = stream.seen_sent != stream.body_sent or stream.h2.outbound_flow_control_window > 0
            if moves or self.waits_for_us(stream):
                stream.seen_sent, stream.seen_at = stream.body_sent, now
            elif now - stream.seen_at > timeout and self._engine.outbound_flow_control_window > 0:
                found.append(stream)
        return found

    def first_planned(self) -> Stream | None:
        """Return the stream whose DATA comes next, None if something committed does."""
        return self._plan[0].stream if self._plan and not self._queue else None

    def hold(self) -> int:
        """Leave out the stream whose file comes next; in the middle of a frame everybody has to wait. Return it."""
        stream = self.first_planned()
        if stream is not None:
            stream.held = True
            self._plan.clear()
            return stream.id
        stream = self._queue[0].stream
        assert stream is not None
        self._blocked = stream.id
        return stream.id

    def release(self, stream_id: int) -> None:
        """Its file has been read into memory."""
        if self._blocked == stream_id:
            self._blocked = 0
        stream = self.streams.get(stream_id)
        if stream is not None:
            stream.held = False

    # --- the plan --------------------------------------------------------------------------------------------------

    def next(self, budget: int) -> list[Outgoing]:
        """Return what is committed and, behind it, about `budget` bytes of DATA."""
        self._plan = []
        if self._blocked or not (self._queue or self.streams):
            return []
        if self.streams and self.queued < budget:
            self._make_plan(min(budget, _PLAN))
        return [unit.segment for unit in (*self._queue, *self._plan)]

    def _make_plan(self, budget: int) -> None:
        ready = [stream for stream in self.streams.values() if (stream.body or stream.source) and not stream.held]
        share = max(budget // max(len(ready), 1), _SHARE)
        if len(ready) > 1:
            ready.sort(key=_turn)
        window = self._engine.outbound_flow_control_window
        for stream in ready:
            if budget <= 0:
                break
            room = min(window, stream.h2.outbound_flow_control_window)
            planned = self._plan_stream(stream, min(share, budget) if stream.priority.incremental else budget, room)
            window -= planned
            budget -= planned

    def _plan_stream(self, stream: Stream, share: int, window: int) -> int:
        """Plan DATA of one stream, about `share` bytes; return how much payload."""
        if stream.source is not None and not stream.body:
            self._pull(stream)
            if not stream.body:
                if stream.source is None:  # the end came without a last piece, and needs no window
                    self._plan_unit(frame_header(0, DATA, END_STREAM, stream.id), stream, 0, end=True, sliver=False)
                return 0
        if window <= 0:
            stream.paused = True
            return 0
        if stream.paused:  # what it could not have it does not get back: the others were not to blame
            stream.paused, stream.served = False, max(stream.served, self._level)
        largest = min(self._engine.max_outbound_frame_size, _LARGEST_FRAME)
        planned = 0
        last = len(stream.body) - 1
        for number, segment in enumerate(stream.body):
            count = min(len(segment), window - planned)
            if count > share - planned and count > largest:
                count = max((share - planned) // largest, 1 if not planned else 0) * largest
                if not count:
                    break
            end = number == last and count == len(segment) and stream.source is None
            self._plan_segment(stream, segment, count, largest, end=end)
            planned += count
            if count < len(segment) or planned >= share or planned >= window:
                break
        return planned

    def _plan_segment(
        self, stream: Stream, segment: bytes | memoryview | FileSlice, count: int, largest: int, *, end: bool
    ) -> None:
        final = END_STREAM if end else 0
        sliver = count < _SLIVER and count < len(segment)
        if isinstance(segment, FileSlice):
            step = min(largest, count)
            rest = count % step or step
            header = frame_header(step, DATA, 0, stream.id)
            last = header if rest == step and not end else frame_header(rest, DATA, final, stream.id)
            framed = Framed(segment.file, segment.offset, count, step=step, header=header, last_header=last)
            self._plan_unit(framed, stream, count, end=end, sliver=sliver)
            return
        for at in range(0, count, largest):
            piece = segment[at : min(at + largest, count)]
            is_last = end and at + largest >= count
            header = frame_header(len(piece), DATA, final if is_last else 0, stream.id)
            self._plan_unit(b"".join((header, piece)), stream, len(piece), end=is_last, sliver=sliver)

    def _plan_unit(self, segment: bytes | Framed, stream: Stream, payload: int, *, end: bool, sliver: bool) -> None:
        unit = _Unit(segment, stream, payload)
        unit.end, unit.sliver = end, sliver
        self._plan.append(unit)

    def _pull(self, stream: Stream) -> None:
        """Take the next piece of a body that is being made."""
        assert stream.source is not None
        try:
            piece = next(stream.source)
        except StopIteration:
            stream.source.close()
            stream.source = None
            stream.source_idle = False
            return
        stream.source_idle = not piece
        if piece:
            stream.body.append(piece)

    # --- what went -------------------------------------------------------------------------------------------------

    def sent(self, count: int) -> tuple[int, int, int]:
        """Account for bytes from the front of `next`; return payload bytes, frames and slivers among what was planned."""
        queue, whole = self._queue, 0
        for unit in queue:
            size = len(unit.segment)
            self.queued -= min(count, size)
            if count < size:
                unit.segment = _rest(unit.segment, count)
                count = 0
                break
            count -= size
            whole += 1
        over = queue[:whole]
        del queue[:whole]
        for unit in over:  # what ends here may queue more, which was not offered
            self._over(unit)
        payload = frames = slivers = 0
        plan, self._plan = self._plan, []
        for unit in plan:
            if not count:
                break
            gone = min(count, len(unit.segment))
            count -= gone
            slivers += unit.sliver
            charged, number = self._charge(unit, gone)
            payload += charged
            frames += number
        assert count == 0, "more bytes were sent than there were"
        return payload, frames, slivers

    def _charge(self, unit: _Unit, gone: int) -> tuple[int, int]:
        """Commit the frames that the first `gone` bytes of a planned unit are or begin; return payload bytes and frames.

        The rest of a frame goes to the front of the queue, frames that have not begun are planned anew.
        """
        stream, segment = unit.stream, unit.segment
        assert stream is not None
        charged, frames, largest = unit.payload, 1, unit.payload
        if isinstance(segment, Framed):
            largest = min(segment.step, segment.length)
            frames = min(-(-gone // (segment.step + FRAME_HEADER)), segment.frames)
            charged = min(frames * segment.step, segment.length)
            unit.end = unit.end and charged == unit.payload
        self._engine.charge_data(stream.id, charged, largest=largest, end_stream=unit.end)
        self._level = max(self._level, stream.served)
        stream.served += charged
        stream.body_sent += charged
        self.progress += charged + 1
        rest = gone < len(segment)
        if rest and isinstance(segment, Framed):
            unit.file = segment.file.hold()  # the stream may let go of it before the frame is over
        self._take_off(stream, charged)
        if rest:
            segment = _rest(segment, gone)
            if isinstance(segment, Framed):
                segment = segment.first_frame() if segment.gone else b""
            unit.segment, unit.payload = segment, min(len(segment), largest)
        if rest and len(segment):
            self._queue.insert(0, unit)
            self.queued += len(segment)
        else:
            self._over(unit)
        return charged, frames

    def _take_off(self, stream: Stream, payload: int) -> None:
        """Take committed payload off the front of a stream's body."""
        while payload:
            segment = stream.body[0]
            count = min(payload, len(segment))
            payload -= count
            if count == len(segment):
                stream.body.popleft()
                if isinstance(segment, FileSlice):
                    segment.close()
            elif isinstance(segment, FileSlice):
                segment.advance(count)
            else:
                stream.body[0] = memoryview(segment)[count:]

    def _over(self, unit: _Unit) -> None:
        """The last byte of a unit is gone."""
        if unit.file is not None:
            unit.file.release()
            unit.file = None
        stream = unit.stream
        if stream is None or not unit.end or self.streams.get(stream.id) is not stream:
            return
        self._forget(stream.id)
        self._ended.append(Ended(stream.id, stream.status, stream.body_sent, complete=True))
        if stream.request_open:  # what the client still wants to send is not wanted (RFC 9113 §8.1)
            self._engine.reset_stream(stream.id, ErrorCodes.NO_ERROR)
            self.control(self._engine.data_to_send())
        self._engine.forget(stream.id)


def _rest(segment: bytes | memoryview | Framed, count: int) -> bytes | memoryview | Framed:
    if isinstance(segment, Framed):
        segment.advance(count)
        return segment
    return memoryview(segment)[count:]


def _turn(stream: Stream) -> tuple[int, bool, int]:
    priority = stream.priority
    return priority.urgency, priority.incremental, stream.served if priority.incremental else stream.id
