"""Answers kept for a moment are those that would be made anew, whatever happens to the file."""

import os
import re
import resource
import time

import pytest
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from ktlsd.errors import RequestError
from ktlsd.protocol import header_blocks, http1_syntax, http2_fields
from ktlsd.protocol.header_blocks import decode_block
from ktlsd.protocol.http1 import Http1Connection
from ktlsd.protocol.messages import Request, Response
from ktlsd.protocol.semantics import http_date
from ktlsd.server import hot as module
from ktlsd.server.auth import hash_password
from ktlsd.server.hot import HotResponses
from ktlsd.server.later import Later
from ktlsd.server.responder import Responder
from ktlsd.server.sites import Sites
from ktlsd.settings import Rule, Settings


class World:
    def __init__(self, folder, *rules):
        self.folder = folder
        self.sites = Sites(Settings(root=str(folder), rule=rules))
        self.plain = Responder(self.sites)
        self.hot = HotResponses(Responder(self.sites))

    def ask(self, target=b"/file", method="GET", **fields):
        headers = tuple((name.replace("_", "-").encode(), value.encode()) for name, value in fields.items())
        request = Request(method, target, b"localhost", headers, "HTTP/1.1", 1)
        return taken(self.hot.respond(request, now := time.monotonic())), taken(self.plain.respond(request, now))

    def close(self):
        self.hot.close()
        self.sites.close()


def taken(response):
    """Status, fields but Date, and body."""
    assert isinstance(response, Response)
    body = b"".join(
        bytes(part) if isinstance(part, bytes) else os.pread(part.file.fd, part.length, part.offset) for part in response.body
    )
    response.close()
    return response.status, [each for each in response.headers if each[0] != b"Date"], response.content_length, body


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SETTLED", 0.0)
    (tmp_path / "file").write_bytes(b"first")
    made = World(tmp_path)
    yield made
    made.close()


def warm(world, **fields):
    for _ in range(3):
        hot, plain = world.ask(**fields)
        assert hot == plain
    assert len(world.hot._hot) == 1, "it is kept"


CHANGES = {
    "written": lambda path: path.write_bytes(b"other"),
    "longer": lambda path: path.write_bytes(b"longer than before"),
    "replaced": lambda path: (path.with_name("new").write_bytes(b"fresh"), path.with_name("new").rename(path)),
    "gone": lambda path: path.unlink(),
    "time": lambda path: os.utime(path, (1, 1)),
    "moved": lambda path: path.rename(path.with_name("elsewhere")),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts_with_the_next_request(world, change):
    warm(world)
    time.sleep(0.02)  # a tick of the file system's clock
    CHANGES[change](world.folder / "file")
    hot, plain = world.ask()
    assert hot == plain


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["ask", "range", "match", "head", "other", *CHANGES]), max_size=25))
def test_in_every_sequence_it_answers_as_if_it_kept_nothing(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("hot")
    (folder / "file").write_bytes(b"first")
    (folder / "other").write_bytes(b"other")
    world = World(folder)
    before, module._SETTLED = module._SETTLED, 0.0
    try:
        for step in steps:
            path = folder / "file"
            if step in CHANGES:
                if path.exists():
                    time.sleep(0.005)
                    CHANGES[step](path)
                else:
                    path.write_bytes(b"again")
                continue
            fields = {"range": {"range": "bytes=1-2"}, "match": {"if_none_match": "*"}}.get(step, {})
            target = b"/other" if step == "other" else b"/file"
            hot, plain = world.ask(target, method="HEAD" if step == "head" else "GET", **fields)
            assert hot == plain
    finally:
        module._SETTLED = before
        world.close()


def test_what_was_just_changed_is_not_kept(tmp_path):
    (tmp_path / "file").write_bytes(b"first")
    world = World(tmp_path)
    for _ in range(3):
        world.ask()
    assert not world.hot._hot
    world.close()


def test_what_is_decided_elsewhere_counts_after_a_second(world, monkeypatch):
    warm(world, accept_encoding="gzip")
    monkeypatch.setattr(module, "_FOR", -1.0)
    (world.folder / "file").write_bytes(b"second")
    world.ask(accept_encoding="gzip")
    assert not [each for each in world.hot._hot.values() if time.monotonic() < each.until]


def test_a_long_request_is_not_kept(world):
    for _ in range(3):
        world.ask(x="y" * 2_000)
    assert not world.hot._hot


@pytest.mark.parametrize("lock", ["auth", "signed"])
def test_what_not_everybody_may_have_is_never_kept(tmp_path, monkeypatch, lock):
    monkeypatch.setattr(module, "_SETTLED", 0.0)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/file").write_bytes(b"secret")
    (tmp_path / "users").write_text(f"anna:{hash_password('a')}\n")
    (tmp_path / "key").write_text("0123456789abcdef" * 2)
    rule = Rule(path="/**", auth=str(tmp_path / "users")) if lock == "auth" else Rule(path="/**", signed=str(tmp_path / "key"))
    world = World(tmp_path / "root", rule)
    for _ in range(3):
        response = world.hot.respond(
            Request("GET", b"/file", b"x", ((b"authorization", b"Basic YW5uYTph"),), "HTTP/1.1", 1), 0.0
        )
        if isinstance(response, Later):
            response.done(response.job())
    assert not world.hot._hot
    world.close()


def test_it_holds_no_more_files_and_bytes_than_it_may(world, monkeypatch):
    world.hot._most = 4
    for number in range(10):
        (world.folder / f"{number}").write_bytes(b"x" * 1_000)
    for _ in range(2):
        for number in range(10):
            world.ask(b"/%d" % number)
    assert len(world.hot._hot) == 4
    monkeypatch.setattr(module, "_MEMORY", 4_000)  # each answer twice: its body, and how it goes out
    for _ in range(2):
        world.ask(b"/1?fresh")
    assert (len(world.hot._hot), world.hot._bytes) == (2, 4_000)
    files = len(os.listdir("/proc/self/fd"))
    world.hot.close()
    assert len(os.listdir("/proc/self/fd")) == files - 2
    for number in range(10_000):
        world.ask(b"/1?%d" % number)
        if number > 100:
            break
    assert len(world.hot._seen) <= 4_096


def test_it_keeps_no_more_files_open_than_a_share_of_what_may_be(monkeypatch, tmp_path):
    assert module.descriptor_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    monkeypatch.setattr(module, "descriptor_limit", lambda: 256)
    assert HotResponses(Responder(Sites(Settings(root=str(tmp_path)))))._most == 32


def test_what_is_kept_gives_way_when_descriptors_run_out(world, monkeypatch):
    warm(world)
    asked = []
    real = world.hot._responder.respond

    def out_of_descriptors(request, now):
        asked.append(len(world.hot._hot))
        if world.hot._hot:
            return world.hot._responder.refuse(request, RequestError(503, "The server is at its limit."))
        return real(request, now)

    monkeypatch.setattr(world.hot._responder, "respond", out_of_descriptors)
    other = Request("GET", b"/other", b"localhost", (), "HTTP/1.1", 1)
    assert world.hot.respond(other, time.monotonic()).status == 503, "for another reason"
    assert len(world.hot._hot) == 1
    monkeypatch.setattr(module, "out_of_descriptors", lambda: True)
    asked.clear()
    assert world.hot.respond(other, time.monotonic()).status == 404
    assert asked == [1, 0]


@pytest.mark.parametrize("change", CHANGES)
def test_a_large_file_is_kept_open_and_not_its_contents(world, change):
    path = world.folder / "large"
    path.write_bytes(os.urandom(module.HOT_MAX + 1))
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        hot, plain = world.ask(b"/large")
        assert hot == plain
    (kept,) = world.hot._hot.values()
    assert kept.body is None
    assert world.hot._bytes == 0
    first, second = (
        world.hot.respond(Request("GET", b"/large", b"localhost", (), "HTTP/1.1", 1), time.monotonic()) for _ in range(2)
    )
    first.body[0].advance(60_000)
    first.body[0].file.residency.warm_to = 60_000
    assert (second.body[0].offset, second.body[0].file.residency.warm_to) == (0, 0), "each reads for itself"
    time.sleep(0.02)
    CHANGES[change](path)
    hot, plain = world.ask(b"/large")
    assert hot == plain
    os.fstat(first.body[0].file.fd)  # who has begun goes on
    first.close()
    second.close()
    world.hot.close()
    assert len(os.listdir("/proc/self/fd")) == files


def test_large_files_take_no_short_way(world):
    (world.folder / "large").write_bytes(bytes(module.HOT_MAX + 1))
    wire = Wire(world)
    for _ in range(4):
        kept, made = wire.ask(asked(b"/large"))
        assert kept == made
    assert world.hot._hot
    assert not wire.known


def asked(target=b"/file", *fields):
    lines = [b"GET " + target + b" HTTP/1.1", b"Host: localhost", *fields]
    return b"\r\n".join(lines) + b"\r\n\r\n"


class Wire:
    """A client of HTTP/1.1 with a connection to a responder that keeps answers, and one to the same that doesn't."""

    def __init__(self, world):
        self.world = world
        self.now = 0.0
        self.known = 0

    def ask(self, data):
        """Both answers without their Date, as they go out."""
        self.now = time.monotonic()
        known = self.world.hot.known(data, self.now)
        if known is None:
            kept = self._through(self.world.hot, data, tell=True)
        else:
            self.known += 1
            kept = known.wire
            assert known.body_bytes == len(kept.partition(b"\r\n\r\n")[2])
        return [re.sub(rb"Date: [^\r]*", b"", each) for each in (kept, self._through(self.world.plain, data))]

    def _through(self, responder, data, *, tell=False):
        connection = Http1Connection()
        (request,) = connection.receive(data)
        connection.respond(request.stream_id, responder.respond(request, time.monotonic()))
        if tell and connection.plain_end is not None:
            responder.recognise(data, request, connection.plain_end)
        out = b"".join(
            part if isinstance(part, bytes) else os.pread(part.file.fd, part.length, part.offset)
            for part in connection.next_output(1 << 20)
        )
        connection.abandon()
        return out


def test_the_same_bytes_get_the_same_bytes(world):
    wire = Wire(world)
    for _ in range(6):
        kept, made = wire.ask(asked())
        assert kept == made
    assert wire.known == 4, "from the third on"


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts_with_the_next_request_in_the_same_bytes(world, change):
    wire = Wire(world)
    for _ in range(3):
        wire.ask(asked())
    assert wire.known
    time.sleep(0.02)
    CHANGES[change](world.folder / "file")
    kept, made = wire.ask(asked())
    assert kept == made


@pytest.mark.parametrize(
    "data",
    [
        asked().replace(b"GET", b"HEAD"),
        asked(b"/file", b"Content-Length: 0"),
        asked(b"/file", b"Range: bytes=0-1"),
        asked(b"/gone"),
        asked(b"/"),
    ],
)
def test_what_is_not_plain_is_not_known_by_its_bytes(world, data):
    wire = Wire(world)
    for _ in range(4):
        kept, made = wire.ask(data)
        assert kept == made
    assert not wire.known or b"Content-Length: 0" in data


@pytest.mark.parametrize(
    ("data", "last"),
    [
        (asked(b"/file", b"Connection: close"), True),
        (asked().replace(b"HTTP/1.1", b"HTTP/1.0"), True),
        (asked().replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host", b"Connection: keep-alive\r\nHost"), False),
        (asked(b"/file", b"Connection: keep-alive"), False),
    ],
)
def test_what_becomes_of_the_connection_is_known_too(world, data, last):
    wire = Wire(world)
    for _ in range(4):
        kept, made = wire.ask(data)
        assert kept == made
    assert wire.known == 2
    assert world.hot.known(data, time.monotonic()).last == last


def test_what_is_known_names_the_present_second(world, monkeypatch):
    wire = Wire(world)
    for _ in range(3):
        wire.ask(asked())
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 7)
    known = world.hot.known(asked(), time.monotonic())
    assert b"Date: " + http_date(int(time.time())) in known.wire


def test_what_is_forgotten_is_not_known(world):
    wire = Wire(world)
    for _ in range(3):
        wire.ask(asked())
    world.hot.close()
    assert world.hot.known(asked(), time.monotonic()) is None
    assert not world.hot._by_form


@pytest.mark.parametrize("field", [b"Authorization", b"Cookie", b"Proxy-Authorization"])
def test_nothing_remembers_a_secret(world, field):
    secret = b"Basic " + os.urandom(20).hex().encode()
    data = asked(b"/file", field + b": " + secret)
    wire = Wire(world)
    block = Encoder().encode([(b":method", b"GET"), (b":path", b"/file"), (b":scheme", b"https"), (b":authority", b"a"),
                              (field.lower(), secret)])  # fmt: skip
    for _ in range(4):
        kept, made = wire.ask(data)
        assert kept == made
        fields = decode_block(Decoder(), block)
        assert (field.lower(), secret) in fields
        world.hot.respond(http2_fields.request_of(fields, 1)[0], time.monotonic()).close()
    assert not wire.known
    assert not world.hot._hot
    memory = [http1_syntax._understood, http2_fields._understood, world.hot._by_form, world.hot._hot]
    assert secret not in repr(memory).encode()
    before = http2_fields._wrong.cache_info().currsize, len(header_blocks._decoded)
    another = Encoder().encode([*fields[:4], (field.lower(), secret[::-1])])
    http2_fields.request_of(decode_block(Decoder(), another), 1)
    assert (http2_fields._wrong.cache_info().currsize, len(header_blocks._decoded)) == before
