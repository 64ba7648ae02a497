"""RFC 9113, line by line, without a socket: what h2spec asks, and what docs/… of a file server has to promise.

Errors are told as (code, where): where is a stream's number, or "connection" for GOAWAY.
"""

import os

import pytest
from h2.errors import ErrorCodes as Code
from hpack import Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from ktlsd.protocol import engine, http2_input
from ktlsd.protocol.messages import Refused, Response
from ktlsd.slices import FileSlice, OpenFile
from tests.h2peer import GET, PREFACE, RawPeer, raw, request

BODY = os.urandom(100_000)
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED = 1, 4, 8


def setting(code, value):
    return raw(SETTINGS, 0, 0, code.to_bytes(2, "big") + value.to_bytes(4, "big"))


def window(stream_id, increment):
    return raw(WINDOW, 0, stream_id, increment.to_bytes(4, "big"))


def big(_):
    return Response(200, [], [BODY], len(BODY))


def never(_):
    return None


def block(*fields, **pseudo):
    return Encoder().encode(request(*fields, **pseudo))


@pytest.fixture
def peer():
    return RawPeer(big)


def assert_connection_ends(peer, code):
    assert peer.goaway is not None, "no GOAWAY"
    assert Code(peer.goaway[0]) is code
    assert peer.http.fault is not None
    assert peer.http.fault.code == code.name
    assert peer.http.closing
    assert peer.http.receive(b"anything", 0) == []
    assert peer.read() == [], "GOAWAY is the last word"


# --- §3.4 the preface ------------------------------------------------------------------------------------------------


def test_the_server_begins_with_settings():
    peer = RawPeer(begin=False)
    (settings,) = peer.read()
    assert isinstance(settings, SettingsFrame)
    assert settings.settings[3] == 128
    assert settings.settings[6] == 32_768
    assert settings.settings[9] == 1, "RFC 9218: the old priorities are not read"


@pytest.mark.parametrize("step", [1, 3, 24, 1000])
def test_the_preface_comes_in_any_pieces(step):
    peer = RawPeer(big, begin=False)
    said = PREFACE + setting(4, 1 << 20) + window(0, 1 << 20) + peer.headers(1)
    for at in range(0, len(said), step):
        peer.send(said[at : at + step])
    assert peer.body(1) == BODY


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n\r\n", b"INVALID", PREFACE[:-1] + b"X", b"\0" * 24])
def test_another_preface_is_a_protocol_error(start):
    peer = RawPeer(begin=False)
    peer.send(start)
    assert_connection_ends(peer, Code.PROTOCOL_ERROR)


@pytest.mark.parametrize("first", [raw(PING, 0, 0, bytes(8)), raw(SETTINGS, 1, 0), window(0, 1), raw(0xBB, 0, 0)])
def test_the_first_frame_is_settings(first):
    peer = RawPeer(begin=False)
    peer.send(PREFACE + first)
    assert_connection_ends(peer, Code.PROTOCOL_ERROR)


def test_settings_that_are_not_acknowledged_in_time_end_the_connection():
    peer = RawPeer(never, begin=False)
    peer.send(PREFACE + raw(SETTINGS, 0, 0))
    peer.now += 21
    peer.send(raw(PING, 0, 0, bytes(8)))
    assert_connection_ends(peer, Code.SETTINGS_TIMEOUT)


def test_nothing_ends_without_input_that_would_have_its_goaway_sent():
    """The server asks again with b"" while part of a frame is there; a fault then would lie unsent."""
    peer = RawPeer(never, begin=False)
    peer.send(PREFACE + raw(SETTINGS, 0, 0) + raw(PING, 0, 0, bytes(8))[:5])
    peer.now += 21
    assert peer.http.receive(b"", peer.now) == []
    assert peer.http.fault is None
    peer.send(raw(PING, 0, 0, bytes(8))[5:])
    assert_connection_ends(peer, Code.SETTINGS_TIMEOUT)


def test_an_idle_connection_whose_settings_were_never_acknowledged_is_told_so():
    peer = RawPeer(never, begin=False)
    peer.send(PREFACE + raw(SETTINGS, 0, 0))
    peer.http.end_of_input()
    peer.read()
    assert_connection_ends(peer, Code.SETTINGS_TIMEOUT)


def test_a_preface_that_does_not_come_ends_the_connection():
    from ktlsd.errors import RequestError

    peer = RawPeer(begin=False)
    peer.send(PREFACE[:10])
    assert peer.http.head_begun
    assert peer.http.give_up(RequestError(408, "too late")) == []
    peer.read()
    assert_connection_ends(peer, Code.SETTINGS_TIMEOUT)


# --- §4 frames -------------------------------------------------------------------------------------------------------


def test_unknown_frames_flags_and_the_reserved_bit_are_ignored(peer):
    peer.send(
        raw(0x16, 0xFF, 0, b"what"), raw(0x16, 0, 1, b""), raw(PING, 0x16, 0, b"12345678"), raw(PING, 0, 1 << 31, bytes(8))
    )
    assert len(peer.of(PingFrame)) == 2
    peer.get(1)
    assert peer.http.fault is None


@pytest.mark.parametrize("kind", [DATA, HEADERS, SETTINGS, PING, 0x16])
def test_a_frame_that_is_too_long_is_refused_by_its_header(peer, kind):
    peer.send(raw(kind, 0, 1, bytes(16_385))[:9])
    assert_connection_ends(peer, Code.FRAME_SIZE_ERROR)


def test_a_frame_of_16384_bytes_is_taken(peer):
    peer.send(peer.headers(1, end=False), raw(DATA, END_STREAM, 1, bytes(16_384)))
    assert peer.http.fault is None


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (raw(HEADERS, 5, 1, b"\x80"), Code.COMPRESSION_ERROR),  # index 0
        (raw(HEADERS, 5, 1, b"\xbe" + block()), Code.COMPRESSION_ERROR),  # an entry that isn't there
        (
            raw(HEADERS, 5, 1, b"\x00\x85\xf2\xb2\x4a\x84\xff\x84\x49\x50\x9f\xff"),
            Code.COMPRESSION_ERROR,
        ),  # padding over 7 bits
        (raw(HEADERS, 5, 1, b"\x00\x85\xf2\xb2\x4a\x84\xff\x83\x49\x50\x90"), Code.COMPRESSION_ERROR),  # padding of zeros
        (raw(HEADERS, 5, 1, b"\x00\x85\xf2\xb2\x4a\x84\xff\x87\x49\x51\xff\xff\xff\xfa\x7f"), Code.COMPRESSION_ERROR),  # EOS
        (raw(HEADERS, 5, 1, block() + b"\x20"), Code.COMPRESSION_ERROR),  # size update at the end
        (raw(HEADERS, 5, 1, b"\x3f\xe2\x1f" + block()), Code.COMPRESSION_ERROR),  # larger than we allow
        (raw(HEADERS, 5, 1, block()[:-1]), Code.COMPRESSION_ERROR),
        (raw(HEADERS, 1, 1, b"") + raw(CONTINUATION, 4, 1, b"\x80"), Code.COMPRESSION_ERROR),
        (raw(HEADERS, 1, 1, block()) + raw(PRIORITY, 0, 1, bytes(4) + b"\1"), Code.PROTOCOL_ERROR),
        (raw(HEADERS, 1, 1, block()) + raw(HEADERS, 5, 3, block()), Code.PROTOCOL_ERROR),
        (raw(HEADERS, 1, 1, block()) + raw(DATA, 0, 1, b"x"), Code.PROTOCOL_ERROR),
        (raw(HEADERS, 1, 1, block()) + raw(CONTINUATION, 4, 3, b""), Code.PROTOCOL_ERROR),
        (raw(HEADERS, 1, 1, block()) + raw(0x16, 0, 0, b""), Code.PROTOCOL_ERROR),  # §5.5
        (raw(HEADERS, 1, 1, block()) + raw(GOAWAY, 0, 0, bytes(8)), Code.PROTOCOL_ERROR),
        (raw(HEADERS, 1, 1, block()) + raw(0x10, 0, 0, b"\0\0\0\1i"), Code.PROTOCOL_ERROR),
        (raw(HEADERS, 1, 1, block()) + raw(RST, 0, 1, bytes(4)), Code.PROTOCOL_ERROR),
        # §5.1 idle streams
        (raw(DATA, 1, 1, b"x"), Code.PROTOCOL_ERROR),
        (raw(RST, 0, 1, bytes(4)), Code.PROTOCOL_ERROR),
        (raw(RST, 0, 2, bytes(4)), Code.PROTOCOL_ERROR),
        (window(1, 100), Code.PROTOCOL_ERROR),
        (raw(CONTINUATION, 4, 1, block()), Code.PROTOCOL_ERROR),
        # §5.1.1 identifiers
        (raw(HEADERS, 5, 2, block()), Code.PROTOCOL_ERROR),
        (raw(HEADERS, 5, 5, block()) + raw(HEADERS, 5, 3, block()), Code.PROTOCOL_ERROR),
        # §5.3.1
        (raw(HEADERS, 0x25, 1, b"\0\0\0\1\xff" + block()), Code.PROTOCOL_ERROR),
        (raw(PRIORITY, 0, 3, b"\0\0\0\3\xff"), Code.PROTOCOL_ERROR),
        # §6.1
        (raw(DATA, 1, 0, b"x"), Code.PROTOCOL_ERROR),
        (raw(HEADERS, 4, 1, block()) + raw(DATA, PADDED | 1, 1, b"\x05abc"), Code.PROTOCOL_ERROR),
        # §6.2
        (raw(HEADERS, 5, 0, block()), Code.PROTOCOL_ERROR),
        (raw(HEADERS, 5 | PADDED, 1, b"\xff" + block()), Code.PROTOCOL_ERROR),
        # §6.3
        (raw(PRIORITY, 0, 0, bytes(5)), Code.PROTOCOL_ERROR),
        (raw(PRIORITY, 0, 1, bytes(4)), Code.FRAME_SIZE_ERROR),
        # §6.4
        (raw(RST, 0, 0, bytes(4)), Code.PROTOCOL_ERROR),
        (raw(HEADERS, 4, 1, block()) + raw(RST, 0, 1, bytes(3)), Code.FRAME_SIZE_ERROR),
        # §6.5
        (raw(SETTINGS, 1, 0, bytes(6)), Code.FRAME_SIZE_ERROR),
        (raw(SETTINGS, 0, 1, bytes(6)), Code.PROTOCOL_ERROR),
        (raw(SETTINGS, 0, 0, bytes(3)), Code.FRAME_SIZE_ERROR),
        (setting(2, 2), Code.PROTOCOL_ERROR),
        (setting(4, 1 << 31), Code.FLOW_CONTROL_ERROR),
        (setting(5, 16_383), Code.PROTOCOL_ERROR),
        (setting(5, 1 << 24), Code.PROTOCOL_ERROR),
        # §6.6
        (raw(HEADERS, 4, 1, block()) + raw(PUSH, 4, 1, b"\0\0\0\2" + block()), Code.PROTOCOL_ERROR),
        # §6.7
        (raw(PING, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
        (raw(PING, 0, 0, bytes(6)), Code.FRAME_SIZE_ERROR),
        # §6.8
        (raw(GOAWAY, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
        (raw(GOAWAY, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
        # §6.9
        (window(0, 0), Code.PROTOCOL_ERROR),
        (raw(WINDOW, 0, 0, bytes(3)), Code.FRAME_SIZE_ERROR),
        (window(0, (1 << 31) - 1), Code.FLOW_CONTROL_ERROR),
        # §6.10
        (raw(CONTINUATION, 4, 0, block()), Code.PROTOCOL_ERROR),
        (raw(HEADERS, 4, 1, block()) + raw(CONTINUATION, 4, 1, block()), Code.PROTOCOL_ERROR),
        (raw(HEADERS, 0, 1, block()) + raw(CONTINUATION, 4, 1, b"") + raw(CONTINUATION, 4, 1, b""), Code.PROTOCOL_ERROR),
        (raw(HEADERS, 4, 1, block()) + raw(DATA, 0, 1, b"x") + raw(CONTINUATION, 4, 1, block()), Code.PROTOCOL_ERROR),
        # §8.1: a second header block without END_STREAM
        (raw(HEADERS, 4, 1, block()) + raw(HEADERS, 4, 1, block()), Code.PROTOCOL_ERROR),
        # RFC 9218 §7.1
        (raw(0x10, 0, 1, b"\0\0\0\1u=1"), Code.PROTOCOL_ERROR),
        (raw(0x10, 0, 0, b"\0\0\0"), Code.FRAME_SIZE_ERROR),
        (raw(0x10, 0, 0, b"\0\0\0\2u=1"), Code.PROTOCOL_ERROR),
        (raw(0x10, 0, 0, b"\0\0\0\0u=1"), Code.PROTOCOL_ERROR),
        (setting(9, 2), Code.PROTOCOL_ERROR),
    ],
)
def test_connection_errors(frame, code):
    peer = RawPeer(never)
    peer.send(frame)
    assert_connection_ends(peer, code)


# --- §5 streams ------------------------------------------------------------------------------------------------------


def ends_badly(peer, stream_id, *codes):
    """A stream error, or a connection error in its place, which §5.4.2 leaves to us."""
    told = peer.reset(stream_id)
    if told is None:
        assert peer.goaway is not None
        told = peer.goaway[0]
    assert Code(told) in codes


@pytest.mark.parametrize("frame", [raw(DATA, 1, 1, b"x"), raw(HEADERS, 5, 1, block()), raw(CONTINUATION, 4, 1, block())])
def test_nothing_comes_behind_end_stream(frame):
    """§5.1 half-closed (remote)."""
    peer = RawPeer(never)
    peer.send(peer.headers(1), frame)
    ends_badly(peer, 1, Code.STREAM_CLOSED, Code.PROTOCOL_ERROR)


@pytest.mark.parametrize("frame", [raw(DATA, 1, 1, b"x"), raw(HEADERS, 5, 1, block()), raw(CONTINUATION, 4, 1, block())])
@pytest.mark.parametrize("reset", [True, False])
def test_nothing_comes_on_a_closed_stream(frame, reset):
    """§5.1 closed."""
    peer = RawPeer(never if reset else None)
    peer.send(peer.headers(1, end=not reset), *([raw(RST, 0, 1, bytes(4))] if reset else []))
    peer.send(frame)
    ends_badly(peer, 1, Code.STREAM_CLOSED, Code.PROTOCOL_ERROR)


@pytest.mark.parametrize("frame", [window(1, 5), raw(PRIORITY, 0, 1, b"\0\0\0\0\1"), raw(RST, 0, 1, bytes(4))])
def test_what_may_come_on_a_closed_stream_changes_nothing(peer, frame):
    peer = RawPeer()
    peer.get(1)
    assert peer.ended(1)
    peer.send(frame, frame)
    peer.get(3)
    assert peer.body(3) == b"hello"


def test_one_stream_too_many_is_refused_by_itself():
    """§5.1.2."""
    peer = RawPeer(never)
    for number in range(engine.MAX_STREAMS):
        peer.get(2 * number + 1)
    assert peer.get(1001)[0].error_code == Code.REFUSED_STREAM
    assert len(peer.requests) == engine.MAX_STREAMS
    assert peer.http.fault is None
    peer.http.respond(1, Response(204, [], content_length=None))
    peer.read()
    peer.get(1003)
    assert len(peer.requests) == engine.MAX_STREAMS + 1


def test_the_table_of_a_refused_request_is_kept():
    peer = RawPeer(never)
    for number in range(engine.MAX_STREAMS):
        peer.get(2 * number + 1)
    peer.get(1001, ("x-new", "in the table"))
    peer.http.respond(1, Response(204, [], content_length=None))
    peer.read()
    peer.get(1003, ("x-new", "in the table"))
    assert (b"x-new", b"in the table") in peer.requests[-1].headers


def test_streams_may_leave_numbers_out(peer):
    peer.get(5)
    peer.get(1_000_001)
    assert [found.stream_id for found in peer.requests] == [5, 1_000_001]


def test_the_last_number_is_a_stream(peer):
    peer.get((1 << 31) - 1)
    assert peer.requests


# --- §6 frame by frame -----------------------------------------------------------------------------------------------


def test_padding_is_taken_off():
    peer = RawPeer()
    peer.send(raw(HEADERS, 4 | PADDED, 1, b"\3" + block() + bytes(3)), raw(DATA, 1 | PADDED, 1, b"\5hi" + bytes(5)))
    assert peer.body(1) == b"hello"
    peer.send(raw(HEADERS, 5 | PADDED | 0x20, 3, b"\1" + b"\0\0\0\0\x10" + block() + bytes(1)))
    peer.send(raw(HEADERS, 5 | 0x20, 5, b"\x80\0\0\1\x10" + block()))
    assert peer.body(3) == peer.body(5) == b"hello"


def test_a_header_block_in_many_pieces_is_one_request(peer):
    whole = block(("x-long", "v" * 100))
    pieces = [raw(CONTINUATION, 0, 1, whole[at : at + 10]) for at in range(10, len(whole), 10)]
    peer.send(raw(HEADERS, END_STREAM, 1, whole[:10]), *pieces[:-1])
    assert not peer.requests
    assert peer.http.head_begun
    peer.send(raw(CONTINUATION, END_HEADERS, 1, whole[10 * len(pieces) :]))
    assert peer.requests[0].header(b"x-long") == b"v" * 100


def test_priority_frames_of_old_are_read_over(peer):
    peer.send(raw(PRIORITY, 0, 1, b"\0\0\0\3\x10"), raw(PRIORITY, 0, 101, b"\x80\0\0\0\xff"))
    peer.get(1)
    assert peer.http.fault is None


def test_settings_are_acknowledged_each(peer):
    peer.send(setting(1, 0), setting(0x99, 7), setting(3, 0), setting(6, 1))
    assert sum("ACK" in frame.flags for frame in peer.of(SettingsFrame)) == 5  # with the first


def test_ping_is_answered_and_its_answer_is_not(peer):
    (pong,) = peer.send(raw(PING, 0, 0, b"abcdefgh"))
    assert "ACK" in pong.flags
    assert pong.opaque_data == b"abcdefgh"
    assert peer.send(raw(PING, 1, 0, b"abcdefgh")) == []


def test_unknown_error_codes_mean_nothing_special(peer):
    peer.send(peer.headers(1), raw(RST, 0, 1, b"\0\0\0\xff"))
    peer.send(raw(GOAWAY, 0, 0, bytes(4) + b"\0\0\0\xff"))
    assert peer.http.fault is None
    assert peer.http.closing


def test_a_stream_that_is_reset_is_let_go_of_and_told():
    closed = []
    file = OpenFile(os.open(__file__, os.O_RDONLY), 1 << 20, 0, close_fd=lambda fd: (os.close(fd), closed.append(fd)))
    peer = RawPeer(lambda _: Response(200, [], [FileSlice(file, 0, 1 << 20)], 1 << 20))
    peer.reading = False
    peer.get(1)
    file.release()
    assert not closed
    peer.send(raw(RST, 0, 1, b"\0\0\0\x08"))
    assert closed
    (ended,) = peer.http.sent(0)
    assert (ended.stream_id, ended.status, ended.complete) == (1, 200, False)
    assert not peer.http.busy or peer.read()


# --- §6.9 flow control -----------------------------------------------------------------------------------------------


def test_no_more_goes_than_the_windows_allow(peer):
    peer.get(1)
    assert peer.body(1) == BODY[:65_535]
    assert peer.http.owes_work is False
    peer.send(window(0, 1_000))
    assert len(peer.body(1)) == 65_535
    peer.send(window(1, 500))
    assert len(peer.body(1)) == 66_035
    peer.send(window(1, 1 << 20), window(0, 1 << 20))
    assert peer.body(1) == BODY
    assert peer.ended(1)


@pytest.mark.parametrize("initial", [0, 1, 3, 255, 70_000])
def test_windows_of_any_size(initial):
    peer = RawPeer(lambda _: Response(200, [], [BODY[:2_000]], 2_000), settings={4: initial})
    peer.get(1)
    assert peer.body(1) == BODY[: min(initial, 2_000)]
    while not peer.ended(1):
        peer.send(window(1, 7))
    assert peer.body(1) == BODY[:2_000]
    assert all(frame.body_len <= max(initial, 7) for frame in peer.of(DataFrame))


def test_settings_change_the_windows_of_open_streams(peer):
    """§6.9.2, negative windows included."""
    peer.get(1)
    peer.send(setting(4, 1_000), window(0, 1 << 20))
    assert len(peer.body(1)) == 65_535
    peer.send(window(1, 64_000))
    assert len(peer.body(1)) == 65_535, "the window is still below zero"
    peer.send(window(1, 1_000))
    assert len(peer.body(1)) == 65_535 + 465
    peer.send(setting(4, 60_000))
    assert peer.body(1) == BODY


def test_a_window_that_overflows_ends_the_stream(peer):
    """§6.9.1."""
    peer.get(1)
    peer.send(window(1, (1 << 31) - 1))
    peer.send(window(1, (1 << 31) - 1))
    assert peer.reset(1) == Code.FLOW_CONTROL_ERROR
    assert peer.http.fault is None


def test_settings_that_overflow_a_window_end_the_connection(peer):
    peer.get(1)
    peer.send(window(1, (1 << 31) - 1 - 65_535))
    peer.send(window(1, 65_535))
    peer.send(setting(4, 1 << 20))
    assert_connection_ends(peer, Code.FLOW_CONTROL_ERROR)


def test_a_zero_increment_ends_stream_or_connection(peer):
    peer.get(1)
    peer.send(window(1, 0))
    ends_badly(peer, 1, Code.PROTOCOL_ERROR)


def test_an_empty_body_needs_no_window():
    peer = RawPeer(lambda _: Response(200, [], [b""], 0), settings={4: 0})
    peer.get(1)
    assert peer.ended(1)
    assert not peer.of(DataFrame)


@pytest.mark.parametrize("step", [1, 5, 9, 10, 100, 16_393, 20_000])
def test_nothing_stands_inside_a_frame(step):
    """Whatever happens while a frame is half sent: control frames wait for its end."""
    body = BODY[: 4_000 * min(step, 20)]
    peer = RawPeer(lambda _: Response(200, [], [body], len(body)), settings={4: 1 << 20})
    peer.send(window(0, 1 << 24))
    peer.reading = False
    for stream_id in range(1, 40, 2):
        peer.get(stream_id)
        peer.read(most=step * 3, step=step)
        peer.send(raw(PING, 0, 0, stream_id.to_bytes(8, "big")), setting(4, (1 << 20) + stream_id), window(stream_id, 5))
        if stream_id % 6 == 1:
            peer.send(raw(RST, 0, stream_id, bytes(4)))
    peer.read(step=step * 50)
    assert len(peer.of(PingFrame)) == 20
    for stream_id in range(1, 40, 2):
        if stream_id % 6 != 1:
            assert peer.body(stream_id) == body
            assert peer.ended(stream_id)


@pytest.mark.parametrize("size", [16_384, 20_000, 65_536, 1 << 20])
def test_frames_are_as_long_as_the_client_allows(size):
    peer = RawPeer(big, settings={4: 1 << 20, 5: size})
    peer.send(window(0, 1 << 20))
    peer.get(1)
    assert peer.body(1) == BODY
    assert max(frame.body_len for frame in peer.of(DataFrame)) == min(size, len(BODY))


def test_files_go_in_frames_like_bytes(tmp_path):
    (tmp_path / "file").write_bytes(BODY)
    file = OpenFile(os.open(tmp_path / "file", os.O_RDONLY), len(BODY), 0)
    body = lambda: [b"head", FileSlice(file, 5, 40_000), b"middle", FileSlice(file, 0, 1), FileSlice(file, 50_000, 50_000)]  # noqa: E731
    peer = RawPeer(lambda _: Response(200, [], body(), 90_011), settings={4: 1 << 20})
    peer.send(window(0, 1 << 20))
    peer.get(1)
    peer.reading = False
    peer.get(3)
    peer.read(step=777)
    expected = b"head" + BODY[5:40_005] + b"middle" + BODY[:1] + BODY[50_000:]
    assert peer.body(1) == peer.body(3) == expected
    assert file.holders == 1
    assert [ended.body_bytes for ended in peer.ended_responses] == [len(expected)] * 2


# --- §8 requests -----------------------------------------------------------------------------------------------------


def fields(*extra, **pseudo):
    return raw(HEADERS, 5, 1, block(*extra, **pseudo))


MALFORMED = {
    "upper-case name": fields(("X-Upper", "1")),
    "unknown pseudo-header": fields(unknown="1"),
    "pseudo-header of a response": fields(status="200"),
    "pseudo-header behind a field": raw(HEADERS, 5, 1, Encoder().encode([*GET[:3], ("x", "1"), GET[3]])),
    "repeated pseudo-header": raw(HEADERS, 5, 1, Encoder().encode([*GET, (":method", "GET")])),
    "connection": fields(("connection", "keep-alive")),
    "proxy-connection": fields(("proxy-connection", "keep-alive")),
    "keep-alive": fields(("keep-alive", "1")),
    "transfer-encoding": fields(("transfer-encoding", "chunked")),
    "upgrade": fields(("upgrade", "h2c")),
    "te": fields(("te", "gzip")),
    "empty path": fields(path=""),
    "no method": fields(method=None),
    "no scheme": fields(scheme=None),
    "no path": fields(path=None),
    "path that is none": fields(path="nope"),
    "asterisk with GET": fields(path="*"),
    "space in path": fields(path="/a b"),
    "CR in value": fields(("x", "a\rb")),
    "LF in value": fields(("x", "a\nb")),
    "NUL in value": fields(("x", "a\0b")),
    "NUL in path": fields(path="/\0"),
    "LF in path": fields(path="/\nx"),
    "white space around value": fields(("x", " a")),
    "CR in name": fields(("x\r", "a")),
    "colon in name": fields(("x:y", "a")),
    "empty name": fields(("", "a")),
    "method that is none": fields(method="GE T"),
    "host that differs": fields(("host", "other")),
    "two hosts": fields(("host", "localhost"), ("host", "localhost")),
    "userinfo": fields(authority="me@localhost"),
    "content-length without content": fields(("content-length", "5")),
    "content-length that is none": fields(("content-length", "+5")),
    "two content-lengths": fields(("content-length", "5"), ("content-length", "6")),
    "CONNECT with a path": fields(method="CONNECT"),
    "CONNECT without authority": fields(method="CONNECT", path=None, scheme=None, authority=None),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_requests_cost_the_stream_and_no_more(what):
    """§8.1.1."""
    peer = RawPeer(lambda found: Response(found.error.status, []) if isinstance(found, Refused) else big(found))
    peer.send(MALFORMED[what])
    assert peer.reset(1) == Code.PROTOCOL_ERROR
    assert not peer.of(HeadersFrame)
    assert peer.http.fault is None
    assert isinstance(peer.requests[0], Refused)
    assert peer.requests[0].error.status == 400
    (ended,) = peer.ended_responses
    assert (ended.status, ended.complete) == (400, False)
    peer.send(raw(HEADERS, 5, 3, block()))
    assert len(peer.body(3)) == 65_535


@pytest.mark.parametrize(
    ("frame", "status"),
    [
        (fields(authority=None), 400),
        (fields(authority="a b"), 400),
        (fields(("expect", "miracles")), 417),
        (fields(path="/" + "a" * 8_192), 414),
        (raw(HEADERS, 5, 1, Encoder().encode([*GET, *((f"x{n}", "1") for n in range(101))])), 431),
        (raw(HEADERS, 4, 1, block(("content-length", "65537"), method="POST")), 413),
    ],
)
def test_what_only_http_refuses_has_its_status(frame, status):
    peer = RawPeer(lambda found: Response(found.error.status, [], [b"why"], 3))
    peer.send(frame)
    assert peer.status(1) == str(status)
    assert peer.body(1) == b"why"


def test_a_header_list_beyond_32_kib_is_431_and_beyond_64_kib_the_end():
    peer = RawPeer(lambda found: Response(found.error.status, []))
    # An entry of nearly 4 KiB in the table, named again and again by one byte each.
    over = Encoder().encode([*request(), (b"x", b"\xfe" * 3_900)], huffman=False)
    peer.send(raw(HEADERS, 5, 1, over + b"\xbe" * 9))
    assert peer.status(1) == "431"
    peer.send(raw(HEADERS, 5, 3, b"\x82\x87\x84" + b"\xbe" * 20))
    assert_connection_ends(peer, Code.ENHANCE_YOUR_CALM)


def test_host_stands_in_for_authority():
    peer = RawPeer()
    peer.get(1, ("host", "example.org"), authority=None)
    peer.get(3, ("host", "LOCALHOST"))
    assert [found.host for found in peer.requests] == [b"example.org", b"localhost"]


def test_te_trailers_and_odd_but_right_fields_are_taken():
    peer = RawPeer()
    peer.get(
        1, ("te", "trailers"), ("x-empty", ""), ("x-high", "\xfe"), ("cookie", "a=1"), ("cookie", "b=2"), path="/a%20b?c=d&e"
    )
    (found,) = peer.requests
    assert found.target == b"/a%20b?c=d&e"
    assert found.version == "HTTP/2"
    assert peer.ended(1)


def test_options_of_everything():
    peer = RawPeer()
    peer.get(1, method="OPTIONS", path="*")
    assert peer.requests[0].target == b"*"


@pytest.mark.parametrize(
    "frames",
    [
        [raw(DATA, 1, 1, b"four")],
        [raw(DATA, 0, 1, b"fi"), raw(DATA, 1, 1, b"ve66")],
        [raw(DATA, 0, 1, b"more than five")],
        [raw(DATA, 0, 1, b"tr"), raw(HEADERS, 5, 1, b"\0\1x\1y")],
        [raw(DATA, 1, 1)],
    ],
)
def test_content_that_is_not_as_long_as_it_says_ends_the_stream(frames):
    peer = RawPeer(never)
    peer.send(raw(HEADERS, 4, 1, block(("content-length", "5"), method="POST")), *frames)
    assert peer.reset(1) == Code.PROTOCOL_ERROR
    assert peer.http.fault is None


def test_content_that_is_as_long_as_it_says_is_taken():
    peer = RawPeer(never)
    peer.send(
        raw(HEADERS, 4, 1, block(("content-length", "5"), method="POST")), raw(DATA, 0, 1, b"fi"), raw(DATA, 1, 1, b"ve!")
    )
    assert peer.reset(1) is None
    assert peer.http.fault is None


def test_trailers_are_read_over_and_pseudo_headers_in_them_refused():
    peer = RawPeer(never)
    peer.send(peer.headers(1, end=False), raw(DATA, 0, 1, b"x"), raw(HEADERS, 5, 1, b"\0\1x\1y"))
    assert peer.reset(1) is None
    peer.send(peer.headers(3, end=False), raw(HEADERS, 5, 3, b"\x82"))
    assert peer.reset(3) == Code.PROTOCOL_ERROR


def test_content_nobody_wants_is_stopped_behind_the_answer():
    """§8.1: RST_STREAM with NO_ERROR behind a whole response."""
    peer = RawPeer(lambda _: Response(405, [], [b"no"], 2))
    peer.send(peer.headers(1, request(method="POST"), end=False), raw(DATA, 0, 1, bytes(1_000)))
    assert peer.status(1) == "405"
    assert peer.ended(1)
    assert peer.reset(1) == Code.NO_ERROR
    peer.send(raw(DATA, 0, 1, bytes(16_384)))
    assert peer.http.fault is None


def test_content_without_end_is_stopped_while_the_answer_waits():
    peer = RawPeer(never)
    peer.send(peer.headers(1, end=False))
    for _ in range(5):
        peer.send(raw(DATA, 0, 1, bytes(16_384)))
    assert peer.reset(1) == Code.ENHANCE_YOUR_CALM
    assert peer.http.fault is None


def test_the_windows_of_content_are_given_back():
    peer = RawPeer(never)
    for stream_id in range(1, 41, 2):
        peer.send(peer.headers(stream_id, end=False), raw(DATA, 1, stream_id, bytes(16_000)))
    assert peer.http.fault is None
    assert sum(frame.window_increment for frame in peer.of(WindowUpdateFrame, 0)) > 200_000


def test_a_refused_head_request_gets_no_body_either():
    peer = RawPeer(lambda found: Response(found.error.status, [], [b"why"], 3))
    peer.get(1, method="HEAD", path="/" + "a" * 8_192)
    assert peer.status(1) == "414"
    assert peer.ended(1)
    assert not peer.of(DataFrame)


def test_what_is_queued_while_a_send_is_accounted_for_goes_with_the_next():
    """A response that ends while its request is open queues RST_STREAM behind what was offered."""
    peer = RawPeer(
        lambda found: Response(304, [], content_length=None) if found.stream_id % 4 == 1 else big(found), settings={4: 1 << 20}
    )
    peer.send(window(0, 1 << 24))
    peer.reading = False
    for stream_id in range(1, 60, 2):
        peer.send(peer.headers(stream_id, end=stream_id % 4 == 3))
    peer.read(step=70_000)
    for stream_id in range(1, 60, 2):
        assert peer.ended(stream_id)
        if stream_id % 4 == 1:
            assert peer.reset(stream_id) == Code.NO_ERROR
        else:
            assert peer.body(stream_id) == BODY


def test_a_connection_that_dies_inside_a_frame_lets_go_of_its_file(tmp_path):
    (tmp_path / "file").write_bytes(BODY)
    file = OpenFile(os.open(tmp_path / "file", os.O_RDONLY), len(BODY), 0)
    peer = RawPeer(lambda _: Response(200, [], [FileSlice(file, 0, len(BODY))], len(BODY)))
    peer.reading = False
    peer.get(1)
    peer.read(most=20_000)
    assert file.holders == 3
    peer.http.abandon()
    assert file.holders == 1


def test_a_client_that_never_answers_our_ping_is_told_the_last_stream_all_the_same():
    peer = RawPeer(max_requests=5)
    for stream_id in range(1, 401, 2):
        peer.get(stream_id)
        if peer.http.closing:
            break
    assert len(peer.requests) < 5 + engine.MAX_STREAMS + 2
    assert peer.http.closing
    assert peer.http.fault is None


def test_requests_behind_the_last_stream_do_not_end_a_running_download(peer):
    peer.send(window(0, 1 << 20))
    peer.get(1)
    peer.send(raw(GOAWAY, 0, 0, bytes(8)))
    for stream_id in range(3, 700, 2):
        peer.get(stream_id)
    peer.send(window(1, 1 << 20))
    assert peer.body(1) == BODY
    assert peer.http.fault is None


def test_a_head_request_gets_the_header_only():
    peer = RawPeer(big)
    peer.get(1, method="HEAD")
    assert peer.ended(1)
    assert not peer.of(DataFrame)
    assert dict(peer.decoder.decode(peer.of(HeadersFrame)[0].data))["content-length"] == str(len(BODY))


def test_a_header_longer_than_a_frame_goes_on_in_continuation():
    peer = RawPeer(lambda _: Response(200, [(b"X-Long", b"a" * 40_000)], [b"x"], 1))
    peer.decoder.max_header_list_size = 1 << 20
    peer.get(1)
    assert len(peer.of(ContinuationFrame)) == 2
    assert [type(frame).__name__ for frame in peer.got if frame.stream_id == 1][-1] == "DataFrame"


def test_the_first_header_takes_the_table_away():
    peer = RawPeer()
    peer.get(1)
    peer.get(3)
    first, second = (frame.data for frame in peer.of(HeadersFrame))
    assert first[:1] == b"\x20"
    assert second == first[1:]


def test_push_is_never_spoken(peer):
    peer.get(1)
    assert not peer.of(PushPromiseFrame)


# --- §6.8 the end ----------------------------------------------------------------------------------------------------


def test_a_drain_tells_twice_and_answers_what_was_on_its_way(peer):
    peer.send(window(0, 1 << 20))
    peer.get(1)
    peer.http.drain()
    first, ping = [frame for frame in peer.read() if isinstance(frame, GoAwayFrame | PingFrame)]
    assert (first.last_stream_id, first.error_code) == ((1 << 31) - 1, 0)
    assert peer.http.leaving
    peer.get(3)  # it was on its way
    peer.send(raw(PING, 1, 0, ping.opaque_data))
    assert peer.goaway == (0, 3)
    assert not peer.http.leaving
    assert peer.get(5)[-1].error_code == Code.REFUSED_STREAM
    for stream_id in (1, 3):
        assert not peer.http.closing
        peer.send(window(stream_id, 1 << 20))
        assert peer.body(stream_id) == BODY
    assert peer.http.closing
    assert len(peer.of(GoAwayFrame)) == 2


def test_a_drain_of_an_idle_connection_ends_when_its_client_has_heard(peer):
    peer.http.drain()
    peer.http.drain()
    peer.read()
    assert not peer.http.closing
    peer.send(raw(PING, 1, 0, peer.of(PingFrame)[-1].opaque_data))
    assert peer.http.closing
    assert len(peer.of(GoAwayFrame)) == 2


def test_a_drain_whose_ping_is_never_answered_ends_all_the_same(peer):
    peer.http.drain()
    peer.read()
    peer.http.end_of_input()  # what the deadline does
    peer.read()
    assert peer.http.closing
    assert peer.goaway == (0, 0)


def test_a_client_that_leaves_gets_what_it_asked_for(peer):
    peer.send(window(0, 1 << 20))
    peer.get(1)
    peer.send(raw(GOAWAY, 0, 0, bytes(8)))
    assert not peer.http.closing
    peer.send(window(1, 1 << 20))
    assert peer.body(1) == BODY
    assert peer.http.closing


def test_after_so_many_requests_the_connection_drains():
    peer = RawPeer(max_requests=3)
    for stream_id in (1, 3, 5):
        peer.get(stream_id)
    assert peer.http.leaving
    assert peer.ended(5)


def test_an_error_ends_in_goaway_behind_the_frame_that_has_begun(peer):
    peer.reading = False
    peer.get(1)
    peer.read(most=3_000)
    peer.send(window(0, 0))
    peer.read()
    assert len(peer.got[-2].data) == 16_384
    assert_connection_ends(peer, Code.PROTOCOL_ERROR)
    assert peer.http.abandon() == []
    (ended,) = peer.ended_responses
    assert not ended.complete
    assert 0 < ended.body_bytes <= 16_384


def test_a_client_that_ends_its_direction_gets_what_its_windows_allow(peer):
    peer.get(1)
    peer.http.end_of_input()
    peer.read()
    assert peer.http.closing  # the rest would need a WINDOW_UPDATE that can't come
    whole = RawPeer(big, settings={4: 1 << 20})
    whole.send(window(0, 1 << 20))
    whole.reading = False
    whole.get(1)
    whole.http.end_of_input()
    assert not whole.http.closing
    whole.read()
    assert whole.body(1) == BODY
    assert whole.http.closing


# --- §10.5 floods ----------------------------------------------------------------------------------------------------


def flooded(peer, frames, count, *, code=Code.ENHANCE_YOUR_CALM):
    """Send until the connection ends; return how many it took."""
    for number in range(count):
        if peer.http.fault is not None:
            assert Code[peer.http.fault.code] is code
            peer.read()
            assert peer.goaway[0] == code
            return number
        peer.send(frames(number))
    raise AssertionError(f"{count} of them did no harm")


@pytest.mark.parametrize(
    "frame",
    [
        raw(PING, 0, 0, bytes(8)),
        setting(4, 65_535),
        raw(PRIORITY, 0, 1, b"\0\0\0\3\1"),
        raw(0x10, 0, 0, b"\0\0\0\1u=1"),
        raw(0x77, 0, 0, b"?"),
        window(0, 1),
        raw(SETTINGS, 1, 0),
        raw(GOAWAY, 0, 0, bytes(8)),
    ],
)
def test_a_flood_of_frames_that_ask_for_nothing(frame):
    assert 500 < flooded(RawPeer(never), lambda _: frame, 3_000) < 2_100


def test_a_flood_of_empty_data():
    peer = RawPeer(never)
    peer.send(peer.headers(1, end=False))
    flooded(peer, lambda _: raw(DATA, 0, 1), 3_000)


def test_rapid_reset():
    """CVE-2023-44487."""
    peer = RawPeer(never)
    assert flooded(peer, lambda n: peer.headers(2 * n + 1) + raw(RST, 0, 2 * n + 1, b"\0\0\0\x08"), 500) < 300
    assert len(peer.requests) < 300


@pytest.mark.parametrize("fault", ["overflow", "malformed", "length", "refused"])
def test_made_you_reset(fault):
    """CVE-2025-8671: the client makes us reset the stream."""
    peer = RawPeer(never if fault != "malformed" else lambda _: Response(400, []))

    def frames(number):
        stream_id = 2 * number + 1
        return {
            "overflow": lambda: peer.headers(stream_id) + window(stream_id, (1 << 31) - 1),
            "malformed": lambda: peer.headers(stream_id, request(("bad name", ""))),
            "length": lambda: (
                peer.headers(stream_id, request(("content-length", "1")), end=False) + raw(DATA, 1, stream_id, b"xx")
            ),
            "refused": lambda: peer.headers(stream_id),
        }[fault]()

    assert flooded(peer, frames, 700) < 400


def test_cancelling_all_at_once_is_left_alone():
    peer = RawPeer(big)
    for _ in range(2):
        ids = range(peer.http._engine.highest_inbound_stream_id + 2 | 1, 10_000_000, 2)[: engine.MAX_STREAMS]
        for stream_id in ids:
            peer.get(stream_id)
        for stream_id in ids:
            peer.send(raw(RST, 0, stream_id, b"\0\0\0\x08"))
        peer.now += 5
    assert peer.http.fault is None


def test_uploads_that_are_answered_early_are_left_alone():
    """What was on its way when we reset the stream is ignored (§5.1), and its window given back."""
    peer = RawPeer(lambda _: Response(405, [], [b"no"], 2))
    for stream_id in range(1, 801, 2):
        peer.send(peer.headers(stream_id, request(method="POST"), end=False), *[raw(DATA, 0, stream_id, bytes(16_000))] * 4)
        assert len(peer.of(RstStreamFrame, stream_id)) == 1
    assert peer.http.fault is None
    peer.send(peer.headers(1_001, request(method="POST"), end=False), *[raw(DATA, 0, 1_001, bytes(100))] * 600)
    assert peer.http.fault is None


def test_padding_does_not_make_data_free():
    peer = RawPeer(never)
    peer.send(peer.headers(1, end=False))
    flooded(peer, lambda _: raw(DATA, PADDED, 1, b"\0"), 3_000)
    peer = RawPeer(never)
    peer.send(peer.headers(1, end=False))
    for _ in range(300):
        peer.send(raw(DATA, PADDED, 1, b"\xff" + bytes(256)))
    assert peer.reset(1) == Code.ENHANCE_YOUR_CALM


def test_a_ping_after_each_response_is_left_alone():
    peer = RawPeer()
    for stream_id in range(1, 6_001, 2):
        peer.get(stream_id)
        peer.send(raw(PING, 0, 0, bytes(8)))
        if stream_id % 101 == 0:
            peer.got.clear()
    assert peer.http.fault is None


def test_a_client_that_resets_again_with_every_frame_that_was_on_its_way_is_left_alone():
    """As h2's client side does."""
    peer = RawPeer(big, settings={4: 1 << 20})
    peer.send(window(0, 1 << 24))
    for stream_id in range(1, 100, 2):
        peer.get(stream_id)
        peer.send(*[raw(RST, 0, stream_id, b"\0\0\0\x08")] * 15)
    assert peer.http.fault is None


def test_data_for_streams_that_were_reset_is_not_answered_for_ever():
    peer = RawPeer(never)
    peer.send(peer.headers(1, end=False), raw(RST, 0, 1, bytes(4)))
    flooded(peer, lambda _: raw(DATA, 0, 1, b"x"), 500)


@pytest.mark.parametrize("piece", [b"", b"x" * 16_384])
def test_continuation_without_end(piece):
    """CVE-2024-27316."""
    peer = RawPeer(never)
    peer.send(raw(HEADERS, END_STREAM, 1, block()))
    assert flooded(peer, lambda _: raw(CONTINUATION, 0, 1, piece), 100) <= http2_input._MAX_CONTINUATIONS + 1


def test_a_window_of_slivers():
    """A client that takes a byte at a time."""
    peer = RawPeer(big, settings={4: 1})
    peer.get(1)
    assert flooded(peer, lambda _: window(1, 1), 3_000) < 1_100


def test_slow_but_honest_clients_are_left_alone():
    peer = RawPeer(big, settings={4: 1})
    peer.get(1)
    for _ in range(3_000):
        peer.now += 0.2
        peer.send(window(1, 1))
        peer.send(raw(PING, 0, 0, bytes(8)))
    assert peer.http.fault is None


def test_a_client_that_updates_its_windows_with_every_frame_is_left_alone():
    body = b"x" * 50_000_000
    peer = RawPeer(lambda _: Response(200, [], [memoryview(body)], len(body)))
    peer.get(1)
    while not peer.ended(1):
        got = [frame for frame in peer.got if isinstance(frame, DataFrame)]
        peer.got.clear()
        if any("END_STREAM" in frame.flags for frame in got):
            break
        for frame in got:
            peer.reading = False
            peer.send(window(0, len(frame.data)), window(1, len(frame.data)))
        peer.read()
        assert peer.http.fault is None


def test_a_stream_that_never_gets_a_window_is_given_up():
    """It holds a file open, and others on the connection may go on for ever."""
    peer = RawPeer(big, stall_timeout=60.0, settings={4: 0})
    peer.get(1)
    peer.get(3)
    for _ in range(70):
        peer.now += 1
        peer.send(window(3, 10), window(0, 10))
    assert peer.reset(1) == Code.CANCEL
    assert peer.reset(3) is None
    assert peer.http.fault is None


def test_a_stream_that_waits_its_turn_is_not_given_up():
    peer = prioritised("u=0", "u=7")
    peer.read(most=30_000, step=10_000)
    for _ in range(70):
        peer.now += 1
        peer.send(raw(PING, 0, 0, bytes(8)))
    assert peer.reset(3) is None


def test_answers_to_pings_are_no_progress():
    peer = RawPeer(big, settings={4: 0})
    peer.get(1)
    before = peer.http.progress
    peer.send(raw(PING, 0, 0, bytes(8)), setting(3, 5))
    assert peer.http.progress == before
    peer.send(window(1, 1))
    assert peer.http.progress > before


def test_answers_that_are_not_read_stop_the_reading():
    peer = RawPeer(never)
    peer.reading = False
    sent = 0
    while peer.http.wants_input and sent < 100_000:
        peer.now += 1
        peer.send(*[raw(PING, 0, 0, bytes(8))] * 20)
        sent += 20
    assert sent < 5_000
    peer.read()
    assert peer.http.wants_input


def test_memory_does_not_grow_with_requests():
    import tracemalloc

    peer = RawPeer(lambda _: Response(200, [(b"X", b"y")], [b"hello"], 5))

    def many(start, count):
        for stream_id in range(start, start + 2 * count, 2):
            peer.now += 0.1
            peer.get(stream_id)
        peer.got.clear()
        peer.requests.clear()
        peer.ended_responses.clear()

    many(1, 2_000)
    tracemalloc.start()
    many(10_001, 2_000)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 100_000
    assert len(peer.http._engine.streams) <= 1


# --- priorities, RFC 9218 --------------------------------------------------------------------------------------------


def served(peer, *, rounds=1 << 20):
    """Stream numbers of DATA in the order they came."""
    peer.reading = True
    peer.read()
    return [frame.stream_id for frame in peer.of(DataFrame)]


def prioritised(*values):
    peer = RawPeer(big, settings={4: 1 << 20})
    peer.send(window(0, 1 << 30))
    peer.reading = False
    for number, value in enumerate(values):
        peer.get(2 * number + 1, *([("priority", value)] if value is not None else []))
    return peer


def test_urgency_orders():
    order = served(prioritised("u=5", "u=1", "u=3", "u=0"))
    assert list(dict.fromkeys(order)) == [7, 3, 5, 1]
    assert order == sorted(order, key=[7, 3, 5, 1].index), "one after the other"


def test_responses_that_are_not_incremental_go_one_after_the_other():
    order = served(prioritised("u=3", "u=3", "u=3"))
    assert order == sorted(order)


def test_incremental_responses_share():
    order = served(prioritised("i", "i", "i"))
    assert set(order[:15]) == {1, 3, 5}


def test_who_says_nothing_shares():
    order = served(prioritised(None, None, None))
    assert set(order[:15]) == {1, 3, 5}


def test_a_priority_update_counts_at_once():
    peer = prioritised("u=3", "u=3")
    peer.read(most=30_000, step=10_000)
    peer.send(raw(0x10, 0, 0, b"\0\0\0\3u=0"))
    order = served(peer)
    assert order[:2] == [1, 1]
    assert order[2:9] == [3] * 7


def test_a_priority_update_may_come_before_its_request():
    peer = RawPeer(big, settings={4: 1 << 20})
    peer.send(window(0, 1 << 30), raw(0x10, 0, 0, b"\0\0\0\3u=0"))
    peer.reading = False
    peer.get(1, ("priority", "u=1"))
    peer.get(3, ("priority", "u=7"))
    assert served(peer)[0] == 3, "the update wins over the field"


def test_updates_for_requests_that_never_come_are_bounded():
    peer = RawPeer(never)
    for number in range(900):
        peer.send(raw(0x10, 0, 0, (2 * number + 1).to_bytes(4, "big") + b"u=0"))
    assert len(peer.http._early) <= engine.MAX_STREAMS


def test_a_stream_without_window_holds_nobody_up():
    peer = prioritised("u=0")
    peer.send(setting(4, 100))
    peer.get(3, ("priority", "u=7"))
    peer.send(setting(4, 0), window(3, 1 << 20))
    assert set(served(peer)) == {3}


def test_a_stream_that_was_paused_takes_nothing_from_the_others():
    """Neither does it give newcomers a start, nor has it everything when it comes back."""
    peer = RawPeer(lambda _: Response(200, [], [memoryview(b"x" * 8_000_000)], 8_000_000), settings={4: 0})
    peer.send(window(0, 1 << 30))
    peer.reading = False
    peer.get(1)
    peer.get(3)
    peer.send(window(3, 1 << 28))
    peer.read(most=4_000_000, step=100_000)
    peer.get(5)
    peer.send(window(5, 1 << 28))
    before = len(peer.of(DataFrame))
    peer.read(most=3_000_000, step=100_000)
    order = [frame.stream_id for frame in peer.of(DataFrame)][before:]
    assert 0.6 < order.count(3) / order.count(5) < 1.6
    before = len(peer.of(DataFrame))
    peer.send(window(1, 1 << 28))
    peer.read(most=3_000_000, step=100_000)
    order = [frame.stream_id for frame in peer.of(DataFrame)][before:]
    assert all(40 < order.count(stream_id) < 90 for stream_id in (1, 3, 5))


def test_a_newcomer_is_served_along_with_the_long():
    peer = RawPeer(lambda found: Response(200, [], [BODY * 20], 2_000_000), settings={4: 1 << 30})
    peer.send(window(0, 1 << 30))
    peer.reading = False
    peer.get(1)
    peer.read(most=1_000_000, step=50_000)
    before = len(peer.of(DataFrame))
    peer.get(3)
    order = served(peer)
    both = order[before : len(order) - order[::-1].index(1)]  # until the first is done
    assert abs(both.count(1) - both.count(3)) <= 33  # frames of one share


# --- bodies that are made ------------------------------------------------------------------------------------------


class Source:
    def __init__(self, *pieces):
        self.pieces = list(pieces)
        self.closed = False

    def __next__(self):
        if not self.pieces:
            raise StopIteration
        return self.pieces.pop(0)

    def close(self):
        self.closed = True


def test_a_body_that_is_made_piece_by_piece():
    source = Source(b"one", b"", b"", b"two" * 10_000, b"")
    peer = RawPeer(lambda _: Response(200, [], [b"zero"], None, stream=source))
    peer.get(1)
    turns = 0
    while not peer.ended(1):
        assert peer.http.working
        peer.read()
        turns += 1
    assert peer.body(1) == b"zeroone" + b"two" * 10_000
    assert source.closed
    assert turns >= 3
    assert not peer.http.busy


def test_a_body_that_is_made_waits_for_its_window():
    source = Source(*[b"x" * 10_000] * 20)
    peer = RawPeer(lambda _: Response(200, [], [], None, stream=source))
    peer.get(1)
    assert not peer.http.working
    assert len(source.pieces) >= 12, "nothing is made that can't go"
    peer.send(raw(RST, 0, 1, bytes(4)))
    assert source.closed


def test_a_body_that_is_as_long_as_the_window_ends():
    """An empty DATA frame with END_STREAM needs no window (§6.9)."""
    peer = RawPeer(lambda _: Response(200, [], [], None, stream=Source(b"x" * 65_535)))
    peer.get(1)
    assert len(peer.body(1)) == 65_535
    assert peer.ended(1)


def test_a_body_that_is_made_for_a_client_that_left_is_not_waited_for():
    peer = RawPeer(
        lambda found: (
            Response(200, [], [], None, stream=Source(b"", *[b"x" * 40_000] * 9)) if found.stream_id == 3 else big(found)
        )
    )
    peer.get(1)
    peer.get(3)
    assert not peer.http.working, "there is no window"
    assert not peer.http.owes_work
    peer.http.end_of_input()
    peer.read()
    assert peer.http.closing


# --- files that fail -------------------------------------------------------------------------------------------------


def test_a_file_that_fails_costs_its_stream_only():
    peer = RawPeer(big)
    peer.reading = False
    peer.get(1)
    peer.get(3)
    peer.read(most=len(b"".join(bytes(s) for s in list(peer.http.next_output(1))[:3])))
    peer.http.next_output(1 << 20)
    assert peer.http.file_failed()
    peer.read()
    assert peer.reset(1) == Code.INTERNAL_ERROR
    assert peer.body(3)
    assert peer.http.fault is None


def test_a_file_that_fails_inside_a_frame_costs_the_connection():
    peer = RawPeer(big)
    peer.reading = False
    peer.get(1)
    peer.read(most=5_000)
    peer.http.next_output(1 << 20)
    assert not peer.http.file_failed()


def test_rst_frames_of_ours_are_well_formed():
    frame = RstStreamFrame(1)
    frame.error_code = 2
    peer = RawPeer(big)
    peer.get(1, ("X", "bad"))
    (got,) = peer.of(RstStreamFrame)
    assert got.body_len == 4
    assert PriorityFrame is not type(got)
