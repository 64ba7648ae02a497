"""Clients that speak TLS in odd or hostile ways: key updates, forged records, alerts, what must reach them all the same."""

import array
import fcntl
import random
import socket
import ssl
import subprocess
import termios
import time

import pytest
from OpenSSL import SSL
from tlslite.api import HandshakeSettings, TLSConnection
from tlslite.constants import KeyUpdateMessageType
from tlslite.errors import TLSError

from ktlsd.net.kernel import LinuxKernel
from ktlsd.net.keylog_pipe import KeyLogPipe
from ktlsd.settings import Limits
from tests.client import Client, MemoryClient, context, wait_until
from tests.fakes.kernel import FakeKernel
from tests.serving import ThreadServer

CONTENT = random.Random(2).randbytes(700_001)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "big").write_bytes(CONTENT)
    (folder / "small.txt").write_bytes(b"small")
    return folder


class Peer:
    """tlslite's client, which can send KeyUpdates; TLS 1.3 only."""

    def __init__(self, port):
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.tls = TLSConnection(self.sock)
        settings = HandshakeSettings()
        settings.minVersion = settings.maxVersion = (3, 4)
        self.tls.handshakeClientCert(settings=settings)

    def ask(self, target, fields=b""):
        self.tls.send(b"GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n" % (target, fields))

    def body(self, length):
        out = b""
        while b"\r\n\r\n" not in out or len(out.partition(b"\r\n\r\n")[2]) < length:
            data = self.tls.recv(1 << 16)
            assert data, "the server has closed"
            out += data
        return out.partition(b"\r\n\r\n")[2]

    def update(self, *, requested=True):
        kind = KeyUpdateMessageType.update_requested if requested else KeyUpdateMessageType.update_not_requested
        for _ in self.tls.send_keyupdate_request(kind):
            pass


@pytest.mark.parametrize("requested", [True, False])
def test_a_storm_of_key_updates_is_ended(root, requested):
    with ThreadServer(root, FakeKernel(), handover_bytes=0) as server:
        peer = Peer(server.port)
        peer.ask(b"/small.txt")
        with pytest.raises((TLSError, OSError, AssertionError)):
            for _ in range(400):
                peer.update(requested=requested)
            peer.body(1 << 20)
        wait_until(lambda: not server.worker._connections)
        assert server.metrics.counters["ended:UnexpectedMessage"] == 1, server.metrics.summary()
        peer.sock.close()


@pytest.mark.parametrize("rekey", [True, False])
def test_key_updates_between_requests(root, rekey):
    fake = FakeKernel(rekey=rekey)
    with ThreadServer(root, fake, handover_bytes=100_000) as server:
        probed, renewed = fake.installed, fake.rekeyed
        peer = Peer(server.port)
        peer.ask(b"/small.txt")
        assert peer.body(5) == b"small"
        peer.update()  # while in userspace: OpenSSL answers, and the hand-over must know
        peer.ask(b"/small.txt")
        assert peer.body(5) == b"small"
        peer.update()
        peer.ask(b"/big")
        assert peer.body(len(CONTENT)) == CONTENT
        wait_until(lambda: fake.installed == probed + 1)
        peer.update()  # in kernel mode
        if rekey:
            for target, expected in ((b"/big", CONTENT), (b"/small.txt", b"small")):
                peer.ask(target)
                assert peer.body(len(expected)) == expected
            assert fake.rekeyed == renewed + 1
        else:
            assert peer.tls.recv(1) == b""  # close_notify: the keys can't be renewed, nothing is owed
        peer.sock.close()


def test_a_key_update_in_pieces_is_noticed(root):
    """The record comes byte by byte: no single read holds it."""
    fake = FakeKernel()
    with ThreadServer(root, fake, handover_bytes=0) as server:
        renewed = fake.rekeyed
        peer = Peer(server.port)
        peer.ask(b"/small.txt")
        assert peer.body(5) == b"small"
        whole = _Recorder(peer.tls)
        peer.update()
        for byte in whole.stop():
            peer.sock.sendall(bytes([byte]))
            time.sleep(0.001)
        peer.ask(b"/small.txt")
        assert peer.body(5) == b"small"
        assert fake.rekeyed == renewed + 1
        peer.sock.close()


@pytest.mark.parametrize("count", [1, 2, 3, 50])
@pytest.mark.parametrize("first", ["request", "updates"])
def test_several_key_updates_in_one_read_before_the_hand_over(root, count, first):
    """OpenSSL answers each; the keys that the kernel gets must be so many generations on."""
    for kernel in (FakeKernel(), None):
        with ThreadServer(root, kernel, handover_bytes=0) as server:
            peer = Peer(server.port)
            whole = _Recorder(peer.tls)
            if first == "request":
                peer.ask(b"/small.txt")
            for _ in range(count):
                peer.update()
            if first == "updates":
                peer.ask(b"/small.txt")
            peer.sock.sendall(whole.stop())
            assert peer.body(5) == b"small"
            peer.ask(b"/big")
            assert peer.body(len(CONTENT)) == CONTENT
            peer.sock.close()


@pytest.mark.parametrize("ending", ["forged", "alert", "nothing", "close"])
def test_no_line_of_the_key_log_stays_in_its_pipe(root, ending):
    """600 KeyUpdates log 111 KB, and a pipe that is full blocks OpenSSL, and with it the worker."""
    with ThreadServer(root, FakeKernel(), handover_bytes=1 << 30) as server:
        victim = Client(server.port)
        for _ in range(3):
            peer = Peer(server.port)
            peer.ask(b"/small.txt")
            assert peer.body(5) == b"small"
            whole = _Recorder(peer.tls)
            for _ in range(600):
                peer.update(requested=False)
            data = whole.stop()
            if ending == "forged":
                data += b"\x17\x03\x03\x00\x20" + bytes(32)
            elif ending == "alert":
                data += b"\x15\x03\x03\x00\x02\x02\x28"
            peer.sock.sendall(data)
            if ending == "close":
                peer.sock.shutdown(socket.SHUT_WR)
            time.sleep(0.1)
            assert victim.get("/small.txt").body == b"small"
            left = array.array("i", [0])
            fcntl.ioctl(server.worker._keylog._read, termios.FIONREAD, left)
            assert left[0] == 0
            peer.sock.close()
        victim.close()


def test_the_key_log_is_looked_at_when_something_else_than_requests_came(root, monkeypatch):
    drains = []
    real = KeyLogPipe.drain

    def counting(self):
        drains.append(real(self))
        return drains[-1]

    monkeypatch.setattr(KeyLogPipe, "drain", counting)
    with ThreadServer(root, FakeKernel(), handover_bytes=0) as server:
        peer = Peer(server.port)
        peer.ask(b"/small.txt")
        assert peer.body(5) == b"small"
        before = len(drains)
        for _ in range(3):
            peer.ask(b"/small.txt")
            assert peer.body(5) == b"small"
        assert len(drains) == before, "a request and nothing else"
        peer.update()
        peer.ask(b"/small.txt")
        assert peer.body(5) == b"small"
        assert any(b"CLIENT_TRAFFIC_SECRET_N" in lines for lines in drains[before:]), drains[before:]
        before = len(drains)
        whole = _Recorder(peer.tls)
        peer.ask(b"/small.txt")
        data = whole.stop()
        peer.sock.sendall(data[:30])
        time.sleep(0.05)
        peer.sock.sendall(data[30:])
        assert peer.body(5) == b"small"
        assert len(drains) == before + 2, "where records end is not known any more"
        peer.sock.close()


class _Recorder:
    """Keeps what a tlslite connection would write to its socket."""

    def __init__(self, tls):
        self._buffered = tls.sock
        self._send, self.data = self._buffered.send, b""
        self._buffered.send = self._take

    def _take(self, data):
        self.data += bytes(data)
        return len(data)

    def stop(self):
        self._buffered.flush()
        self._buffered.send = self._send
        return self.data


def test_a_key_update_is_answered_while_the_last_response_runs(root):
    """Behind Connection: close no request is read, but TLS is."""
    fake = FakeKernel()
    with ThreadServer(root, fake, handover_bytes=0, send_buffer=16_384) as server:
        renewed = fake.rekeyed
        peer = Peer(server.port)
        peer.ask(b"/big", b"Connection: close\r\n")
        first = peer.tls.recv(1000)
        peer.update()
        out = bytearray(first)
        while data := peer.tls.recv(1 << 16):
            out += data
        assert bytes(out).partition(b"\r\n\r\n")[2] == CONTENT
        assert fake.rekeyed == renewed + 1
        peer.sock.close()


def test_a_rekey_the_kernel_refuses_aborts_the_connection(root):
    """The client has been told of the new key and the kernel has the old one: nothing right could follow."""
    fake = FakeKernel()
    with ThreadServer(root, fake, handover_bytes=0) as server:
        peer = Peer(server.port)
        peer.ask(b"/small.txt")
        assert peer.body(5) == b"small"
        fake.faults["TLS_TX"] = 12
        peer.update()
        peer.ask(b"/big")
        with pytest.raises((TLSError, OSError, AssertionError)):
            peer.body(len(CONTENT))
        wait_until(lambda: not server.worker._connections)
        assert server.metrics.counters["ended:PeerTruncated"] == 1
        assert server.metrics.counters["ended:bug"] == 0
        peer.sock.close()


@pytest.mark.parametrize("call", ["send", "sendfile", "send_control"])
def test_a_kernel_out_of_memory_aborts_that_connection_only(root, call):
    from ktlsd.errors import PeerTruncated

    class Exhausted(FakeKernel):
        armed = False

        def fail(self):
            if self.armed:
                raise PeerTruncated("connection lost: Cannot allocate memory")

        def send(self, sock, buffers, *, more):
            self.fail() if call == "send" else None
            return super().send(sock, buffers, more=more)

        def sendfile(self, sock, fd, offset, count):
            self.fail() if call == "sendfile" else None
            return super().sendfile(sock, fd, offset, count)

        def send_control(self, sock, content_type, payload):
            self.fail() if call == "send_control" else None
            return super().send_control(sock, content_type, payload)

    kernel = Exhausted()
    with ThreadServer(root, kernel, handover_bytes=0) as server:
        peer, other = Client(server.port), Client(server.port)
        assert peer.get("/small.txt").body == b"small"
        kernel.armed = True
        with pytest.raises(ConnectionError):
            peer.get("/big", Connection="close")
            peer.wait_for_close()
            assert call == "send_control"
            raise ConnectionError("the body was whole")
        assert not peer.tls.closed
        kernel.armed = False
        assert other.get("/big").body == CONTENT
        assert server.metrics.counters["ended:bug"] == 0
        peer.close()
        other.close()


@pytest.mark.parametrize("number", [12, 105, 74, 5])
def test_what_a_send_says_when_the_kernel_can_not(number):
    """ENOMEM, ENOBUFS, EBADMSG, EIO end the connection like a lost peer; they are no bug of ours."""
    from ktlsd.errors import PeerTruncated

    class Refusing:
        def send(self, *_):
            raise OSError(number, "refused")

        def sendmsg(self, *_):
            raise OSError(number, "refused")

    for ask in (
        lambda: LinuxKernel().send(Refusing(), [b"x"], more=False),
        lambda: LinuxKernel().send_control(Refusing(), 21, b"\1\0"),
    ):
        with pytest.raises(PeerTruncated):
            ask()


@pytest.mark.ktls
def test_a_socket_that_has_the_ulp_already_is_taken():
    """EEXIST of TCP_ULP."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        LinuxKernel().attach_ulp(sock)
        LinuxKernel().attach_ulp(sock)


def test_renegotiation_is_refused(root, tmp_path):
    """openssl s_client's R, in TLS 1.2: the alert no_renegotiation, then the end."""
    with ThreadServer(root, None) as server:
        command = ["openssl", "s_client", "-tls1_2", "-connect", f"127.0.0.1:{server.port}", "-servername", "localhost"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            said = b""
            while b"Verify return code" not in said:
                said += process.stdout.readline()
            process.stdin.write(b"R\n")
            process.stdin.flush()
            wait_until(lambda: server.metrics.counters["ended:UnexpectedMessage"] == 1)
            process.stdin.close()
            rest = process.stdout.read()
        assert b"no renegotiation" in rest


def test_an_alert_reaches_a_client_with_much_unread(root):
    """Dropped with input unread, TCP would reset and the alert be lost."""
    with ThreadServer(root, None, limits=Limits(linger_timeout=1.0)) as server:
        server.context.minimum_version = ssl.TLSVersion.TLSv1_3
        peer = MemoryClient(context("TLSv1.2", "AES-128-GCM"))
        peer.advance()
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(peer.take() + bytes(200_000))
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while data := sock.recv(1000):
                answer += data
        with pytest.raises(SSL.Error, match="alert protocol version"):
            peer.receive(answer)


def test_plain_http_with_a_long_body_gets_its_answer(root):
    with ThreadServer(root, None, limits=Limits(linger_timeout=1.0)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000))
            answer = sock.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 400 ")
        wait_until(lambda: not server.worker._connections)


def test_a_client_that_never_closes_after_an_alert_is_dropped(root):
    with (
        ThreadServer(root, None, limits=Limits(linger_timeout=0.2)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock,
    ):
        sock.sendall(b"\x16\x03\x01\x00\x05nonsense")
        wait_until(lambda: server.metrics.counters["ended:HandshakeFailed"] == 1)
        wait_until(lambda: not server.worker._connections)
