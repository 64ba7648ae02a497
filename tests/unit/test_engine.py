"""The ways round h2 leave the same state as h2's own methods, and the same bytes, in every sequence."""

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import H2Error, InvalidSettingsValueError
from h2.settings import SettingCodes, Settings
from h2.stream import StreamClosedBy
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from ktlsd.protocol.engine import DATA, END_STREAM, MAX_HEADER_LIST, MAX_STREAMS, Engine, frame_header
from ktlsd.protocol.h2_parts import ClosedStreams, OurSettings, PeerSettings
from ktlsd.protocol.header_blocks import block_of
from ktlsd.protocol.messages import Response
from tests.h2peer import GET, PREFACE, raw

FIELDS = [*GET, ("x-custom", "value")]


class Reference(H2Connection):
    """h2 as it is, in a server that has our limits."""

    MAX_CLOSED_STREAMS = 256

    def __init__(self):
        what = dict.fromkeys(("inbound_headers", "outbound_headers"), False)
        checks = {f"{verb}_{name}": value for name, value in what.items() for verb in ("validate", "normalize")}
        super().__init__(H2Configuration(client_side=False, header_encoding=None, **checks))
        self.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST,
                9: 1,
            },
        )
        self.decoder.max_header_list_size = 65_536

    @property
    def open_inbound_streams(self):
        return 0

    forget = Engine.forget


KINDS = {
    StreamClosedBy.SEND_END_STREAM: "ended",
    StreamClosedBy.RECV_END_STREAM: "ended",
    StreamClosedBy.SEND_RST_STREAM: "reset",
    StreamClosedBy.RECV_RST_STREAM: "reset",
}


def closed(engine):
    """How each of the streams so far ended; to h2 it is the same whose END_STREAM or RST_STREAM it was."""
    ids = range(1, engine.highest_inbound_stream_id + 2)
    return {at: KINDS.get(engine._closed_streams.get(at)) for at in ids}


def state(value, seen=frozenset()):
    """Everything an object knows, as comparable values; what is never used here (the encoder) left out."""
    if isinstance(value, Settings):
        return {code: value[code] for code in Settings()}  # the others are only for who opens streams
    if isinstance(value, dict):
        return {key: state(item, seen) for key, item in value.items()}
    if isinstance(value, list | tuple) or type(value).__name__ == "deque":
        return [state(item, seen) for item in value]
    if type(value).__module__.startswith(("h2", "hpack", "hyperframe", "ktlsd", "tests")) and hasattr(value, "__dict__"):
        if id(value) in seen:
            return "seen"
        left_out = ("encoder", "config", "_data_to_send", "_frame_dispatch_table", "incoming_buffer", "_closed_streams")
        inner = {key: state(item, seen | {id(value)}) for key, item in vars(value).items() if key not in left_out}
        return inner | {"closed": closed(value)} if isinstance(value, H2Connection) else inner
    return repr(value)


def pair(initial_window=None, frame_size=None, *, theirs=Reference):
    """h2 and ours, which have heard the same."""
    made = []
    said = b"".join(
        code.to_bytes(2, "big") + value.to_bytes(4, "big")
        for code, value in ((4, initial_window), (5, frame_size))
        if value is not None
    )
    for kind in (theirs, Engine):
        engine = kind()
        engine.initiate_connection()
        engine.receive_data(PREFACE + raw(4, 0, 0, said))
        made.append(engine)
    assert made[0].data_to_send() == made[1].data_to_send()
    return made


def open_streams(engines, count):
    theirs, ours = engines
    for number in range(count):
        for engine in engines:
            engine.receive_data(raw(1, 5, 2 * number + 1, Encoder().encode(FIELDS)))
        theirs.send_headers(2 * number + 1, [(":status", "200")])
        ours.send_response(2 * number + 1, b"\x88", end_stream=False)
        theirs.data_to_send()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("data"), st.sampled_from([1, 3, 5, 7]), st.integers(0, 70_000), st.booleans()),
        st.tuples(st.just("window"), st.sampled_from([0, 1, 3, 5]), st.integers(1, 100_000), st.none()),
        st.tuples(st.just("initial"), st.just(0), st.integers(0, 200_000), st.none()),
        st.tuples(st.just("reset"), st.sampled_from([1, 3, 5]), st.none(), st.none()),
    ),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(
    operations=OPERATIONS,
    initial=st.sampled_from([None, 0, 1, 1000, 200_000]),
    size=st.sampled_from([None, 16_384, 20_000, 100_000]),
)
def test_charging_data_leaves_the_state_and_the_frames_of_send_data(operations, initial, size):
    theirs, ours = pair(initial, size)
    open_streams([theirs, ours], 3)
    for kind, stream_id, number, flag in operations:
        if kind == "data":
            results = []
            for engine in (theirs, ours):
                try:
                    if engine is theirs:
                        engine.send_data(stream_id, b"x" * number, end_stream=flag)
                        results.append(engine.data_to_send())
                    else:
                        engine.charge_data(stream_id, number, largest=number, end_stream=flag)
                        header = frame_header(number, DATA, END_STREAM if flag else 0, stream_id)
                        results.append(header + b"x" * number)
                except (H2Error, KeyError) as exc:
                    results.append(type(exc))
            assert results[0] == results[1]
        else:
            frame = {
                "window": lambda: raw(8, 0, stream_id, number.to_bytes(4, "big")),  # noqa: B023
                "initial": lambda: raw(4, 0, 0, b"\0\4" + number.to_bytes(4, "big")),  # noqa: B023
                "reset": lambda: raw(3, 0, stream_id, bytes(4)),  # noqa: B023
            }[kind]()
            for engine in (theirs, ours):
                try:
                    engine.receive_data(frame)
                except H2Error:
                    return
                engine.data_to_send()
        assert state(theirs) == state(ours)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 16_384), min_size=1, max_size=20), end=st.booleans())
def test_charging_a_run_of_frames_is_charging_each(sizes, end):
    theirs, ours = pair(1 << 20)
    for engine in (theirs, ours):
        engine.receive_data(raw(8, 0, 0, (1 << 20).to_bytes(4, "big")))
    open_streams([theirs, ours], 1)
    for number, size in enumerate(sizes):
        theirs.send_data(1, b"x" * size, end_stream=end and number == len(sizes) - 1)
    ours.charge_data(1, sum(sizes), largest=max(sizes), end_stream=end)
    assert state(theirs) == state(ours)


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.integers(0, 12), max_size=6), end=st.booleans(), size=st.sampled_from([None, 20_000]),
    extra=st.lists(st.tuples(st.sampled_from(["x-a", "cookie", "accept"]), st.text("abc", max_size=9)), max_size=5),
)  # fmt: skip
def test_a_plain_request_leaves_the_state_of_receive_data(ids, end, size, extra):
    theirs, ours = pair(None, size)
    encoder = Encoder()
    for stream_id in ids:
        block = encoder.encode([*FIELDS, *extra])
        if not ours.takes_request(stream_id):
            return
        events = theirs.receive_data(raw(1, 5 if end else 4, stream_id, block))
        headers = ours.receive_request(stream_id, block, end_stream=end)
        assert [tuple(field) for field in events[0].headers] == [tuple(field) for field in headers]
        theirs.open_inbound_streams  # noqa: B018  # h2 looks for closed streams whenever HEADERS come
        ours.open_inbound_streams  # noqa: B018
        assert state(theirs) == state(ours)


@pytest.mark.parametrize("length", [10, 16_384, 16_385, 50_000])
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("open_request", [True, False])
def test_a_response_header_leaves_the_state_of_send_headers(length, end, open_request):
    theirs, ours = pair()
    for engine in (theirs, ours):
        engine.receive_data(raw(1, 4 if open_request else 5, 1, Encoder().encode(FIELDS)))
        engine.data_to_send()
    response = Response(200, [(b"X-Long", b"\xfe" * length)], content_length=None)
    block = block_of(response)
    out = ours.send_response(1, block, end_stream=end)
    theirs.send_headers(1, [(b":status", b"200"), (b"x-long", b"\xfe" * length)], end_stream=end)
    expected = theirs.data_to_send()
    assert state(theirs) == state(ours)

    def frames(data):
        found, at = [], 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 3], "big")
            found.append((data[at + 3], data[at + 4], data[at + 9 : at + 9 + size]))
            at += 9 + size
        return found

    mine, h2s = frames(out), frames(expected)
    assert [frame[:2] for frame in mine][:1] == [frame[:2] for frame in h2s][:1] or len(mine) != len(h2s)
    assert mine[-1][1] & 4
    assert not any(flags & 4 for _, flags, _ in mine[:-1])
    assert all(len(payload) <= 16_384 for _, _, payload in mine)
    fields = (
        [tuple(field) for field in Decoder().decode(b"".join(payload for _, _, payload in mine), raw=True)]
        if length < 20_000
        else None
    )
    assert fields in (None, [(b":status", b"200"), (b"x-long", b"\xfe" * length)])


def test_h2_without_us_is_h2():
    """What `Engine` changes is the limit on streams, and how h2 finds who handles a frame: no more."""
    changed = {name for name in vars(Engine) if not name.startswith("__") and hasattr(H2Connection, name)}
    assert changed == {"open_inbound_streams"}
    assert {name for name in vars(Engine) if name in vars(H2Connection())} == {"_frame_dispatch_table"}


FRAMES = st.lists(
    st.one_of(
        st.tuples(st.just(4), st.just(0), st.just(0), st.lists(
            st.tuples(
                st.integers(0, 12) | st.integers(0, 65_535),
                st.sampled_from([0, 1, 2, 100, 16_384, 70_000, 1 << 24, 1 << 31]),
            ),
            max_size=4,
        ).map(lambda said: b"".join(code.to_bytes(2, "big") + value.to_bytes(4, "big") for code, value in said))),
        st.tuples(st.just(4), st.just(1), st.just(0), st.just(b"")),
        st.tuples(st.just(1), st.sampled_from([4, 5]), st.integers(0, 15), st.just(Encoder().encode(FIELDS))),
        st.tuples(st.just(0), st.sampled_from([0, 1]), st.integers(0, 15), st.just(b"data")),
        st.tuples(st.just(3), st.just(0), st.integers(0, 15), st.just(bytes(4))),
        st.tuples(st.just(8), st.just(0), st.integers(0, 15), st.sampled_from([bytes(4), b"\0\0\1\0", b"\x7f\xff\xff\xff"])),
        st.tuples(st.just(6), st.just(0), st.just(0), st.just(b"12345678")),
        st.tuples(st.just("answer"), st.just(0), st.integers(0, 15), st.booleans()),
        st.tuples(st.just("reset"), st.just(0), st.integers(0, 15), st.just(b"")),
        st.tuples(st.just("forget"), st.just(0), st.just(0), st.just(b"")),
    ),
    max_size=25,
)  # fmt: skip


def done(engine, kind, flags, stream_id, payload):
    """What an engine says to one step."""
    if kind in ("answer", "reset") and stream_id not in engine.streams:
        pass
    elif kind == "answer":
        if isinstance(engine, Engine):
            engine._data_to_send += engine.send_response(stream_id, b"\x88", end_stream=payload)
        else:
            engine.send_headers(stream_id, [(":status", "200")], end_stream=payload)
    elif kind == "reset":
        engine.reset_stream(stream_id, ErrorCodes.CANCEL)
    elif kind == "forget":
        for each in list(engine.streams):
            engine.forget(each)
    else:
        return [type(event).__name__ for event in engine.receive_data(raw(kind, flags, stream_id, payload))]
    return []


@settings(max_examples=500, deadline=None)
@given(steps=FRAMES)
def test_what_is_kept_in_less_memory_is_what_h2_keeps(steps):
    """Settings, the table, how streams ended: the same events, errors, frames and state, whatever comes."""
    theirs, ours = pair()
    for step in steps:
        results = []
        for engine in (theirs, ours):
            try:
                results.append((done(engine, *step), None))
            except (H2Error, KeyError) as exc:
                results.append((type(exc), getattr(exc, "error_code", None)))
            results[-1] += (engine.data_to_send(),)
        assert results[0] == results[1]
        if isinstance(results[0][0], type):
            return
        assert state(theirs) == state(ours)


def test_settings_that_nobody_knows_are_not_kept():
    engine = Engine()
    engine.initiate_connection()
    engine.receive_data(PREFACE + raw(4, 0, 0, b""))
    for first in range(10, 65_000, 1_000):
        engine.receive_data(
            raw(4, 0, 0, b"".join(code.to_bytes(2, "big") + b"\0\0\0\1" for code in range(first, first + 1_000)))
        )
    assert engine.remote_settings._said == {}
    assert dict(engine.remote_settings) == dict(PeerSettings())


def test_our_settings_are_shared_and_can_not_be_changed():
    assert Engine().local_settings is Engine().local_settings
    with pytest.raises(TypeError):
        OurSettings()[SettingCodes.MAX_FRAME_SIZE] = 20_000


def test_a_setting_that_is_not_allowed_changes_nothing():
    said = PeerSettings()
    with pytest.raises(InvalidSettingsValueError):
        said[SettingCodes.MAX_FRAME_SIZE] = 1
    assert said.acknowledge() == {}
    assert list(said) == list(Settings(client=True))
    assert len(said) == len(list(said))


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 60).map(lambda number: 2 * number + 1), max_size=80))
def test_ranges_of_ended_streams_hold_what_was_put_in(ids):
    kept, expected = ClosedStreams(), set()
    for stream_id in ids:
        kept.ended(stream_id)
        expected.add(stream_id)
        assert {at for at in range(124) if at in kept} == expected
        ranges = kept._ended
        assert ranges == sorted(ranges)
        assert all(last + 2 < first for last, first in zip(ranges[1::2], ranges[2::2], strict=False))


def test_what_is_remembered_of_closed_streams_has_an_end():
    kept = ClosedStreams()
    for number in range(1_000):
        kept[6 * number + 1] = StreamClosedBy.SEND_END_STREAM
        kept[6 * number + 3] = StreamClosedBy.RECV_RST_STREAM
        kept[6 * number + 5] = None
    assert len(kept._ended) == 128
    assert len(kept._resets) == 256
    assert kept[5995] is StreamClosedBy.SEND_END_STREAM
    assert kept[5997] is StreamClosedBy.RECV_RST_STREAM
    assert [kept[at] for at in (1, 3, 5, 5999)] == [None] * 4


@settings(max_examples=200, deadline=None)
@given(
    status=st.sampled_from([200, 206, 304, 404, 416, 431, 503]),
    fields=st.lists(
        st.tuples(
            st.sampled_from([b"Date", b"X-Own", b"ETag", b"Vary", b"Content-Range"])
            | st.from_regex(rb"[A-Za-z][A-Za-z0-9-]{0,200}", fullmatch=True),
            st.binary(max_size=400),
        ),
        max_size=8,
    ),
    length=st.none() | st.integers(0, 1 << 62),
)
def test_a_header_block_decodes_to_the_fields_it_was_made_of(status, fields, length):
    decoded = Decoder()
    decoded.max_header_list_size = 1 << 20
    found = [tuple(field) for field in decoded.decode(block_of(Response(status, fields, content_length=length)), raw=True)]
    expected = [(b":status", b"%d" % status), *((name.lower(), value) for name, value in fields)]
    if length is not None:
        expected.append((b"content-length", b"%d" % length))
    assert found == expected
    assert not decoded.header_table.dynamic_entries


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(1, 90), max_size=5), size=st.integers(0, 500), credit=st.integers(0, 5_000))
def test_an_exchange_is_a_request_and_its_answer(counts, size, credit):
    theirs, ours = pair(theirs=Engine)
    for engine in (theirs, ours):
        engine.receive_data(raw(8, 0, 0, (1 << 20).to_bytes(4, "big")))
        engine.receive_data(raw(1, 5, 1, Encoder().encode(FIELDS)))  # what comes first takes the long way
        engine.send_response(1, b"\x88", end_stream=True)
        engine.forget(1)
    next_id = 3
    for count in counts:
        ids = range(next_id, next_id + 2 * count, 2)
        next_id += 2 * count
        if credit:
            theirs.receive_data(raw(8, 0, 0, credit.to_bytes(4, "big")))
        for stream_id in ids:
            theirs.receive_request(stream_id, b"\x82\x84\x87", end_stream=True)
            theirs.send_response(stream_id, b"\x88", end_stream=not size)
            if size:
                theirs.charge_data(stream_id, size, largest=size, end_stream=True)
            theirs.forget(stream_id)
        ours.exchange(ids, size * count, credit)
        assert state(theirs) == state(ours)
