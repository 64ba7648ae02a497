"""h2's connection, and the ways round it: a response's header, DATA whose payload nobody has read, a plain request, and a
request with its answer at once.

h2 keeps the state: streams, windows, settings, HPACK of what comes. It would also copy every payload and spend 60 us on each
header, so each of them does to its state exactly what its own method does and leaves the bytes to us. Properties
(tests/unit/test_engine.py) hold them against h2's own in every sequence.
"""

from collections.abc import Sequence
from typing import Final, cast

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, ConnectionState, H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import DenialOfServiceError, FlowControlError, FrameTooLargeError, ProtocolError
from h2.settings import SettingCodes
from h2.stream import H2Stream, StreamClosedBy, StreamInputs, StreamState
from hpack.exceptions import HPACKError, OversizedHeaderListError

from ktlsd.protocol.h2_parts import ClosedStreams, Dispatch, Entries, NoEncoder, OurSettings, PeerSettings
from ktlsd.protocol.header_blocks import HeaderList, decode_block

MAX_STREAMS: Final = 128  # requests at a time; more are refused, each by itself (RFC 9113 §5.1.2)
MAX_HEADER_LIST: Final = 32_768  # bytes as RFC 9113 §6.5.2 counts them; more is 431
_HARD_HEADER_LIST: Final = 65_536  # more ends the connection: it is not even decoded
NO_RFC7540_PRIORITIES: Final = 9  # RFC 9218 §2.1

DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9
PRIORITY_UPDATE: Final = 0x10  # RFC 9218 §7.1
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
HAS_PRIORITY: Final = 0x20


def frame_header(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    """Return the 9 bytes in front of a frame's payload (RFC 9113 §4.1)."""
    return (length << 48 | kind << 40 | flags << 32 | stream_id).to_bytes(9, "big")


def goaway(last: int, code: ErrorCodes, why: str = "") -> bytes:
    """Return a GOAWAY frame; `why` is for whoever looks for the reason."""
    payload = last.to_bytes(4, "big") + int(code).to_bytes(4, "big") + why.encode("ascii", "replace")[:200]
    return frame_header(len(payload), GOAWAY, 0, 0) + payload


def count_resets(frames: bytes) -> int:
    """Return how many of these whole frames are RST_STREAM."""
    count = at = 0
    while at < len(frames):
        count += frames[at + 3] == RST_STREAM
        at += 9 + int.from_bytes(frames[at : at + 3], "big")
    return count


# Fields are validated by http2_fields, request by request; h2 would end the whole connection.
_CONFIG: Final = H2Configuration(
    client_side=False,
    header_encoding=None,
    validate_inbound_headers=False,
    normalize_inbound_headers=False,
    validate_outbound_headers=False,
    normalize_outbound_headers=False,
)
_OURS: Final = OurSettings(
    client=False,
    initial_values={
        SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
        SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST,
        cast(SettingCodes, NO_RFC7540_PRIORITIES): 1,
    },
)


class Engine(H2Connection):
    """A server's HTTP/2 state. What it wants to say is in `data_to_send`; payloads never are."""

    _closed_streams: ClosedStreams  # type: ignore[assignment]  # h2 sets and asks, and does nothing else with it

    def __init__(self) -> None:
        super().__init__(_CONFIG)
        self.local_settings = _OURS
        self.remote_settings = PeerSettings()
        self.encoder = NoEncoder()  # type: ignore[assignment]  # nobody encodes with it
        self.decoder.header_table.dynamic_entries = Entries()  # type: ignore[assignment]
        self.decoder.max_header_list_size = _HARD_HEADER_LIST
        self._closed_streams = ClosedStreams()

    @property  # type: ignore[override]  # h2 sets it once and asks for one kind at a time
    def _frame_dispatch_table(self) -> Dispatch:
        return Dispatch(self)

    @_frame_dispatch_table.setter
    def _frame_dispatch_table(self, table: object) -> None:
        pass

    @property
    def open_inbound_streams(self) -> int:
        """Nothing, as far as h2 is concerned: it would end the connection where one stream too many is to be refused."""
        return 0

    def forget(self, stream_id: int) -> None:
        """Drop a stream that is closed, as h2 does whenever it counts."""
        stream = self.streams.get(stream_id)
        if stream is not None and stream.closed:
            del self.streams[stream_id]
            self._closed_streams[stream_id] = stream.closed_by
            if not self.streams:
                self.streams = {}  # an emptied one keeps its room

    def window(self, stream_id: int) -> int:
        """How many bytes of payload may be sent on a stream now; less than none after SETTINGS made it smaller."""
        return min(self.outbound_flow_control_window, self.streams[stream_id].outbound_flow_control_window)

    def was_reset_by_us(self, stream_id: int) -> bool:
        """Whether we have reset this stream, not so long ago: what was on its way is to be ignored."""
        return self._closed_streams.get(stream_id) is StreamClosedBy.SEND_RST_STREAM

    def ignore_data(self, length: int) -> None:
        """Account for `length` bytes of DATA on such a stream; h2 would answer each frame with another RST_STREAM."""
        windows = self._inbound_flow_control_window_manager
        windows.window_consumed(length)
        increment = windows.process_bytes(length)
        if increment:
            self._data_to_send += frame_header(4, WINDOW_UPDATE, 0, 0) + increment.to_bytes(4, "big")

    # --- the ways round -----------------------------------------------------------------------------------------

    def takes_request(self, stream_id: int) -> bool:
        """Whether HEADERS on this stream would open it, and nothing is special about them."""
        return stream_id % 2 == 1 and stream_id > self.highest_inbound_stream_id and not self.incoming_buffer._headers_buffer

    def receive_request(self, stream_id: int, block: bytes, *, end_stream: bool) -> HeaderList:
        """As `receive_data` of one HEADERS frame with END_HEADERS that opens a stream; return the header list, unchecked.

        Raises h2's ProtocolError; then the connection is to be ended, and no GOAWAY has been prepared.
        """
        try:
            headers = decode_block(self.decoder, block)
        except OversizedHeaderListError as exc:
            raise DenialOfServiceError(f"Oversized header block: {exc}") from exc
        except HPACKError as exc:
            raise ProtocolError(f"Error decoding header block: {exc}") from exc
        self._input(ConnectionInputs.RECV_HEADERS)
        stream = H2Stream(
            stream_id,
            config=self.config,
            inbound_window_size=self.local_settings.initial_window_size,
            outbound_window_size=self.remote_settings.initial_window_size,
        )
        stream.max_outbound_frame_size = self.max_outbound_frame_size
        self.streams[stream_id] = stream
        self.highest_inbound_stream_id = stream_id
        machine = stream.state_machine
        machine.client = False
        machine.headers_received = True
        machine.state = StreamState.HALF_CLOSED_REMOTE if end_stream else StreamState.OPEN
        return headers

    def send_response(self, stream_id: int, block: bytes, *, end_stream: bool) -> bytes:
        """As `send_headers` of a final response whose header block is `block`; return the frames."""
        self._input(ConnectionInputs.SEND_HEADERS)
        stream = self._get_stream_by_id(stream_id)
        stream.state_machine.process_input(StreamInputs.SEND_HEADERS)
        if end_stream:
            stream.state_machine.process_input(StreamInputs.SEND_END_STREAM)
        stream.request_method = None
        flags = END_STREAM if end_stream else 0
        size = self.max_outbound_frame_size
        if len(block) <= size:
            return frame_header(len(block), HEADERS, flags | END_HEADERS, stream_id) + block
        out = [frame_header(size, HEADERS, flags, stream_id), block[:size]]
        for at in range(size, len(block), size):
            piece = block[at : at + size]
            flags = END_HEADERS if at + size >= len(block) else 0
            out += (frame_header(len(piece), CONTINUATION, flags, stream_id), piece)
        return b"".join(out)

    def charge_data(self, stream_id: int, payload: int, *, largest: int, end_stream: bool) -> None:
        """As `send_data` of DATA frames with `payload` bytes in all, the longest of them `largest`; the frames are ours.

        Raises FlowControlError, FrameTooLargeError, and h2's errors for a stream that can't send; nothing is changed then.
        """
        if payload and payload > self.local_flow_control_window(stream_id):
            raise FlowControlError(f"{payload} bytes, but the window is {self.local_flow_control_window(stream_id)}")
        if largest > self.max_outbound_frame_size:
            raise FrameTooLargeError(f"{largest} bytes, but the largest frame is {self.max_outbound_frame_size}")
        self._input(ConnectionInputs.SEND_DATA)
        stream = self.streams[stream_id]
        if stream.state_machine.state not in _MAY_SEND:
            stream.state_machine.process_input(StreamInputs.SEND_DATA)
        if end_stream:
            stream.state_machine.process_input(StreamInputs.SEND_END_STREAM)
        stream.outbound_flow_control_window -= payload
        self.outbound_flow_control_window -= payload

    def exchange(self, ids: Sequence[int], payload: int, credit: int) -> None:
        """As if plain requests had come on these streams and each had been answered whole, `payload` bytes of DATA in all.

        `credit` is what the connection's window has grown by meanwhile. The caller has looked at the windows.
        """
        for stream_id in ids:
            self._closed_streams.ended(stream_id)
        if ids:
            self.highest_inbound_stream_id = ids[-1]
        self.outbound_flow_control_window += credit - payload

    def _input(self, what: ConnectionInputs) -> None:
        """Tell the connection's state machine; once a request has come, headers and data change nothing in it."""
        if self.state_machine.state is not ConnectionState.SERVER_OPEN:
            self.state_machine.process_input(what)


_MAY_SEND: Final = (StreamState.HALF_CLOSED_REMOTE, StreamState.OPEN)


def error_code(exc: ProtocolError) -> ErrorCodes:
    """Return GOAWAY's error code; h2 makes no difference for a header block that can't be decoded (RFC 9113 §4.3)."""
    cause = exc.__cause__
    if isinstance(cause, HPACKError) and not isinstance(cause, OversizedHeaderListError):
        return ErrorCodes.COMPRESSION_ERROR
    return ErrorCodes(exc.error_code)
