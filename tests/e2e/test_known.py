"""The short way of requests that came before: whatever happens, it ends as the long way would."""

import contextlib
import errno
import json
import os
import socket
import ssl
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ktlsd.errors import PeerTruncated
from ktlsd.protocol.http2 import Http2Connection
from ktlsd.protocol.http2_known import Asked
from ktlsd.server import hot, worker
from ktlsd.server.conversation import Conversation
from ktlsd.settings import Limits
from tests import client
from tests.client import wait_until
from tests.h2client import Http2Client, Stream
from tests.serving import ThreadServer

ASKED = b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n"
BODY = b"hello\n" * 100


class Client:
    """Says in one segment what it is told to, and shows what came: b"" for a close_notify, None for TCP's end without one."""

    def __init__(self, port):
        self.memory = client.MemoryClient(client.context("TLSv1.3", "AES-256-GCM"))
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=5)
        self.memory.advance()
        while not self.memory.established:
            self.flush()
            self.memory.receive(self.sock.recv(65_536))
        self.flush()

    def flush(self):
        if out := self.memory.take():
            self.sock.sendall(out)

    def say(self, *pieces, end=False):
        for piece in pieces:
            self.memory.send(piece)
        if end:
            self.memory.ssl.shutdown()
        self.flush()

    def answer(self):
        """One response, or what ended the connection."""
        while b"\r\n\r\n" not in self.memory.plain and not self.memory.closed:
            if not (data := self.sock.recv(65_536)):
                return None
            self.memory.receive(data)
        if self.memory.closed and not self.memory.plain:
            return b""
        head, _, rest = bytes(self.memory.plain).partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(rest) < length:
            self.memory.receive(self.sock.recv(65_536))
            rest = bytes(self.memory.plain).partition(b"\r\n\r\n")[2]
        del self.memory.plain[: len(head) + 4 + length]
        return head.partition(b"\r\n")[0] + b" " + rest[:length]


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(hot, "_FOR", 60.0)  # nothing is forgotten while a test goes on
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_bytes(BODY)
    os.utime(root / "file", (1, 1))
    time.sleep(0.15)  # changed just now, it would not be kept
    with ThreadServer(root, None, log_file=tmp_path / "log") as made:
        made.log = tmp_path / "log"
        yield made


def known(server):
    """A connection whose next request takes the short way."""
    made = Client(server.port)
    for _ in range(4):
        made.say(ASKED)
        assert made.answer() == b"HTTP/1.1 200 OK " + BODY
    responder = next(iter(server.worker._entrance._doors.values())).services.responder
    assert ASKED in responder._by_form
    return made


def test_an_end_that_comes_with_the_request_is_answered(server):
    known(server)
    one = Client(server.port)
    one.say(ASKED, end=True)
    assert one.answer() == b"HTTP/1.1 200 OK " + BODY
    assert one.answer() == b""


@pytest.mark.parametrize("name", ["file", "large"])
def test_a_file_that_was_deleted_is_let_go_of_without_another_request(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(bytes(100 if name == "file" else 100_000))
    os.utime(path, (1, 1))
    time.sleep(0.15)
    with ThreadServer(tmp_path, None) as server:
        one = Client(server.port)
        for _ in range(3):
            one.say(ASKED.replace(b"/file", b"/" + name.encode()))
            assert one.answer().startswith(b"HTTP/1.1 200 ")

        def held():
            links = (os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink())
            return sum(link.startswith(str(path)) for link in links)

        assert held()
        path.unlink()
        wait_until(lambda: not held(), 4.0)


def test_requests_in_one_segment_are_all_answered(server):
    one = known(server)
    one.say(*[ASKED] * 9)
    assert [one.answer() for _ in range(9)] == [b"HTTP/1.1 200 OK " + BODY] * 9
    one.say(ASKED + ASKED[:-9])
    assert one.answer() == b"HTTP/1.1 200 OK " + BODY
    one.say(ASKED[-9:])
    assert one.answer() == b"HTTP/1.1 200 OK " + BODY
    one.say(ASKED, b"nonsense\r\n\r\n")
    assert one.answer() == b"HTTP/1.1 200 OK " + BODY
    assert one.answer().startswith(b"HTTP/1.1 400 ")


def test_what_only_a_split_made_right_is_not_known(server):
    known(server)
    other = ASKED[:-2] + b"X: 1\r\n\r\n"
    for _ in range(4):
        one = Client(server.port)
        one.say(b"\r")
        time.sleep(0.03)
        one.say(b"\n" + other)
        assert one.answer() == b"HTTP/1.1 200 OK " + BODY
    one = Client(server.port)
    one.say(b"\n" + other)
    assert one.answer().startswith(b"HTTP/1.1 400 ")


def test_a_connection_that_is_lost_while_it_is_answered_is_counted_and_logged_as_cut(server, monkeypatch):
    one = known(server)
    time.sleep(0.1)  # the last answer is counted after it has been sent
    before = dict(server.metrics.counters)

    def lost(*_, **__):
        raise PeerTruncated("connection lost: no buffer space")

    with monkeypatch.context() as patch:
        patch.setattr(server.worker._kernel, "send", lost)
        one.say(ASKED)
        with pytest.raises(ConnectionResetError):
            one.sock.recv(1)
    assert server.metrics.counters["requests"] == before["requests"] + 1
    assert server.metrics.counters["responses_cut"] == 1
    assert server.metrics.answering == 0
    known(server)  # others are served
    cut = [entry for entry in map(json.loads, server.log.read_text().splitlines()) if not entry["complete"]]
    assert [(entry["target"], entry["bytes"]) for entry in cut] == [("/file", 0)]


@pytest.mark.parametrize("what", [OSError(errno.EBADF, "nobody expects this"), MemoryError(), ssl.SSLError("nor this")])
def test_an_exception_that_nobody_expects_costs_one_connection(server, monkeypatch, what):
    one, other = known(server), known(server)

    def fails(*_, **__):
        raise what

    with monkeypatch.context() as patch:
        patch.setattr(server.worker._kernel, "receive", fails)
        one.say(ASKED)
        with contextlib.suppress(ConnectionResetError):
            assert one.sock.recv(1) == b""
    assert server.metrics.counters["ended:bug"] == 1
    other.say(ASKED)
    assert other.answer() == b"HTTP/1.1 200 OK " + BODY


def test_everything_is_logged_and_counted_as_on_the_long_way(server):
    one = known(server)
    for _ in range(3):
        one.say(ASKED)
        one.answer()
    one.say(ASKED, end=True)
    assert one.answer() == b"HTTP/1.1 200 OK " + BODY
    assert one.answer() == b""
    time.sleep(0.1)
    entries = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert len(entries) == 8
    told = [{k: v for k, v in entry.items() if k not in ("time", "duration")} for entry in entries]
    assert all(entry == told[0] for entry in told)
    counters = server.metrics.counters
    assert (counters["requests"], counters["responses:200"], server.metrics.answering) == (8, 8, 0)
    assert counters["body_bytes:userspace:http/1.1"] == 8 * len(BODY)


@pytest.mark.parametrize("asked", [ASKED[:-2] + b"Connection: close\r\n\r\n", ASKED.replace(b"1.1", b"1.0")])
def test_a_client_that_wants_to_ask_once_is_answered_and_left(server, asked):
    for number in range(6):
        one = Client(server.port)
        one.say(asked, *[ASKED] * (number == 5))
        assert one.answer() == b"HTTP/1.1 200 OK " + BODY
        assert one.answer() == b"", "close_notify, and nothing to what came behind it"
        one.memory.ssl.shutdown()
        one.flush()
        assert one.sock.recv(1) == b""
    responder = next(iter(server.worker._entrance._doors.values())).services.responder
    assert responder._by_form[asked].known.last
    wait_until(lambda: not server.worker._connections)
    time.sleep(0.1)
    entries = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert [entry["complete"] for entry in entries] == [True] * 6
    assert "ended:PeerTruncated" not in server.metrics.counters


def test_the_first_request_of_a_connection_takes_the_short_way(server, monkeypatch):
    known(server)
    asked = []
    real = Conversation.greet

    def greeting(self, now):
        asked.append(real(self, now))
        return asked[-1]

    monkeypatch.setattr(Conversation, "greet", greeting)
    context = ssl._create_unverified_context()
    for _ in range(8):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing)
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock, pytest.raises(ssl.SSLWantReadError):
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
            sock.sendall(outgoing.read())
            while not tls.version() or not outgoing.pending:
                incoming.write(sock.recv(65_536))
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
            tls.write(ASKED)
            sock.sendall(outgoing.read())  # Finished and the request in one segment
            out = b""
            while not out.endswith(BODY):
                incoming.write(sock.recv(65_536))
                with contextlib.suppress(ssl.SSLWantReadError):
                    out += tls.read(65_536)
            assert tls.session.has_ticket, "it went along"
            tls.read(1)
    assert any(asked)


def test_the_last_request_that_a_connection_may_make_says_so(tmp_path):
    (tmp_path / "file").write_bytes(BODY)
    time.sleep(0.15)
    with ThreadServer(tmp_path, None, limits=Limits(requests_per_connection=6)) as server:
        one = known(server)
        one.say(ASKED)
        one.answer()
        one.say(ASKED)
        assert one.answer() == b"HTTP/1.1 200 OK " + BODY
        assert one.answer() == b""


# --- HTTP/2 --------------------------------------------------------------------------------------------------------


def known2(server, **options):
    """The same by HTTP/2."""
    made = Http2Client(server.port, **options)
    for _ in range(4):
        assert bytes(made.fetch("/file").body) == BODY
    responder = next(iter(server.worker._entrance._doors.values())).services.responder
    assert any(isinstance(form, tuple) for form in responder._by_form)
    time.sleep(0.1)  # the last answer is counted after it has been sent
    return made


@pytest.fixture
def taken(monkeypatch):
    """How many requests of HTTP/2 have taken the short way."""
    answered, counts = Http2Connection.answered, []

    def counting(self, asked, *what):
        counts.extend(asked.ids)
        return answered(self, asked, *what)

    monkeypatch.setattr(Http2Connection, "answered", counting)
    return counts


def test_streams_that_come_together_are_all_answered(server, taken):
    one = known2(server)
    streams = [one.http.get_next_available_stream_id() + 2 * number for number in range(20)]
    for stream_id in streams:
        one.http.send_headers(stream_id, [(":method", "GET"), (":scheme", "https"), (":authority", "localhost"),
                                          (":path", "/file")], end_stream=True)  # fmt: skip
        one.streams[stream_id] = Stream()
    before = len(taken)
    one.said()
    assert [bytes(stream.body) for stream in one.finish(*streams)] == [BODY] * 20
    wait_until(lambda: len(taken) == before + 20)  # counted after it has been sent
    assert one.fetch("/gone").status == 404
    assert bytes(one.fetch("/file").body) == BODY


def test_a_change_counts_with_the_next_request_of_http2(server, taken, tmp_path):
    one = known2(server)
    assert taken
    time.sleep(0.02)
    (tmp_path / "root" / "file").write_bytes(b"other")
    assert bytes(one.fetch("/file").body) == b"other"
    (tmp_path / "root" / "file").unlink()
    assert one.fetch("/file").status == 404


def test_a_window_that_is_too_small_is_kept_to(server, taken):
    one = known2(server, window=100)
    assert not taken, "the long way only"
    other = known2(server, auto=False)
    assert taken
    for _ in range(65_535 // len(BODY) - 4):
        assert bytes(other.fetch("/file").body) == BODY
    last = other.ask("/file")
    while len(other.streams[last].body) < 65_535 % len(BODY):
        assert other.read()
    assert not other.streams[last].ended
    other.http.increment_flow_control_window(1000)
    other.said()
    assert bytes(other.finish(last)[0].body) == BODY
    assert bytes(one.fetch("/file").body) == BODY


def test_http2_is_logged_and_counted_as_on_the_long_way(server, taken):
    one = known2(server)
    for _ in range(3):
        one.fetch("/file")
    time.sleep(0.1)
    assert len(taken) >= 4
    entries = [json.loads(line) for line in server.log.read_text().splitlines()]
    told = [{k: v for k, v in entry.items() if k not in ("time", "duration")} for entry in entries]
    assert len(told) == 7
    assert all(entry == told[0] for entry in told)
    assert told[0]["protocol"] == "HTTP/2"
    counters = server.metrics.counters
    assert (counters["requests"], counters["responses:200"], server.metrics.answering) == (7, 7, 0)
    assert counters["body_bytes:userspace:h2"] == 7 * len(BODY)


def test_a_connection_of_http2_that_is_lost_while_it_is_answered_is_counted_as_cut(server, taken, monkeypatch):
    one = known2(server)
    before = len(taken)

    def lost(*_, **__):
        raise PeerTruncated("connection lost: no buffer space")

    with monkeypatch.context() as patch:
        patch.setattr(server.worker._kernel, "send", lost)
        one.ask("/file")
        with pytest.raises(ConnectionResetError):
            one.sock.recv(1)
    assert len(taken) == before
    assert server.metrics.counters["responses_cut"] == 1
    assert server.metrics.answering == 0
    assert bytes(known2(server).fetch("/file").body) == BODY


def test_windows_alone_do_not_keep_a_connection(tmp_path):
    (tmp_path / "file").write_bytes(BODY)
    os.utime(tmp_path / "file", (1, 1))
    time.sleep(0.15)
    with ThreadServer(tmp_path, None, limits=Limits(idle_timeout=0.6, linger_timeout=0.2)) as server:
        one = known2(server)
        began = time.monotonic()
        with pytest.raises((OSError, AssertionError)):
            while True:
                one.http.increment_flow_control_window(10)
                one.said()
                time.sleep(0.05)
                assert time.monotonic() - began < 5, "it is kept"
                assert server.worker._connections
        assert time.monotonic() - began < 3


def hold_up(server, patch):
    """Have the worker wait before it looks who has come; return what lets it go on."""
    gate, waiting, poll = threading.Event(), threading.Event(), server.worker._poller.wait
    nudge = Client(server.port)
    patch.setattr(server.worker._poller, "wait", lambda *args: (waiting.set(), gate.wait(10), poll(*args))[2])
    nudge.say(ASKED)  # ends the wait that is going on, if it is not over; answered now or later
    assert waiting.wait(5)
    gate.nudge = nudge
    return gate


@pytest.mark.parametrize("count", [3, 20, 150])
def test_many_at_a_time_are_answered_together_each_as_if_alone(server, monkeypatch, count):
    """Among them one that asks for something else, one that asks five times, one that leaves, one that is lost."""
    responder = next(iter(server.worker._entrance._doors.values())).services.responder
    known(server)
    clients = [Client(server.port) for _ in range(count)]
    for one in clients:
        one.say(ASKED)
        assert one.answer() == b"HTTP/1.1 200 OK " + BODY
    steps = []
    for name in ("fetch", "let_go"):
        real = getattr(Conversation, name)
        monkeypatch.setattr(Conversation, name, lambda self, *args, _n=name, _r=real: (steps.append(_n), _r(self, *args))[1])
    gate = hold_up(server, monkeypatch)
    said = [(ASKED,)] * count
    said[0] = (ASKED.replace(b"/file", b"/none"),)
    said[1] = (ASKED,) * 5
    steps.clear()
    for one, pieces in zip(clients, said, strict=True):
        one.say(*pieces, end=one is clients[2])
    if count > 3:
        clients[3].sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        clients[3].sock.close()
    gate.set()
    assert clients[0].answer().startswith(b"HTTP/1.1 404 ")
    for one in (*clients[1:3], *clients[4:]):
        assert one.answer() == b"HTTP/1.1 200 OK " + BODY
    assert [clients[1].answer() for _ in range(4)] == [b"HTTP/1.1 200 OK " + BODY] * 4
    assert clients[2].answer() == b""
    assert ASKED in responder._by_form
    if count > 3:
        assert steps[:3] == ["fetch"] * 3, "each step is done for all before the next"
        assert steps.count("fetch") >= count - 1
        assert steps.count("let_go") >= count - 4
    wait_until(lambda: server.metrics.answering == 0)
    assert "ended:bug" not in server.metrics.counters


@pytest.mark.parametrize("count", [20, 150])
def test_those_for_whom_a_round_has_no_time_have_their_turn_in_the_next(server, monkeypatch, count):
    clients = [known(server) for _ in range(count)]
    monkeypatch.setattr(worker, "_MUCH", 0)
    monkeypatch.setattr(worker, "_ROUND", 0.0)
    gate = hold_up(server, monkeypatch)
    for one in clients:
        one.say(ASKED)
    gate.set()
    for one in clients:
        assert one.answer() == b"HTTP/1.1 200 OK " + BODY
    wait_until(lambda: not server.worker._turns)


def test_what_comes_to_those_who_wait_for_the_next_round_is_seen(server, monkeypatch):
    """An edge between the step that received and the step that looks at it belongs to what comes after."""
    clients = [known(server) for _ in range(20)]
    monkeypatch.setattr(worker, "_MUCH", 0)
    monkeypatch.setattr(worker, "_ROUND", 0.0)
    gate = hold_up(server, monkeypatch)
    for one in clients:
        one.say(ASKED)
    poll, rounds = server.worker._poller.wait, []

    def more(*args):
        if len(rounds) == 1:  # all were received, one was answered
            for one in clients:
                one.say(ASKED)
            time.sleep(0.05)
        rounds.append(1)
        return poll(*args)

    monkeypatch.setattr(server.worker._poller, "wait", more)
    gate.set()
    for one in clients:
        assert [one.answer() for _ in range(2)] == [b"HTTP/1.1 200 OK " + BODY] * 2


class Slow:
    """A connection that the short way is not enough for, or that is answered with so many bytes."""

    def __init__(self, spent):
        self.spent, self.asked = spent, 0

    def fetch(self):
        pass

    def answer_known(self, now, *, hold):
        self.asked += 1
        return self.spent

    def let_go(self, now):
        return True


@pytest.mark.parametrize("spent", [None, 100_000])
def test_the_clock_is_looked_at_after_each_that_takes_its_time(server, monkeypatch, spent):
    connections = [Slow(spent) for _ in range(40)]
    left, sent = server.worker._answer_known(connections, time.monotonic() + 60)
    assert (len(left), sent) == ((40, 0) if spent is None else (0, 4_000_000)), "bytes count against the quota"
    left, sent = server.worker._answer_known(connections, time.monotonic() - 60)
    assert left == connections[spent is not None :]
    assert [each.asked for each in connections] == [2] + [1] * 39


def test_windows_behind_a_held_answer_do_not_have_it_counted_before_it_went():
    accounted = []
    talk = SimpleNamespace(
        _http2=SimpleNamespace(
            known=SimpleNamespace(read=lambda data: Asked([], [], 10, 1), write=lambda *_: b""),
            answered=lambda *_: True,
        ),
        _find=lambda asked, now: [],
        _answered=("held",),
        _account=accounted.append,
    )
    assert Conversation._answer_some(talk, b"", 1.0, True) == 0
    assert (talk._answered, accounted) == (("held",), [])
    assert Conversation._answer_some(talk, b"", 1.0, False) == 0
    assert accounted == [1.0]


def test_a_connection_that_is_lost_when_its_answer_is_let_go_is_counted_and_logged_as_cut(server, monkeypatch):
    clients = [known(server) for _ in range(20)]
    time.sleep(0.1)
    before = dict(server.metrics.counters)
    victim = clients[3].sock.getsockname()[1]
    real = server.worker._kernel.send

    def lost(sock, buffers, *, more):
        if sock.getpeername()[1] == victim:
            raise PeerTruncated("connection lost: no buffer space")
        return real(sock, buffers, more=more)

    monkeypatch.setattr(server.worker._kernel, "send", lost)
    gate = hold_up(server, monkeypatch)
    for one in clients:
        one.say(ASKED)
    gate.set()
    for one in (*clients[:3], *clients[4:]):
        assert one.answer() == b"HTTP/1.1 200 OK " + BODY
    with pytest.raises(ConnectionResetError):
        clients[3].sock.recv(1)
    wait_until(lambda: server.metrics.counters["responses_cut"] == 1)
    time.sleep(0.1)
    counters = server.metrics.counters
    assert counters["requests"] == before["requests"] + 21
    assert counters["body_bytes:userspace:http/1.1"] == before["body_bytes:userspace:http/1.1"] + 20 * len(BODY)
    assert server.metrics.answering == 0
    entries = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert [entry["complete"] for entry in entries].count(False) == 1


def test_an_exception_in_any_step_ends_one_connection_and_not_the_others(server, monkeypatch):
    clients = [known(server) for _ in range(20)]
    for name in ("fetch", "answer_known", "let_go"):
        real, victim = getattr(Conversation, name), clients.pop()
        number = victim.sock.getsockname()[1]

        def fails(self, *args, _real=real, _number=number, **more):
            if self._channel._sock.getpeername()[1] == _number:
                raise RuntimeError("a bug")
            return _real(self, *args, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Conversation, name, fails)
            gate = hold_up(server, patch)
            for one in (*clients, victim):
                one.say(ASKED)
            gate.set()
            for one in clients:
                assert one.answer() == b"HTTP/1.1 200 OK " + BODY
            with contextlib.suppress(ConnectionResetError):
                assert victim.answer() is None
    assert server.metrics.counters["ended:bug"] == 3
