"""The ways round h2 leave the same state as h2's own methods, and the same bytes, in every sequence."""

import pytest
from h2.connection import H2Connection
from h2.exceptions import H2Error
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from ktlsd.protocol.engine import DATA, END_STREAM, Engine, frame_header
from ktlsd.protocol.header_blocks import block_of
from ktlsd.protocol.messages import Response
from tests.h2peer import GET, PREFACE, raw

FIELDS = [*GET, ("x-custom", "value")]


def state(value, seen=frozenset()):
    """Everything an object knows, as comparable values; what is never used here (the encoder) left out."""
    if isinstance(value, dict):
        return {key: state(item, seen) for key, item in value.items()}
    if isinstance(value, list | tuple) or type(value).__name__ == "deque":
        return [state(item, seen) for item in value]
    if type(value).__module__.startswith(("h2", "hpack", "hyperframe", "ktlsd")) and hasattr(value, "__dict__"):
        if id(value) in seen:
            return "seen"
        inner = {key: state(item, seen | {id(value)}) for key, item in vars(value).items()}
        for left_out in ("encoder", "config", "_data_to_send", "_frame_dispatch_table", "incoming_buffer"):
            inner.pop(left_out, None)
        return inner
    return repr(value)


def pair(initial_window=None, frame_size=None):
    """Two engines that have heard the same."""
    made = []
    said = b"".join(
        code.to_bytes(2, "big") + value.to_bytes(4, "big")
        for code, value in ((4, initial_window), (5, frame_size))
        if value is not None
    )
    for _ in range(2):
        engine = Engine()
        engine.initiate_connection()
        engine.receive_data(PREFACE + raw(4, 0, 0, said))
        engine.data_to_send()
        made.append(engine)
    return made


def open_streams(engines, count):
    for number in range(count):
        for engine in engines:
            engine.receive_data(raw(1, 5, 2 * number + 1, Encoder().encode(FIELDS)))
            engine.send_headers(2 * number + 1, [(":status", "200")])
            engine.data_to_send()


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
    """What `Engine` changes is the limit on streams, and how many closed ones are remembered: no more."""
    changed = {name for name in vars(Engine) if not name.startswith("__") and hasattr(H2Connection, name)}
    assert changed == {"MAX_CLOSED_STREAMS", "open_inbound_streams"}


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
    theirs, ours = pair()
    for engine in (theirs, ours):
        engine.receive_data(raw(8, 0, 0, (1 << 20).to_bytes(4, "big")))
        engine.receive_data(raw(1, 5, 1, Encoder().encode(FIELDS)))  # what comes first takes the long way
        engine.send_headers(1, [(":status", "200")], end_stream=True)
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
