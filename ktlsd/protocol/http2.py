"""HTTP/2 on the wire (RFC 9113): a connection's bytes to requests, responses to frames. h2 keeps the state (`engine`).

Frames are cut (`http2_input`) and handed to it one by one, so that every one is paid for before it costs anything, and
GOAWAY ends in what RFC 9113 §6.8 wants, not in a dead connection. What goes out is in `http2_output`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

from h2 import events
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError

from ktlsd.errors import Http2Error, RequestError
from ktlsd.protocol import engine as wire
from ktlsd.protocol.bodies import MAX_BODY
from ktlsd.protocol.budgets import Allowance, Budgets
from ktlsd.protocol.engine import Engine, error_code, frame_header
from ktlsd.protocol.header_blocks import FORGET_TABLE, HeaderList, block_of
from ktlsd.protocol.http2_fields import MalformedRequest, request_line, request_of
from ktlsd.protocol.http2_input import LAST_STREAM, PREFACE, Frame, Input
from ktlsd.protocol.http2_known import Asked, Known
from ktlsd.protocol.http2_output import Output
from ktlsd.protocol.http2_stream import Stream
from ktlsd.protocol.messages import Ended, Refused, Request, Response
from ktlsd.protocol.priorities import UNSAID, Early, parse_priority, parse_update
from ktlsd.slices import Outgoing

_SMALL: Final = 1_024  # bytes; shorter frames that nobody wants have to be paid for
_MAX_QUEUED: Final = 65_536  # bytes of answers the client has not taken; above it no more input is wanted
_MAX_DISCARDED: Final = 262_144  # bytes taken after an error and thrown away
_SETTINGS_TIMEOUT: Final = 20.0  # seconds
_OUR_PING: Final = b"draining"


class Http2Connection:
    """One connection's protocol state, with the same doors as `Http1Connection`."""

    def __init__(self, max_requests: int = 10_000, stall_timeout: float = 60.0) -> None:
        """`stall_timeout` is seconds that a stream may go without a window while others have one."""
        self._engine = Engine()
        self._engine.initiate_connection()
        self._engine.receive_data(PREFACE)  # `Input` has seen the client's
        self._output = Output(self._engine)
        self._output.control(self._engine.data_to_send())
        self._budgets = Budgets()
        self._input = Input(self._budgets)
        self.known = Known(self._engine)
        self._early = Early(wire.MAX_STREAMS)
        self._found: list[Request | Refused] = []
        self._left = max_requests
        self._stall_timeout = stall_timeout
        self._look_at = 0.0  # when to look for stalled streams
        self._now = 0.0
        self._acknowledge_by = 0.0  # when our SETTINGS must have been acknowledged; 0: not sent, inf: they have been
        self._first_response = True
        self._draining = False  # told that we are going to stop
        self._last_told = False  # told which was the last request
        self._input_ended = False
        self._discarded = 0
        self.fault: Http2Error | None = None  # the client broke a rule: GOAWAY is on its way, nothing else goes
        self.body_bytes = 0  # the longest response body so far

    # --- what the server wants to know -----------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a response is owed, or anything is on its way."""
        return bool(self._output.streams) or self._output.queued > 0

    @property
    def owes_work(self) -> bool:
        """Whether all that is owed waits for something of ours, not for the client."""
        return self._output.owes_work

    @property
    def progress(self) -> int:
        """A number that grows with every response and every byte of a body that goes out, and with nothing else."""
        return self._output.progress

    @property
    def head_begun(self) -> bool:
        """Whether part of something has come and the rest has not: the preface, a frame, a header block."""
        return self._input.begun

    @property
    def leaving(self) -> bool:
        """Whether the client has been told that this connection will end, and may still have requests on the way."""
        return self._draining and not self._last_told

    @property
    def wants_input(self) -> bool:
        """Whether more input may be handed in: not while the client doesn't take our answers to it."""
        if self.fault is not None:
            return self._discarded < _MAX_DISCARDED and not self._input_ended
        return self._output.queued <= _MAX_QUEUED and not self._input_ended

    @property
    def working(self) -> bool:
        """Whether `next_output` has nothing now, but would have after more work: call it again, others first."""
        return self._output.working

    @property
    def closing(self) -> bool:
        """Whether all has been said: close."""
        output = self._output
        if output.queued:
            return False
        over = self.fault is not None or (self._last_told and not output.streams)
        return over or (self._input_ended and not output.can_go_on)

    @property
    def at_rest(self) -> bool:
        """Whether nothing is begun, owed or about to end: then `known` may read what comes next."""
        begun = self._output.streams or self._output.queued or self._input.begun or self._early or self._first_response
        over = self._draining or self._input_ended or self.fault is not None or self._left <= wire.MAX_STREAMS
        return not (begun or over) and self._acknowledge_by == float("inf")

    # --- input -----------------------------------------------------------------------------------------------------

    def receive(self, data: bytes, now: float = 0.0) -> list[Request | Refused]:
        """Take input, return the requests that are whole; `now` is monotonic seconds, for the budgets."""
        if not data:
            return []
        self._now = now
        if not self._acknowledge_by:
            self._acknowledge_by = now + _SETTINGS_TIMEOUT
        elif now > self._acknowledge_by:
            self._end(Http2Error("SETTINGS_TIMEOUT", "our SETTINGS were not acknowledged"))
        if self.fault is not None:
            self._discarded += len(data)
            return []
        try:
            for frame in self._input.frames(data, now):
                self._frame(frame)
                if self.fault is not None:
                    break
        except Http2Error as error:
            self._end(error)
        except ProtocolError as exc:
            self._engine.clear_outbound_data_buffer()  # h2's own GOAWAY
            self._end(Http2Error(error_code(exc).name, str(exc)))
        if now >= self._look_at:
            self._look_at = now + 1.0
            for stream in self._output.stalled(now, self._stall_timeout):
                self._reset(stream.id, ErrorCodes.CANCEL)
        found, self._found = self._found, []
        return found if self.fault is None else []

    def _frame(self, frame: Frame) -> None:
        raw, kind, flags, stream_id = frame
        if not self._input.in_block:
            if kind == wire.HEADERS and flags & ~(wire.END_STREAM | wire.HAS_PRIORITY) == wire.END_HEADERS:
                if self._engine.takes_request(stream_id) and len(raw) > 9 + 5:
                    self._plain_request(raw, flags, stream_id)
                    return
            elif kind == wire.GOAWAY and stream_id == 0 and len(raw) >= 9 + 8:
                self._tell_last()  # it leaves: what it has asked is answered
                return
            elif kind == wire.PRIORITY_UPDATE:
                self._priority_update(raw, stream_id)
                return
            elif kind == wire.DATA and self._engine.was_reset_by_us(stream_id):
                self._late_data(len(raw) - 9)
                return
            elif kind == wire.RST_STREAM and stream_id > self._engine.highest_inbound_stream_id:
                raise Http2Error("PROTOCOL_ERROR", "RST_STREAM on an idle stream")
        for event in self._engine.receive_data(raw):
            handler = _HANDLERS.get(type(event))
            if handler is not None:
                handler(self, event)
        self._pass_on()

    def _plain_request(self, frame: bytes, flags: int, stream_id: int) -> None:
        """HEADERS that are a whole request: the one frame that comes all the time."""
        start = 9 + 5 if flags & wire.HAS_PRIORITY else 9  # RFC 9113 §5.3: read over, but it must not depend on itself
        if start > 9 and int.from_bytes(frame[9:13], "big") & LAST_STREAM == stream_id:
            raise Http2Error("PROTOCOL_ERROR", "a stream that depends on itself")
        end_stream = bool(flags & wire.END_STREAM)
        headers = self._engine.receive_request(stream_id, frame[start:], end_stream=end_stream)
        self._request(stream_id, headers, end_stream=end_stream)

    def _pass_on(self) -> None:
        """Queue what h2 wants to say; streams that it resets because of the client are the client's resets too."""
        said = self._engine.data_to_send() if self._engine._data_to_send else b""
        for _ in range(wire.count_resets(said)):
            self._pay_for_reset()
        if said and self.fault is None:
            self._output.control(said)

    def _pay_for_reset(self, bucket: Allowance | None = None) -> None:
        if self.fault is None and not (bucket or self._budgets.resets).spend(self._now):
            self._end(Http2Error("ENHANCE_YOUR_CALM", "flood of reset streams"))

    def _late_data(self, length: int) -> None:
        """Content that was on its way when we reset its stream (RFC 9113 §5.1): it counts for the connection's window only."""
        if length < _SMALL and not self._budgets.control.spend(self._now):
            raise Http2Error("ENHANCE_YOUR_CALM", "flood of DATA on closed streams")
        self._engine.ignore_data(length)
        self._output.control(self._engine.data_to_send())

    # --- requests --------------------------------------------------------------------------------------------------

    def _request(self, stream_id: int, headers: HeaderList, *, end_stream: bool) -> None:
        output = self._output
        priority = self._early.take(stream_id)
        if len(output.streams) >= wire.MAX_STREAMS or self._last_told:
            self._reset(stream_id, ErrorCodes.REFUSED_STREAM)
            self._pay_for_reset(self._budgets.control if self._last_told else self._budgets.resets)
            return
        self._left -= 1
        if self._left <= 0:
            self.drain()
            if self._left <= -wire.MAX_STREAMS:
                self._tell_last()  # it doesn't answer our PING
        stream = Stream(stream_id, self._engine.streams[stream_id])
        stream.request_open = not end_stream
        stream.head_only = (b":method", b"HEAD") in headers
        output.add(stream)
        found: Request | Refused
        try:
            found, length = request_of(headers, stream_id, whole=end_stream)
            stream.body_left = length
            said = found.header(b"priority") if priority is None else None
            stream.priority = priority or (UNSAID if said is None else parse_priority(said))
            if not end_stream and length is not None and length > MAX_BODY:
                raise RequestError(413, "Request bodies are not taken here.")
        except MalformedRequest as exc:
            stream.malformed = True
            self._pay_for_reset()
            found = Refused(RequestError(400, f"Malformed: {exc}"), stream_id, request_line(headers))
        except RequestError as error:
            found = Refused(error, stream_id, request_line(headers))
        if not end_stream:
            self._engine.streams[stream_id]._expected_content_length = None  # checked here: h2 would end the connection
        self._found.append(found)

    def _data(self, event: events.DataReceived) -> None:
        """A request's body: dropped, its length checked."""
        assert event.flow_controlled_length is not None
        stream = self._output.streams.get(event.stream_id)
        self._engine.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        if stream is None:
            return
        ended = event.stream_ended is not None
        code = stream.drop_content(len(event.data or b""), event.flow_controlled_length, ended=ended)
        if code is not None:
            self._break(stream, code)

    def _trailers(self, event: events.TrailersReceived) -> None:
        stream = self._output.streams.get(event.stream_id)
        if stream is not None:
            stream.request_open = False
            if any(name[:1] in (b":", ":") for name, _ in event.headers) or stream.body_left:
                self._break(stream, ErrorCodes.PROTOCOL_ERROR)

    def _stream_reset(self, event: events.StreamReset) -> None:
        if event.remote_reset:  # ours are paid for where they are passed on
            self._pay_for_reset()
        self._output.abort(event.stream_id)
        self._engine.forget(event.stream_id)

    def _break(self, stream: Stream, code: ErrorCodes) -> None:
        """A stream error (RFC 9113 §5.4.2) of the client's making."""
        self._reset(stream.id, code)
        self._pay_for_reset()

    def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        self._output.abort(stream_id)
        self._engine.reset_stream(stream_id, code)
        self._output.control(self._engine.data_to_send())
        self._engine.forget(stream_id)

    def _pong(self, event: events.PingAckReceived) -> None:
        if event.ping_data == _OUR_PING and self._draining:
            self._tell_last()

    def _priority_update(self, frame: bytes, stream_id: int) -> None:
        about, priority = parse_update(frame, stream_id)
        stream = self._output.streams.get(about)
        if stream is not None:
            stream.priority = priority
        elif about > self._engine.highest_inbound_stream_id:
            self._early.put(about, priority)

    # --- ends ------------------------------------------------------------------------------------------------------

    def _end(self, error: Http2Error) -> None:
        """A connection error (RFC 9113 §5.4.1): a frame that has begun goes to its end, then GOAWAY and nothing more."""
        if self.fault is None:
            self.fault = error
            self._input.clear()
            self._output.abort_all()
            self._output.control(wire.goaway(self._engine.highest_inbound_stream_id, ErrorCodes[error.code], str(error)))

    def _tell_last(self) -> None:
        if not self._last_told and self.fault is None:
            self._draining = self._last_told = True
            self._output.control(wire.goaway(self._engine.highest_inbound_stream_id, ErrorCodes.NO_ERROR))

    def give_up(self, error: RequestError) -> list[Request | Refused]:
        """Something has begun and did not go on in time: nobody can be answered, the connection ends."""
        self._end(Http2Error("PROTOCOL_ERROR" if self._input.settled else "SETTINGS_TIMEOUT", error.detail))
        return []

    def end_of_input(self) -> None:
        """The client sends no more, or nothing for too long: what is whole is answered as far as its windows allow."""
        self._input_ended = True
        if 0 < self._acknowledge_by < float("inf"):
            self._end(Http2Error("SETTINGS_TIMEOUT", "our SETTINGS were not acknowledged"))
        self._tell_last()

    def drain(self, *, one_more: bool = False) -> None:
        """Answer what has been asked, and what is on its way while the client doesn't know; then close (RFC 9113 §6.8)."""
        if not self._draining and self.fault is None:
            self._draining = True
            self._left = min(self._left, 0)
            ping = frame_header(8, wire.PING, 0, 0) + _OUR_PING
            self._output.control(wire.goaway(LAST_STREAM, ErrorCodes.NO_ERROR) + ping)

    def abandon(self) -> list[Ended]:
        """Let go of all unfinished responses and return them; nothing is sent any more."""
        self._output.clear()
        return self._output.take_ended()

    # --- responses -------------------------------------------------------------------------------------------------

    def respond(self, stream_id: int, response: Response) -> None:
        """Queue the answer's header, and have its body shared out from now on."""
        stream = self._output.streams.get(stream_id)
        if stream is None or self.fault is not None:
            response.close()  # reset meanwhile
            return
        if stream.malformed:
            stream.status = response.status
            response.close()
            self._reset(stream_id, ErrorCodes.PROTOCOL_ERROR)
            return
        self.body_bytes = max(self.body_bytes, response.body_bytes)
        if stream.head_only:
            response.close()
        block = block_of(response)
        if self._first_response:
            self._first_response = False
            block = FORGET_TABLE + block
        self._output.respond(stream, response, block)

    def answered(self, asked: Asked, payload: int, frames: int, now: float) -> bool:
        """What `known` read while `at_rest` has been answered, with so much DATA in so many frames; whether it still rests."""
        count = len(asked.ids)
        self._engine.exchange(asked.ids, payload, asked.credit)
        self._left -= count
        self._output.progress += count
        if asked.updates and not self._budgets.windows.spend(now, asked.updates):
            self._end(Http2Error("ENHANCE_YOUR_CALM", "flood of WINDOW_UPDATE frames"))
        self._budgets.exchanged(payload, frames, count)
        return self.fault is None and self._left > wire.MAX_STREAMS

    def next_output(self, budget: int) -> Sequence[Outgoing]:
        """Return the segments to send next, about `budget` bytes; [] if there are none now."""
        return self._output.next(budget)

    def sent(self, count: int) -> list[Ended]:
        """Account for `count` bytes from the front of `next_output` that are gone; return the responses that ended."""
        output, budgets = self._output, self._budgets
        if not count and not output.has_ended:
            return []
        if count:
            payload, frames, slivers = output.sent(count)
            budgets.sent(payload, frames)
            if slivers and not budgets.slivers.spend(self._now, slivers):
                self._end(Http2Error("ENHANCE_YOUR_CALM", "windows too small for more than slivers"))
        ended = output.take_ended()
        budgets.responded(sum(each.complete for each in ended))
        return ended

    def hold(self) -> int:
        """The file that stands first in the output has to be read first: leave its stream out until `release`; return it."""
        return self._output.hold()

    def release(self, stream_id: int) -> None:
        """It has been read."""
        self._output.release(stream_id)

    def file_failed(self) -> bool:
        """The file that stands first in the output can't be sent; whether the others can go on without its stream."""
        stream = self._output.first_planned()
        if stream is not None:  # else in the middle of a frame
            self._reset(stream.id, ErrorCodes.INTERNAL_ERROR)
        return stream is not None


_HANDLERS: Final[dict[type, Callable[[Http2Connection, Any], None]]] = {
    events.RequestReceived: lambda self, it: self._request(it.stream_id, it.headers, end_stream=it.stream_ended is not None),
    events.DataReceived: Http2Connection._data,
    events.TrailersReceived: Http2Connection._trailers,
    events.StreamReset: Http2Connection._stream_reset,
    events.SettingsAcknowledged: lambda self, _: setattr(self, "_acknowledge_by", float("inf")),
    events.PingAckReceived: Http2Connection._pong,
}
