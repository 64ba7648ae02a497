"""The short way of requests that came before: whatever happens, it ends as the long way would."""

import contextlib
import errno
import json
import os
import socket
import ssl
import time

import pytest

from ktlsd.errors import PeerTruncated
from ktlsd.settings import Limits
from tests import client
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
def server(tmp_path):
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
    assert ASKED in responder._by_data
    return made


def test_an_end_that_comes_with_the_request_is_answered(server):
    known(server)
    one = Client(server.port)
    one.say(ASKED, end=True)
    assert one.answer() == b"HTTP/1.1 200 OK " + BODY
    assert one.answer() == b""


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
