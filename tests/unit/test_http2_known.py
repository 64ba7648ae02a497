"""HTTP/2's short way says and leaves what the long way would, whatever comes before, with it and behind it."""

import copy
import os

import pytest
from hpack import Decoder, Encoder
from hyperframe.frame import DataFrame, HeadersFrame, PingFrame
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ktlsd.protocol import header_blocks, http2_fields
from ktlsd.protocol.header_blocks import block_of, decode_block, peek_block
from ktlsd.protocol.http2_known import prepare
from ktlsd.protocol.messages import Request, Response
from tests.h2peer import RawPeer, raw, request
from tests.unit.test_engine import state
from tests.unit.test_header_blocks import FIELDS

BODIES = {b"/empty": b"", b"/small": b"small" * 20, b"/frame": b"f" * 16_384, b"/large": b"l" * 40_000}


def answer(found):
    if not isinstance(found, Request):
        return Response(400, [(b"Server", b"x")], [b"bad"], 3)
    body = BODIES.get(found.target, b"unknown")
    return Response(200, [(b"Server", b"x")], [body] if body else [], len(body))


class Peer(RawPeer):
    """With `short`, it is served by the short way wherever that may be taken."""

    def __init__(self, *, short, **options):
        self.short = 0
        self._may = False
        super().__init__(answer, **options)
        self._may = short
        self.by_fields = {}

    def send(self, *data):
        whole = b"".join(item if isinstance(item, bytes) else item.serialize() for item in data)
        if self._may and self.http.at_rest:
            before = state(self.http._engine)
            asked = self.http.known.read(whole)
            if asked is not None:
                found = [self.by_fields.get(fields) for fields in asked.fields]
                if None not in found:
                    sizes = [len(body) for body in found]
                    frames = [prepare(block_of(answer_of(body)), body) for body in found]
                    out = self.http.known.write(asked, sizes, frames, 200_000)
                    if out is not None:
                        self.short += 1
                        rests = self.http.answered(asked, sum(sizes), sum(len(each) - 2 for each in frames), self.now)
                        assert rests == self.http.at_rest
                        return self.take(out) + self.read()
            assert state(self.http._engine) == before, "who only looks changes nothing"
        seen = len(self.requests)
        new = super().send(whole)
        for each in self.requests[seen:]:
            if self._may and isinstance(each, Request) and each.fields is not None and each.target in BODIES:
                self.by_fields[each.fields] = BODIES[each.target]
        return new


def answer_of(body):
    return Response(200, [(b"Server", b"x")], [body] if body else [], len(body))


def told(peer):
    """What the client has been told, without the order of streams: headers, bodies and ends, and what belongs to none."""
    streams, others = {}, []
    for frame in peer.got:
        if isinstance(frame, HeadersFrame):
            streams[frame.stream_id] = [frame.data.removeprefix(b"\x20"), b"", "END_STREAM" in frame.flags]
        elif isinstance(frame, DataFrame):
            streams[frame.stream_id][1] += frame.data
            streams[frame.stream_id][2] |= "END_STREAM" in frame.flags
        else:
            others.append((type(frame), frame.stream_id, frame.serialize_body()))
    return streams, others


def steps():
    path = st.sampled_from([*(path.decode() for path in BODIES), "/other"])
    ask = st.tuples(st.just("ask"), st.lists(path, min_size=1, max_size=5), st.booleans(), st.booleans())
    window = st.tuples(st.just("window"), st.sampled_from([0, 0, 1, 3]), st.integers(0, 200_000) | st.just(2**31 - 1))
    other = st.tuples(st.just("other"), st.sampled_from(["ping", "reset", "settings0", "settings", "table", "split", "even",
                                                         "old", "itself", "content", "goaway", "continued", "priority",
                                                         "unknown"]))  # fmt: skip
    return st.lists(st.one_of(ask, ask, window, other), max_size=14)


def allowances(peer):
    budgets = peer.http._budgets
    return [each.left for each in (budgets.windows, budgets.control, budgets.resets)]


class Client:
    """What is said, in bytes, the same to both."""

    def __init__(self):
        self.encoder = Encoder()
        self.next = 1

    def ask(self, path, *, priority=False, growing=False, fields=()):
        if growing:
            fields = [*fields, ("x-new", os.urandom(3).hex())]
        block = self.encoder.encode(list(request(*fields, path=path)))
        self.next += 2
        return raw(1, 0x25 if priority else 5, self.next - 2, (b"\0\0\0\0\7" if priority else b"") + block)

    def other(self, kind):
        ask = self.ask
        match kind:
            case "ping":
                return PingFrame(0, b"12345678").serialize()
            case "reset":
                return raw(3, 0, max(self.next - 2, 1), bytes(4))
            case "settings0":
                return raw(4, 0, 0, b"\0\4" + bytes(4))
            case "settings":
                return raw(4, 0, 0, b"\0\4" + (1 << 20).to_bytes(4, "big"))
            case "table":
                self.encoder.header_table_size = 64
                return ask("/small")
            case "even":
                return ask("/small") + raw(1, 5, self.next + 1, ask("/small")[9:])
            case "old":
                return raw(1, 5, 1, ask("/small")[9:])
            case "itself":
                block = ask("/small")[9:]
                return raw(1, 0x25, self.next - 2, (self.next - 2).to_bytes(4, "big") + b"\7" + block)
            case "content":
                return ask("/small", fields=[("content-length", "5")])
            case "goaway":
                return raw(7, 0, 0, bytes(8))
            case "continued":
                whole = ask("/small")
                return raw(1, 1, self.next - 2, whole[9:12]) + raw(9, 4, self.next - 2, whole[12:])
            case "priority":
                return raw(0x10, 0, 0, self.next.to_bytes(4, "big") + b"u=1")
            case "unknown":
                return raw(0x42, 0, 0, b"x")
        return b""


@settings(max_examples=400, deadline=None)
@given(steps())
@example([("ask", ["/small"], False, False)] * 4)
@example([("ask", ["/small"], False, False), ("other", "priority"), ("ask", ["/small"], False, False), ("other", "ping")])
@example([("ask", ["/small"], True, False), ("ask", ["/small", "/empty"], True, False), ("window", 0, 5), ("window", 1, 5)])
def test_the_short_way_says_and_leaves_what_the_long_way_would(todo):
    client, short, long = Client(), Peer(short=True), Peer(short=False)
    for kind, *what in todo:
        if kind == "ask":
            paths, priority, growing = what
            pieces = [b"".join(client.ask(path, priority=priority, growing=growing) for path in paths)]
        elif kind == "window":
            pieces = [raw(8, 0, what[0], what[1].to_bytes(4, "big"))]
        elif what[0] == "split":
            whole = client.ask("/small")
            pieces = [whole[:12], whole[12:]]
        else:
            pieces = [client.other(what[0])]
        for piece in pieces:
            for peer in (short, long):
                peer.now += 0.01
                peer.send(piece)
        assert told(short) == told(long)
        assert (short.http.fault is None) == (long.http.fault is None)
        assert state(short.http._engine) == state(long.http._engine)
        assert allowances(short) == pytest.approx(allowances(long), abs=3), "honest work earns the same on either way"
        assert short.http.at_rest == long.http.at_rest
        assert len(short.http._early) == len(long.http._early)


def test_it_is_taken():
    client, short = Client(), Peer(short=True)
    for number in range(6):
        short.send(client.ask("/small") + client.ask("/empty", priority=True) + raw(8, 0, 0, b"\0\0\1\0"))
        assert [short.body(4 * number + 1), short.ended(4 * number + 3)] == [BODIES[b"/small"], True]
    assert short.short == 5, "from the second on"


def test_windows_that_are_too_small_are_kept():
    client, short = Client(), Peer(short=True)
    for _ in range(5):
        short.send(client.ask("/frame"))
    assert short.short == 2
    assert sum(len(short.body(stream)) for stream in range(1, 10, 2)) == 65_535
    short.send(raw(8, 0, 0, (1 << 20).to_bytes(4, "big")))
    short.send(client.ask("/large"))
    short.send(raw(4, 0, 0, b"\0\4" + (39_999).to_bytes(4, "big")))
    before = short.short
    short.send(client.ask("/large"))
    assert len(short.body(13)) == 39_999
    assert short.short == before


def test_too_many_window_updates_end_it():
    client, short = Client(), Peer(short=True)
    for _ in range(4):
        short.send(client.ask("/small"))
    for _ in range(9):
        short.send(raw(8, 0, 0, b"\0\0\0\1") * 250)
    assert short.goaway == (0xB, 7)


def test_the_last_request_of_a_connection_is_for_the_long_way():
    client, short = Client(), Peer(short=True, max_requests=140)
    for _ in range(200):
        if short.goaway is None:
            short.send(client.ask("/small"))
    assert short.short
    assert short.goaway is not None
    assert short.ended(2 * 140 - 1)


def test_who_has_been_told_that_it_ends_is_answered_the_long_way():
    client, short, long = Client(), Peer(short=True), Peer(short=False)
    for number in range(5):
        data = client.ask("/small")
        for peer in (short, long):
            if number == 3:
                peer.http.drain()
            peer.send(data)
    assert short.short == 2
    assert not short.http.at_rest
    assert told(short) == told(long)


def test_more_requests_at_a_time_than_there_may_be_streams():
    client, short = Client(), Peer(short=True)
    for _ in range(3):
        short.send(client.ask("/empty"))
    before = short.short
    short.send(b"".join(client.ask("/empty") for _ in range(129)))
    assert short.short == before
    short.send(b"".join(client.ask("/empty") for _ in range(128)))
    assert short.short == before + 1


@pytest.mark.parametrize("size", [0, 1, 16_383, 16_384, 16_385, 50_000, 64_000])
def test_an_answer_in_frames(size):
    body = os.urandom(size)
    peer = RawPeer(begin=False)
    peer.take((7).to_bytes(4, "big").join(prepare(b"block", body)))
    assert peer.of(HeadersFrame, 7)[0].data == b"block"
    assert peer.body(7) == body
    assert [frame.flags for frame in peer.got if "END_STREAM" in frame.flags] == [peer.got[-1].flags]
    assert max(frame.body_len for frame in peer.got) <= 16_384


@settings(max_examples=300, deadline=None)
@given(before=FIELDS, fields=FIELDS, bend=st.none() | st.tuples(st.integers(0, 200), st.integers(1, 255)))
def test_looking_at_a_block_changes_nothing(before, fields, bend):
    encoder, decoder = Encoder(), Decoder()
    decode_block(decoder, encoder.encode(before))
    block = bytearray(encoder.encode(fields))
    if bend is not None and bend[0] < len(block):
        block[bend[0]] ^= bend[1]
    was, other = state(decoder), copy.deepcopy(decoder)
    found = peek_block(decoder, bytes(block))
    assert state(decoder) == was
    if found is not None:
        assert found == decode_block(other, bytes(block))
        assert state(other) == was, "the block was one that leaves the table alone"
    elif bend is None:
        decode_block(other, bytes(block))
        assert state(other) != was or not block


def test_what_a_block_says_is_looked_up_as_long_as_the_table_is_as_it_was():
    client, short = Client(), Peer(short=True)
    for _ in range(3):
        short.send(client.ask("/small"))
    block = client.ask("/small")[9:]
    known = short.http.known
    first = known._fields(block)
    assert first is not None
    assert known._fields(bytes(bytearray(block))) is first
    short.send(client.ask("/small", growing=True))  # what its numbers meant they don't mean any more
    assert known._fields(block) != first


def test_a_table_that_is_full_changes_without_growing():
    known = Peer(short=True).http.known
    table = known._engine.decoder.header_table
    table.maxsize = 80
    for value in (b"one", b"two", b"six", b"ten"):
        table.add(b"x-a", value)
        assert known._fields(b"\xbe") == ((b"x-a", value),)
    assert len(table.dynamic_entries) == 2


def test_what_continues_something_else_is_no_request():
    client, short, long = Client(), Peer(short=True), Peer(short=False)

    def say(*pieces):
        for piece in pieces:
            for peer in (short, long):
                peer.send(piece)
        assert told(short) == told(long)

    for _ in range(3):
        say(data := client.ask("/small"))
    assert short.short == 2
    say(raw(0x42, 0, 0, bytes(len(data)))[:9], client.ask("/small"))
    say(client.ask("/small"))
    assert short.short == 3
    say(client.ask("/small")[:2], client.ask("/small"))


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/small", ("authorization", "Basic " + os.urandom(9).hex())),
        ("/small?expires=9999999999&signature=" + os.urandom(9).hex(), ("x-own", "1")),
    ],
)
def test_a_secret_is_not_remembered(path, field):
    client, short = Client(), Peer(short=True)
    for _ in range(4):
        short.send(client.ask(path, fields=[field]))
    secret = path.partition("signature=")[2] or field[1]
    assert secret not in repr(short.http.known._blocks) + repr(header_blocks._decoded) + repr(http2_fields._understood)
    assert secret not in repr(short.http.known._newest) or not short.http.known._blocks


@pytest.mark.parametrize("size", [300, 5_000, 15_000])
def test_long_blocks_are_not_remembered(size):
    client, short = Client(), Peer(short=True)
    for _ in range(4):
        short.send(client.ask("/small", fields=[("x-long", "v" * size)]))
        block = b"\x82\x84\x87" + b"\x81" * size  # short strings, many of them
        short.send(raw(1, 5, client.next, block))
        client.next += 2
    assert sum(map(len, short.http.known._blocks)) < 1_000
    assert sum(len(fields) for fields in short.http.known._blocks.values()) < 70


def test_windows_said_in_small_steps_are_honest_work():
    """A client that takes 60 KB and says so every 4 KiB."""
    client, short = Client(), Peer(short=True)
    short.send(raw(4, 0, 0, b"\0\4" + (1 << 20).to_bytes(4, "big")), raw(8, 0, 0, (1 << 20).to_bytes(4, "big")))
    for _ in range(600):
        short.send(client.ask("/large") + raw(8, 0, 0, (4_096).to_bytes(4, "big")) * 10)
    assert short.goaway is None
    assert short.short > 500
