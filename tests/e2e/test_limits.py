"""What one client may have, and what it costs the others: nothing."""

import contextlib
import socket
import ssl
import struct
import threading
import time

import pytest

from ktlsd.settings import Limits
from tests import pki
from tests.client import Client, wait_until
from tests.e2e.modes import kernel_of
from tests.h2client import Http2Client
from tests.serving import ThreadServer

CONTENT = bytes(range(256)) * 4096 * 8  # 8 MiB


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "big").write_bytes(CONTENT)
    (folder / "small").write_bytes(b"small")
    return folder


def serving(root, *, mode="userspace", proxies=(), **limits):
    return ThreadServer(root, kernel_of(mode), limits=Limits(**limits), proxies=proxies, handover_bytes=0)


def counted(server, name):
    return server.metrics.counters[name]


# --- connections ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["client", "subnet"])
def test_more_connections_than_a_client_may_have_are_closed_at_once(root, caplog, limit):
    with serving(root, **{f"connections_per_{limit}": 3}) as server:
        clients = [Client(server.port) for _ in range(3)]
        for client in clients:
            assert client.get("/small").body == b"small"
        for _ in range(5):
            with pytest.raises(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
                if not sock.recv(1):
                    raise ConnectionResetError
        wait_until(lambda: counted(server, f"turned_away:{limit}") == 5)
        assert caplog.text.count(f"limits.connections_per_{limit}") == 1, "said once, then counted"
        clients.pop().close()
        wait_until(lambda: len(server.worker._connections) == 2)
        again = Client(server.port)
        assert again.get("/small").body == b"small"
        for client in (*clients, again):
            assert client.get("/small").body == b"small"
            client.close()


def test_handshakes_that_are_never_finished_make_room_for_others(root):
    with serving(root, handshakes=4) as server:
        served = Client(server.port)
        assert served.get("/small").body == b"small"  # it is through
        stalled = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(12)]
        wait_until(lambda: counted(server, "turned_away:handshakes") == 8)
        assert stalled[0].recv(1) == b"", "the oldest went first"
        other = Client(server.port)
        assert other.get("/small").body == served.get("/small").body == b"small"
        for each in (*stalled, served, other):
            each.close()


def test_more_responses_than_there_may_be_get_503(root):
    with serving(root, responses=5) as server:
        client = Http2Client(server.port, window=0)
        waiting = [client.ask("/big") for _ in range(8)]
        while not all(client.streams[number].status for number in waiting):
            client.read()
            client.understand()
        assert sorted(client.streams[number].status for number in waiting) == [200] * 5 + [503] * 3
        client.close()
        wait_until(lambda: server.metrics.answering == 0)
        other = Client(server.port)
        assert other.get("/small").status == 200
        other.close()


# --- rates ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["userspace", "fake", pytest.param("kernel", marks=pytest.mark.ktls)])
def test_a_client_that_takes_too_little_is_cut_and_a_slow_one_is_not(root, mode):
    with serving(root, mode=mode, min_rate=100_000, min_rate_grace=0.5) as server:
        slow, steady = (Client(server.port, receive_buffer=8_192) for _ in range(2))
        for client in (slow, steady):
            client.send(b"GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n")
            client.head()
        end = time.monotonic() + 20
        while not counted(server, "ended:Overdue") and time.monotonic() < end:
            steady.until(20_000)  # many times the rate that is asked for
            time.sleep(0.02)
        assert counted(server, "ended:Overdue") == 1
        steady.until(20_000)
        for client in (slow, steady):
            client.close()


def test_a_client_that_is_idle_between_downloads_is_not_slow(root):
    with serving(root, min_rate=1_000_000, min_rate_grace=0.2) as server:
        client = Client(server.port)
        for _ in range(3):
            assert client.get("/small").status == 200
            time.sleep(0.5)
        assert client.get("/big").body == CONTENT
        client.close()


def test_bandwidth_of_a_connection_is_kept_by_the_kernel(root):
    """4 MB/s: 8 MiB can't be there in one second."""
    with serving(root, bandwidth_per_connection=4_000_000) as server:
        client = Client(server.port)
        begun = time.monotonic()
        assert client.get("/big").body == CONTENT
        assert time.monotonic() - begun > 1.0
        client.close()


def test_one_connection_gets_as_much_of_a_full_pipe_as_eight_of_another_client(root):
    """Who is who is told by a proxy. What is compared are bytes, not times: the pipe is far slower than the machine."""
    with serving(root, bandwidth=20_000_000, proxies=("127.0.0.0/8",)) as server:
        got = {"192.0.2.1": 0, "192.0.2.2": 0}
        over, count = threading.Event(), threading.Event()

        def download(host):
            tls = proxied(server.port, host)
            while not over.is_set():
                tls.sendall(b"GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n")
                left = len(CONTENT)
                head = b""
                while b"\r\n\r\n" not in head:
                    head += tls.recv(1)
                while left and not over.is_set():
                    taken = len(tls.recv(min(left, 65_536)))
                    left -= taken
                    if count.is_set():
                        got[host] += taken
            tls.close()

        threads = [threading.Thread(target=download, args=(host,)) for host in ["192.0.2.1"] * 8 + ["192.0.2.2"]]
        for thread in threads:
            thread.start()
        count.set()
        seen = []
        for _ in range(20):  # it takes a few seconds to find the level, more where others use the machine
            before = dict(got)
            time.sleep(2)
            shares = [got[host] - before[host] for host in got]
            seen.append(shares[1] / max(shares[0], 1))
            if 0.5 < seen[-1] < 2:
                break
        over.set()
        for thread in threads:
            thread.join(20)
        assert 0.5 < seen[-1] < 2, seen


# --- the PROXY protocol ---------------------------------------------------------------------------------------------------


def v2(host, port=40_000):
    body = socket.inet_aton(host) + socket.inet_aton("192.0.2.200") + struct.pack("!HH", port, 443)
    return b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + struct.pack("!H", len(body)) + body


def proxied(port, host):
    sock = socket.create_connection(("127.0.0.1", port), timeout=30)
    sock.sendall(v2(host))
    context = ssl.create_default_context(cadata=pki.ca_text())
    return context.wrap_socket(sock, server_hostname="localhost")


def ask(tls):
    tls.sendall(b"GET /small HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = b""
    while data := tls.recv(65_536):
        answer += data
    return answer


@pytest.mark.parametrize("header", [b"PROXY TCP4 192.0.2.7 192.0.2.200 40000 443\r\n", v2("192.0.2.7")])
def test_who_the_proxy_says_is_the_client_in_the_log(root, tmp_path, header):
    with ThreadServer(root, None, proxies=("127.0.0.0/8",), log_file=tmp_path / "log") as server:
        context = ssl.create_default_context(cadata=pki.ca_text())
        for pieces in ([header], [header[:1], header[1:20], header[20:]]):
            sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(0.01)
            with context.wrap_socket(sock, server_hostname="localhost") as tls:
                assert ask(tls).endswith(b"small")
        wait_until(lambda: len(server.entries()) == 2)
        assert {entry["client"] for entry in server.entries()} == {"192.0.2.7"}


def test_a_proxy_that_sends_no_header_is_refused_and_told_in_the_log(root, caplog):
    caplog.set_level("INFO", "ktlsd")
    with serving(root, proxies=("127.0.0.0/8",), header_timeout=0.3) as server:
        for sent in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"PROXY TCP4 1.2.3.4\r\n"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
                sock.sendall(sent)
                with pytest.raises((ConnectionResetError, EOFError)):
                    if sock.recv(1) == b"":
                        raise EOFError
        wait_until(lambda: counted(server, "turned_away:ProxyHeaderError") == 3)
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(b"PROXY TCP4 1.2")
            with pytest.raises(ConnectionResetError):  # with input unread
                sock.recv(1)
        wait_until(lambda: counted(server, "turned_away:Overdue") == 1)
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(b"PROXY TCP4 1.2")
        wait_until(lambda: counted(server, "turned_away:PeerTruncated") == 1)
        assert ask(proxied(server.port, "192.0.2.1")).endswith(b"small")
        assert not server.worker._entrance._arrivals


def test_who_is_no_trusted_proxy_can_not_say_who_it_is(root):
    with serving(root, proxies=("192.0.2.0/24",)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(v2("192.0.2.7"))
            wait_until(lambda: counted(server, "handshake_failures:HandshakeFailed") == 1)
        client = Client(server.port)
        assert client.get("/small").body == b"small"
        client.close()


def test_limits_are_about_the_client_behind_the_proxy(root):
    with serving(root, proxies=("127.0.0.0/8",), connections_per_client=1) as server:
        first, second = proxied(server.port, "192.0.2.1"), proxied(server.port, "192.0.2.2")
        with pytest.raises(OSError):
            proxied(server.port, "192.0.2.1")
        assert ask(first).endswith(b"small")
        assert ask(second).endswith(b"small")


def test_descriptors_that_run_out_pause_accepting_and_nobody_spins(root, monkeypatch):
    from ktlsd.net import listeners

    real, failing = listeners.Listener.try_accept, threading.Event()
    asked = []

    def try_accept(self):
        if failing.is_set():
            asked.append(1)
            raise OSError(24, "Too many open files")
        return real(self)

    monkeypatch.setattr(listeners.Listener, "try_accept", try_accept)
    with serving(root) as server:
        before = Client(server.port)
        failing.set()
        waiting = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        time.sleep(1.2)
        assert before.get("/small").body == b"small", "who is in is served"
        assert 1 <= len(asked) <= 4
        failing.clear()
        after = Client(server.port)
        assert after.get("/small").body == b"small"
        for each in (before, waiting, after):
            each.close()


def test_proxied_connections_that_never_say_who_they_are_make_room_again(root):
    with serving(root, proxies=("127.0.0.0/8",), connections=3, header_timeout=0.4) as server:
        silent = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(4)]
        wait_until(lambda: counted(server, "accept_paused:connections") >= 1)
        assert ask(proxied(server.port, "192.0.2.1")).endswith(b"small")
        for each in silent:
            each.close()


def test_nobody_is_cut_for_what_we_hold_back(root, tmp_path):
    from ktlsd.errors import SettingsError
    from ktlsd.settings import Settings
    from ktlsd.validation import validate

    with pytest.raises(SettingsError, match="bandwidth_per_connection: must be twice"):
        validate(Settings(root=str(root), limits=Limits(min_rate=1_000, bandwidth_per_connection=1_500)))
    validate(Settings(root=str(root), limits=Limits(min_rate=1_000, bandwidth_per_connection=2_000)))
    validate(Settings(root=str(root), limits=Limits(min_rate=None, bandwidth_per_connection=1)))


def test_a_job_that_comes_back_when_a_client_is_too_slow_ends_no_worker(tmp_path):
    """A hostile client: a download it doesn't take, and a wrong password just when that is noticed."""
    from ktlsd.server.auth import hash_password
    from ktlsd.settings import Rule, Settings
    from tests.e2e.test_operating import basic

    (tmp_path / "root").mkdir()
    (tmp_path / "root/big").write_bytes(CONTENT)
    (tmp_path / "users").write_text(f"anna:{hash_password('a')}\n")
    rules = (Rule(path="/locked/**", auth=str(tmp_path / "users")),)
    made = Settings(root=str(tmp_path / "root"), rule=rules)
    limits = Limits(min_rate=1_000_000, min_rate_grace=0.2)
    with ThreadServer(tmp_path / "root", None, limits=limits, settings=made) as server:
        for pause in (0.1, 0.18, 0.2, 0.25, 0.38, 0.4, 0.42):
            client = Http2Client(server.port, window=0, auto=False)
            client.ask("/big")
            end = time.monotonic() + pause
            while time.monotonic() < end:
                time.sleep(0.02)
            with contextlib.suppress(OSError):  # it may have been cut already
                for _ in range(3):
                    client.ask("/locked/x", authorization=basic("anna", str(pause)))
            time.sleep(0.3)
            client.close()
        other = Client(server.port)
        assert other.get("/nothing").status == 404
        other.close()
        assert counted(server, "ended:bug") == 0


def test_probes_are_answered_when_there_is_no_room_for_anybody_else(tmp_path):
    import urllib.request

    from tests.serving import program

    (tmp_path / "root").mkdir()
    pki.write(tmp_path)
    (tmp_path / "k.toml").write_text(
        'root = "root"\nworkers = 1\nlisten = ["127.0.0.1:0"]\n[tls]\ncert = "cert.pem"\nkey = "key.pem"\n'
        '[limits]\nconnections = 3\n[metrics]\nlisten = ["127.0.0.1:0"]\n'
    )
    with program("--config", "k.toml", cwd=tmp_path) as server:
        base = next(line for line in server.told if "/metrics" in line).split()[-1].removesuffix("/metrics")
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(5)]
        for _ in range(3):
            assert urllib.request.urlopen(base + "/healthz", timeout=10).read() == b"ok\n"
        for each in held:
            each.close()
        client = Client(server.port)
        assert client.get("/nothing").status == 404
        client.close()
        assert server.stop() == 0
