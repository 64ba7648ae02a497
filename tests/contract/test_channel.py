"""One contract, every mode: userspace, kernel mode over the fake kernel, kernel mode over the real one."""

import errno
import hashlib
import os
import random
import socket

import pytest

from ktlsd import uapi
from ktlsd.errors import FileTruncated, PeerTruncated, RecordError
from ktlsd.net.channel import Channel, HandoverPolicy, Mode
from ktlsd.net.handover import CIPHERS, VERSIONS, KernelFacts, probe, self_test
from ktlsd.net.kernel import LinuxKernel
from ktlsd.net.keylog_pipe import KeyLogPipe
from ktlsd.net.tx_userspace import WHOLE_MAX, Scratch
from ktlsd.slices import FileSlice, OpenFile
from ktlsd.tls.session import Session
from tests import client, pki
from tests.fakes.kernel import FakeKernel, nibbling

ALL_TAKEN = KernelFacts({(v, c): "" for v in VERSIONS for c in CIPHERS}, rekey=True)
EVERY = [(v, c) for v in client.VERSIONS for c in client.CIPHERS]
CONTENT = random.Random(7).randbytes(1_000_003)


class Pair:
    """A channel and its client over a real TCP connection, both driven by the test."""

    def __init__(self, kernel, policy, version="TLSv1.3", cipher="AES-256-GCM", *, send_buffer=None, receive_buffer=None):
        listener = socket.create_server(("127.0.0.1", 0))
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect(listener.getsockname())
        ours, _ = listener.accept()
        listener.close()
        ours.setblocking(False)
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.context = pki.server_context()
        self.keylog = KeyLogPipe()
        self.keylog.attach(self.context)
        self.kernel = kernel
        self.channel = Channel(ours, Session(self.context), kernel, policy, keylog=self.keylog, scratch=Scratch())
        self.client = client.MemoryClient(client.context(version, cipher))
        self.client.advance()
        self.tcp_ended = False
        while not self._shake():
            pass

    def _shake(self):
        self.exchange()
        self.channel.note_input(ended=False)
        done = self.channel.try_handshake()
        if done:
            self.channel.try_flush()  # or the client's first words wait for our acknowledgement of its Finished
        self.exchange()
        return done

    def exchange(self, limit=1 << 16):
        """Move what the client has to say, and what has come for it; return whether anything moved."""
        moved = False
        if out := self.client.take():
            self.sock.sendall(out)
            moved = True
        try:
            data = self.sock.recv(limit)
        except BlockingIOError:
            return moved
        if data:
            self.client.receive(data)
        else:
            self.tcp_ended = True
        return True

    def send_all(self, segments, body_bytes=0):
        """Offer segments until all are accepted, the client reading along; return the calls that accepted something."""
        calls = 0
        while segments:
            sent = self.channel.try_send(segments, body_bytes=body_bytes)
            calls += bool(sent)
            _advance(segments, sent or 0)
            self.exchange()
        return calls

    def read(self, count):
        while len(self.client.plain) < count:
            self.exchange()
            if self.channel.mode is Mode.USERSPACE:
                self.channel.try_send([b""])  # flushes
        out = bytes(self.client.plain[:count])
        del self.client.plain[:count]
        return out

    def close(self):
        """Close to the end; the client answers as curl does."""
        for _ in range(100_000):
            self.channel.note_input(ended=False)
            if self.channel.try_close():
                break
            self.exchange()
            if self.client.closed and not self.tcp_ended:
                self.sock.shutdown(socket.SHUT_WR)
        else:
            raise AssertionError("it does not close")

    def done(self):
        self.channel.drop()
        self.sock.close()
        self.keylog.close()


def _advance(segments, count):
    while segments and count >= len(segments[0]):
        count -= len(segments[0])
        segment = segments.pop(0)
        if isinstance(segment, FileSlice):
            segment.close()
    if count:
        if isinstance(segments[0], FileSlice):
            segments[0].advance(count)
        else:
            segments[0] = memoryview(segments[0])[count:]


@pytest.fixture
def file():
    fd = os.memfd_create("content")  # on a disk a busy machine takes its pages out of memory: FileCold
    os.write(fd, CONTENT)
    opened = OpenFile(fd, len(CONTENT), 0)
    yield opened
    opened.release()


MODES = ["userspace", "fake", "nibbling", pytest.param("kernel", marks=pytest.mark.ktls)]


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def make(mode, **kwargs):
    if mode == "userspace":
        return Pair(LinuxKernel(), HandoverPolicy(off="switched off"), **kwargs)
    if mode == "kernel":
        kernel = LinuxKernel()
        return Pair(kernel, HandoverPolicy(self_test(kernel, probe(kernel)), handover_bytes=0), **kwargs)
    appetite = nibbling(3) if mode == "nibbling" else None
    return Pair(FakeKernel(appetite=appetite), HandoverPolicy(ALL_TAKEN, handover_bytes=0), **kwargs)


@pytest.fixture
def pair(mode):
    made = make(mode)
    yield made
    made.done()


def expected_mode(mode):
    return Mode.USERSPACE if mode == "userspace" else Mode.KERNEL


def test_bytes_and_files_arrive_in_order(pair, mode, file):
    segments = [b"head", FileSlice(file, 0, 100_000), b"between", b"", FileSlice(file, 99_999, 70_001), b"tail"]
    pair.send_all([*segments, FileSlice(file, 9, 0), b""])  # empty ones must not keep a record open
    assert pair.channel.mode is expected_mode(mode)
    expected = b"head" + CONTENT[:100_000] + b"between" + CONTENT[99_999:170_000] + b"tail"
    assert pair.read(len(expected)) == expected
    pair.close()
    assert pair.client.closed


@pytest.mark.parametrize(("version", "cipher"), EVERY)
def test_every_version_and_cipher(mode, version, cipher, file):
    pair = make(mode, version=version, cipher=cipher)
    pair.send_all([b"head", FileSlice(file, 1, 300_000)])
    assert pair.channel.mode is expected_mode(mode)
    assert pair.read(300_004) == b"head" + CONTENT[1:300_001]
    pair.close()
    assert pair.client.closed
    pair.done()


def test_random_segments_arrive_whole(mode, file):
    rng = random.Random(11)
    for _ in range(4 if mode == "kernel" else 15):
        pair = make(mode, send_buffer=rng.choice([None, 4096, 65_536]))
        digest, total = hashlib.sha256(), 0
        for _ in range(rng.randint(1, 4)):
            segments = []
            for _ in range(rng.randint(1, 6)):
                if rng.random() < 0.5:
                    piece = rng.randbytes(rng.choice([0, 1, 9, 500, 16_384, 40_000]))
                    segments.append(piece)
                else:
                    offset = rng.randrange(len(CONTENT))
                    length = min(rng.choice([1, 100, 16_375, 16_384, 16_385, 200_000]), len(CONTENT) - offset)
                    segments.append(FileSlice(file, offset, length))
                    piece = CONTENT[offset : offset + length]
                digest.update(piece)
                total += len(piece)
            pair.send_all(segments)
        assert hashlib.sha256(pair.read(total)).digest() == digest.digest()
        pair.close()
        assert pair.client.closed
        pair.done()


def test_would_block_accepts_nothing_and_goes_on_later(mode, file):
    pair = make(mode, send_buffer=4096, receive_buffer=4096)
    segments = [b"head", FileSlice(file, 0, len(CONTENT))]
    blocked = 0
    while segments and blocked < 3:
        sent = pair.channel.try_send(segments)
        blocked += sent is None
        _advance(segments, sent or 0)
    assert segments, "a client that does not read must stop the sender"
    pair.send_all(segments)
    assert pair.read(4 + len(CONTENT)) == b"head" + CONTENT
    pair.done()


def test_what_goes_whole_or_not_goes_whole_or_not_and_keeps_its_place(mode, file):
    """Small answers between others, to a client that reads and one that doesn't."""
    pair = make(mode, send_buffer=4096, receive_buffer=4096)
    expected, whole = b"", 0
    for number in range(60):
        small = b"answer %d " % number + CONTENT[: 11 * number]
        if pair.channel.try_send_whole(small, body_bytes=1, hold=number % 4 == 1):
            whole += 1
        else:
            pair.send_all([small], body_bytes=1)
        expected += small
        if number % 7 == 0:
            pair.send_all([FileSlice(file, number, 5_000)], body_bytes=5_000)
            expected += CONTENT[number : number + 5_000]
        if number % 3 == 0:
            pair.exchange()
    assert pair.read(len(expected)) == expected
    assert bool(whole) == (pair.channel.mode is Mode.USERSPACE), "the kernel may take a part, so nothing is sure there"
    pair.close()
    assert pair.client.closed
    pair.done()


def test_what_is_to_go_whole_does_not_stand_in_the_way_of_the_hand_over():
    pair = Pair(FakeKernel(), HandoverPolicy(ALL_TAKEN, handover_bytes=10_000))
    assert pair.channel.try_send_whole(b"x" * 9_999, body_bytes=9_999)
    assert not pair.channel.try_send_whole(b"x" * 10_000, body_bytes=10_000)
    pair.send_all([b"x" * 10_000], body_bytes=10_000)
    assert pair.channel.mode is Mode.KERNEL
    assert pair.read(19_999) == b"x" * 19_999
    pair.done()


def test_what_is_too_much_to_hold_does_not_go_whole(pair):
    assert not pair.channel.try_send_whole(bytes(WHOLE_MAX + 1), body_bytes=1)
    pair.send_all([b"instead"])
    assert pair.read(7) == b"instead"


@pytest.mark.parametrize("size", [1, 65_536, 65_537, WHOLE_MAX])
def test_what_goes_whole_arrives_whole_even_if_the_socket_takes_less(pair, size):
    data = os.urandom(size)
    whole = pair.channel.try_send_whole(data, body_bytes=1)
    assert whole == bool(pair.channel.why_userspace)
    if whole:
        again = pair.channel.try_send_whole(data, body_bytes=1)
        got = pair.read(size)
        assert got == data
        if again:
            assert pair.read(size) == data
    pair.send_all([b"behind"])
    assert pair.read(6) == b"behind"


def test_what_is_held_goes_with_what_follows_and_there_is_an_end_to_it():
    """To a client that doesn't read: what is accepted and kept here is bounded, and nothing of it is lost."""
    pair = make("userspace", send_buffer=4096, receive_buffer=4096)
    data = os.urandom(WHOLE_MAX)
    held = 0
    while pair.channel.try_send_whole(data, body_bytes=1, hold=True):
        held += 1
        assert held < 4
    pair.channel.try_flush()
    assert not pair.channel.try_send_whole(b"more", body_bytes=1), "older ciphertext waits for the socket"
    for _ in range(held):
        assert pair.read(len(data)) == data
    for _ in range(3):
        assert pair.channel.try_send_whole(b"with", body_bytes=1, hold=True)
    pair.send_all([b"what follows"])
    assert pair.read(24) == b"with" * 3 + b"what follows"
    assert pair.channel.try_send_whole(b"the last", body_bytes=1, last=True)
    pair.exchange()
    assert pair.read(8) == b"the last"
    assert pair.client.closed
    pair.done()


def test_what_was_fetched_is_received_next(pair):
    channel = pair.channel
    pair.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    channel.fetch()  # nothing there
    for number, text in enumerate((b"first", b"second")):
        pair.client.send(text)
        pair.exchange()
        channel.note_input(ended=False)
        channel.fetch()
        if number:
            channel.fetch()  # what was fetched is passed on first
        assert channel.try_receive() == text
    pair.client.send(b"third")
    pair.exchange()
    assert channel.try_receive() is None, "no edge, no input"
    channel.fetch()
    channel.note_input(ended=False)
    assert channel.try_receive() == b"third"
    pair.client.send(b"fourth")
    pair.exchange()
    channel.note_input(ended=False)
    channel.fetch()
    pair.client.send(b"fifth")  # comes, with an edge, before what was fetched is looked at
    pair.exchange()
    channel.note_input(ended=False)
    assert channel.try_receive() == b"fourth"
    assert channel.has_input
    assert channel.try_receive() == b"fifth"
    assert channel.try_receive() is None
    pair.sock.close()
    channel.note_input(ended=True)
    channel.fetch()
    with pytest.raises(PeerTruncated):
        channel.try_receive()


def test_a_session_that_stays_in_userspace_forgets_its_secret():
    refuses = KernelFacts({(v, c): "no" for v in VERSIONS for c in CIPHERS})
    pair = Pair(FakeKernel(), HandoverPolicy(refuses, handover_bytes=0))
    session = pair.channel.session
    assert session.established
    assert session._secret is None
    assert not session.exportable
    pair.send_all([b"before"])
    assert pair.read(6) == b"before"
    pair.close()
    assert pair.client.closed
    pair.done()


def test_what_went_before_the_connection_was_lost_is_told(monkeypatch):
    pair = make("userspace")
    calls = []

    def third_is_lost(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise PeerTruncated("connection lost: reset")
        return sum(map(len, args[1]))

    monkeypatch.setattr(pair.kernel, "send", third_is_lost)
    assert pair.channel.try_send([bytes(1_000_000)]) == 65_536 + 131_072, "two steps went"
    monkeypatch.setattr(pair.kernel, "send", lambda *_, **__: (_ for _ in ()).throw(PeerTruncated("connection lost: reset")))
    with pytest.raises(PeerTruncated):
        pair.channel.try_send([bytes(1_000)])
    pair.done()


def test_receive_gives_what_the_client_sent(pair):
    assert pair.channel.try_receive() is None
    pair.client.send(b"GET / HTTP/1.1\r\n\r\n")
    pair.exchange()
    pair.channel.note_input(ended=False)
    assert pair.channel.try_receive() == b"GET / HTTP/1.1\r\n\r\n"
    assert pair.channel.try_receive() is None


def test_receive_goes_on_after_the_hand_over(pair, file):
    pair.send_all([FileSlice(file, 0, 70_000)])
    pair.read(70_000)
    pair.client.send(b"again")
    pair.exchange()
    pair.channel.note_input(ended=False)
    assert pair.channel.try_receive() == b"again"


def test_a_half_closed_client_still_gets_everything(pair, file):
    pair.client.ssl.shutdown()
    pair.exchange()
    pair.channel.note_input(ended=False)
    assert pair.channel.try_receive() == b""
    pair.send_all([FileSlice(file, 0, 200_000)])
    assert pair.read(200_000) == CONTENT[:200_000]


def test_an_end_without_close_notify_is_a_truncation(pair):
    pair.sock.shutdown(socket.SHUT_WR)
    pair.channel.note_input(ended=True)
    with pytest.raises(PeerTruncated):
        pair.channel.try_receive()


def test_close_ends_in_close_notify_and_fin(pair, file):
    pair.send_all([b"x", FileSlice(file, 0, 500_000)])
    pair.client.send(b"unread input that would make TCP reset")
    pair.exchange()
    pair.close()
    while not pair.tcp_ended:
        pair.exchange()
    assert bytes(pair.client.plain) == b"x" + CONTENT[:500_000]
    assert pair.client.closed


def test_abort_is_a_reset_without_close_notify(pair, file):
    pair.send_all([b"begun"])
    pair.channel.abort()
    with pytest.raises(ConnectionResetError):
        for _ in range(10):
            pair.exchange()
    assert not pair.client.closed


def test_a_file_that_shrank_is_told(pair, tmp_path):
    path = tmp_path / "shrinks"
    path.write_bytes(CONTENT)
    opened = OpenFile(os.open(path, os.O_RDONLY), len(CONTENT), 0)
    opened.residency.asks = False  # whatever the page cache does meanwhile
    segments = [b"head", FileSlice(opened, 0, len(CONTENT))]
    os.truncate(path, 100_000)
    with pytest.raises(FileTruncated):
        pair.send_all(segments)
    opened.release()


def test_a_forged_record_is_answered_by_an_alert(pair, file):
    pair.send_all([b"x"])
    pair.client.send(b"hello")
    record = bytearray(pair.client.take())
    record[-1] ^= 1
    pair.sock.sendall(record)
    pair.channel.note_input(ended=False)
    with pytest.raises(RecordError):
        pair.channel.try_receive()
    from OpenSSL import SSL

    with pytest.raises(SSL.Error) as caught:
        for _ in range(10):
            pair.exchange()
    assert "alert" in str(caught.value)


# --- what only kernel mode has -----------------------------------------------------------------------------------------


def test_below_the_threshold_nothing_is_handed_over(file):
    kernel = FakeKernel()
    pair = Pair(kernel, HandoverPolicy(ALL_TAKEN, handover_bytes=1000))
    pair.send_all([b"h", FileSlice(file, 0, 999)], body_bytes=999)
    assert pair.channel.mode is Mode.USERSPACE
    pair.send_all([b"h", FileSlice(file, 0, 1000)], body_bytes=1000)
    assert pair.channel.mode is Mode.KERNEL
    assert pair.read(2001) == b"h" + CONTENT[:999] + b"h" + CONTENT[:1000]
    pair.done()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTCONN, errno.EBUSY, errno.EPERM, errno.EINVAL, errno.ENOMEM])
@pytest.mark.parametrize("step", ["TCP_ULP", "TLS_TX"])
def test_a_refused_step_leaves_the_connection_in_userspace(step, number, file):
    pair = Pair(FakeKernel(faults={step: number}), HandoverPolicy(ALL_TAKEN, handover_bytes=0))
    pair.send_all([b"head", FileSlice(file, 0, 300_000)])
    assert pair.channel.mode is Mode.USERSPACE
    assert pair.channel.why_userspace == f"{step}:{errno.errorcode[number]}"
    assert pair.read(300_004) == b"head" + CONTENT[:300_000]
    pair.close()
    assert pair.client.closed
    pair.done()


def test_a_cipher_the_probe_refused_is_not_tried(file):
    facts = KernelFacts({**ALL_TAKEN.refusals, (uapi.TLS_1_3_VERSION, uapi.TLS_CIPHER_AES_GCM_256): "TLS_TX:ENOENT"}, True)
    kernel = FakeKernel()
    pair = Pair(kernel, HandoverPolicy(facts, handover_bytes=0))
    pair.send_all([FileSlice(file, 0, 300_000)])
    assert (pair.channel.why_userspace, kernel.installed) == ("TLS_TX:ENOENT", 0)
    pair.done()


@pytest.mark.parametrize("mode", ["fake", "nibbling", pytest.param("kernel", marks=pytest.mark.ktls)])
def test_our_own_rekey_before_the_limit(mode, file):
    kernel = LinuxKernel() if mode == "kernel" else FakeKernel(appetite=nibbling(5) if mode == "nibbling" else None)
    facts = probe(kernel)
    if not facts.rekey:
        pair = Pair(kernel, HandoverPolicy(facts, handover_bytes=0, rekey_bytes=100_000))
        pair.send_all([FileSlice(file, 0, 200_000)])
        assert pair.channel.expiring
        return
    pair = Pair(kernel, HandoverPolicy(facts, handover_bytes=0, rekey_bytes=100_000))
    for _ in range(3):
        pair.send_all([b"head", FileSlice(file, 0, len(CONTENT))])
        assert pair.read(4 + len(CONTENT)) == b"head" + CONTENT
    assert not pair.channel.expiring
    pair.close()
    assert pair.client.closed
    if mode != "kernel":
        assert kernel.rekeyed > 3
        assert (22, b"\x18\0\0\x01\0") in kernel.control_records
    pair.done()


def test_a_reset_while_the_kernel_still_holds_records_ends_the_closing(file):
    """TCP will never take them: waiting would be for ever, and input left unread would make the worker spin."""

    class Holding(FakeKernel):
        def send_control(self, sock, content_type, payload):
            """Take it behind what TCP has not taken yet, as the real one does while it has memory."""
            state = self._state(sock)
            with self._lock:
                state.pending += state.protection.seal(content_type, payload)
            return True

    pair = Pair(Holding(), HandoverPolicy(ALL_TAKEN, handover_bytes=0), send_buffer=4096, receive_buffer=4096)
    segments = [FileSlice(file, 0, 200_000)]
    while segments and (sent := pair.channel.try_send(segments)):
        _advance(segments, sent)
    assert not segments, "this kernel accepts all and holds it"
    assert pair.channel.try_close() is None
    assert pair.channel.told, "close_notify is accepted, behind what TCP has not taken"
    pair.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    pair.sock.close()
    pair.channel.note_input(ended=True)
    with pytest.raises(PeerTruncated):
        for _ in range(3):  # the first look may be at the reset, later ones at what it left
            assert pair.channel.try_close() is None
            assert not pair.channel.has_input
    pair.channel.drop()
    pair.keylog.close()


def test_without_rekey_the_limit_ends_the_connection_after_the_response(file):
    pair = Pair(FakeKernel(rekey=False), HandoverPolicy(probe(FakeKernel(rekey=False)), handover_bytes=0, rekey_bytes=100_000))
    pair.send_all([FileSlice(file, 0, 300_000)])
    assert pair.channel.expiring
    assert pair.read(300_000) == CONTENT[:300_000]
    pair.done()


def test_tls12_can_not_renew_its_keys(file):
    pair = Pair(FakeKernel(), HandoverPolicy(ALL_TAKEN, handover_bytes=0, rekey_bytes=100_000), version="TLSv1.2")
    pair.send_all([FileSlice(file, 0, 300_000)])
    assert pair.channel.expiring
    pair.done()


def test_a_request_behind_the_finished_is_not_lost_to_a_fin(file):
    pair = Pair(LinuxKernel(), HandoverPolicy(off="switched off"))
    pair.client.send(b"early")
    pair.channel.session._held_in = pair.client.take()  # as if it had come in the read that brought the Finished
    pair.sock.shutdown(socket.SHUT_WR)
    pair.channel.note_input(ended=True)
    assert pair.channel.try_receive() == b"early"
    with pytest.raises(PeerTruncated):
        pair.channel.try_receive()
    pair.done()
