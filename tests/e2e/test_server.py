"""A worker and its clients: what a client sees, in userspace mode and over a kernel that encrypts."""

import hashlib
import os
import random
import socket
import ssl
import time

import pytest
from OpenSSL import SSL

from ktlsd.net.kernel import LinuxKernel
from ktlsd.settings import Limits
from tests.client import Client, MemoryClient, context, wait_until
from tests.e2e.modes import MODES, kernel_of
from tests.fakes.kernel import FakeKernel, nibbling
from tests.serving import ThreadServer

CONTENT = random.Random(2).randbytes(700_001)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "dir").mkdir(parents=True)
    (folder / "empty-dir").mkdir()
    (folder / ".hidden").write_bytes(b"hidden")
    (folder / ".well-known").mkdir()
    (folder / ".well-known/x").write_bytes(b"known")
    (folder / "big").write_bytes(CONTENT)
    (folder / "small.txt").write_bytes(b"small")
    (folder / "empty").write_bytes(b"")
    (folder / "index.html").write_bytes(b"<h1>home</h1>")
    (folder / "dir/index.html").write_bytes(b"dir")
    (folder / b"\xff odd".decode("utf-8", "surrogateescape")).write_bytes(b"odd")
    return folder


@pytest.fixture(params=MODES)
def kernel(request):
    return kernel_of(request.param)


@pytest.fixture
def server(root, kernel, tmp_path):
    with ThreadServer(root, kernel, log_file=tmp_path / "log", handover_bytes=100_000) as running:
        yield running


@pytest.fixture
def client(server):
    peer = Client(server.port)
    yield peer
    peer.close()


def test_files_keep_alive_and_ranges(client):
    for _ in range(2):
        reply = client.get("/big")
        assert (reply.status, reply.body) == (200, CONTENT)
        assert client.get("/small.txt").body == b"small"
        assert client.get("/empty").body == b""
        part = client.get("/big", Range="bytes=100-599999")
        assert (part.status, part.body) == (206, CONTENT[100:600_000])
        assert part.headers["content-range"] == "bytes 100-599999/700001"


def test_fields_that_downloads_rely_on(client):
    reply = client.get("/small.txt")
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    assert reply.headers["accept-ranges"] == "bytes"
    assert {"date", "etag", "last-modified", "content-length"} <= reply.headers.keys()
    again = client.get("/small.txt", If_None_Match=reply.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    assert again.headers["etag"] == reply.headers["etag"]
    assert client.get("/big", Range="bytes=-1", If_Range='"other"').status == 200
    assert client.get("/big", Range="bytes=700001-").status == 416


def test_head_has_gets_header(client):
    for target in ("/big", "/small.txt", "/nothing", "/dir"):
        get = client.get(target)
        client.send(f"HEAD {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head = client.reply(body=False)
        assert {**head.headers, "date": ""} == {**get.headers, "date": ""}
        assert head.status == get.status


def test_pipelined_requests_are_answered_in_order(client):
    client.send(
        b"".join(b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % name for name in (b"big", b"small.txt", b"empty", b"big") * 10)
    )
    for _ in range(10):
        assert [client.reply().body for _ in range(4)] == [CONTENT, b"small", b"", CONTENT]


def test_index_redirect_and_hidden(client):
    assert client.get("/").body == b"<h1>home</h1>"
    redirect = client.get("/dir?a=b")
    assert (redirect.status, redirect.headers["location"]) == (301, "/dir/?a=b")
    assert client.get("/dir/").body == b"dir"
    assert client.get("/%FF%20odd").body == b"odd"
    assert client.get("/.well-known/x").body == b"known"
    for target in ("/.hidden", "/nothing", "/small.txt/", "/small.txt/x"):
        assert client.get(target).status == 404
    for target in ("/../secret", "/%2e%2e/secret", "/a%00", "/%zz", "/a%2fb"):
        assert client.get(target).status == 400


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n", 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc", 405),
        (b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\nConnection: close\r\n\r\n", 405),
        (b"BREW / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 501),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    ],
)
def test_bad_requests_get_a_status_and_a_clean_end(client, request_, status):
    client.send(request_)
    reply = client.reply()
    client.wait_for_close()
    assert (reply.status, client.tls.closed) == (status, True)
    assert reply.headers["connection"] == "close"


def test_a_half_closed_client_gets_its_answer(client):
    client.send(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
    client.tls.ssl.shutdown()
    client.flush()
    assert client.reply().body == CONTENT
    client.wait_for_close()
    assert client.tls.closed


def test_a_file_replaced_during_the_download_is_sent_as_it_was_opened(client, root):
    client.send(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
    client.head()
    (root / "new").write_bytes(b"new")
    (root / "new").rename(root / "big")
    assert client.until(len(CONTENT)) == CONTENT
    assert client.get("/big").body == b"new"


def test_a_file_that_shrinks_ends_in_a_visible_abort(root, kernel, tmp_path):
    with ThreadServer(root, kernel, log_file=tmp_path / "log", send_buffer=16_384) as server:
        peer = Client(server.port, receive_buffer=16_384)
        (root / "shrinks").write_bytes(CONTENT * 4)
        peer.send(b"GET /shrinks HTTP/1.1\r\nHost: x\r\n\r\n")
        peer.head()
        os.truncate(root / "shrinks", 10)
        with pytest.raises(ConnectionError):
            peer.until(4 * len(CONTENT))
        assert not peer.tls.closed
        server.stop()
        assert server.metrics.counters["ended:FileTruncated"] == 1
        assert [e["complete"] for e in server.entries()] == [False]


def test_many_clients_at_once(server):
    peers = [Client(server.port) for _ in range(20)]
    for peer in peers:
        peer.send(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
    for peer in peers:
        assert hashlib.sha256(peer.reply().body).digest() == hashlib.sha256(CONTENT).digest()
        peer.close()


def test_the_log_proves_who_encrypted(server, client, kernel):
    client.get("/small.txt")
    client.get("/big", Range="bytes=1-", User_Agent="me")
    client.close()
    server.stop()
    small, big = server.entries()
    assert (small["status"], small["bytes"], small["tls"]["tx"]) == (200, 5, "userspace")
    assert (big["status"], big["bytes"], big["complete"], big["range"], big["user_agent"]) == (
        206,
        700_000,
        True,
        "bytes=1-",
        "me",
    )
    assert (big["tls"]["version"], big["tls"]["cipher"]) == ("TLSv1.3", "TLS_AES_256_GCM_SHA384")
    if kernel is None:
        assert (big["tls"]["tx"], big["tls"]["why"]) == ("userspace", "switched off")
    else:
        assert (big["tls"]["tx"], big["tls"]["why"]) == ("kernel", None)
        assert small["tls"]["why"] == "no response of handover_bytes yet"


# --- the rest does not depend on who encrypts --------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[b"\r\n"], [b"\r", b"\n"]])
def test_empty_lines_do_not_put_off_the_idle_deadline(root, ends):
    turn = 0
    with ThreadServer(root, None, limits=Limits(idle_timeout=0.4, header_timeout=0.4, linger_timeout=0.2)) as server:
        peer = Client(server.port)
        end = time.monotonic() + 5
        with pytest.raises(OSError):
            while True:
                assert time.monotonic() < end, "it is kept open by empty lines"
                peer.send(ends[turn % len(ends)])
                turn += 1
                time.sleep(0.05)
        peer.close()


def test_one_flooding_client_does_not_have_the_worker_for_itself(root):
    """Nothing of a flood is a request, and another client is served meanwhile."""
    with ThreadServer(root, None) as server:
        flood, other = Client(server.port), Client(server.port)
        flood.send(b"GET /small.txt HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        flood.tls.send(bytes(2 << 20))
        out = flood.tls.take()
        import threading

        def pour():
            try:
                flood.sock.sendall(out)
            except OSError:
                pass

        thread = threading.Thread(target=pour)
        thread.start()
        assert other.get("/small.txt").body == b"small"
        thread.join(20)
        assert not thread.is_alive()
        flood.close()
        other.close()


def test_a_response_of_very_many_segments_goes_out(root):
    """More buffers than one sendmsg takes (EMSGSIZE)."""
    from ktlsd.net.channel import HandoverPolicy
    from tests.contract.test_channel import ALL_TAKEN, Pair

    for policy in (HandoverPolicy(off="switched off"), HandoverPolicy(ALL_TAKEN, handover_bytes=0)):
        pair = Pair(FakeKernel() if not policy.off else LinuxKernel(), policy)
        pair.send_all([b"%05d" % n for n in range(3000)])
        assert pair.read(15_000) == b"".join(b"%05d" % n for n in range(3000))
        pair.done()


def test_a_client_that_resets_while_we_close_is_let_go_at_once(root, kernel):
    """What TCP has not taken then it never will: there is nothing to wait for, and nothing to spin on."""
    with ThreadServer(root, kernel, send_buffer=16_384, handover_bytes=0) as server:
        for number in range(6):
            peer = Client(server.port, receive_buffer=16_384)
            peer.send(
                b"GET /big HTTP/1.1\r\nHost: x\r\nRange: bytes=0-%d\r\nConnection: close\r\n\r\n" % (60_000 + 20_000 * number)
            )
            peer.head()
            time.sleep(0.05)
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            peer.close()
        wait_until(lambda: not server.worker._connections, 3)
        assert server.metrics.counters["ended:bug"] == 0


def test_sessions_are_resumed(root):
    with ThreadServer(root, None) as server:
        for version in ("TLSv1.2", "TLSv1.3"):
            ctx = context(version, "AES-128-GCM")
            first = Client(server.port, ctx=ctx)
            first.get("/small.txt")
            session = first.tls.ssl.get_session()
            first.tls.ssl.shutdown()
            first.close()
            second = Client(server.port, ctx=ctx, session=session)
            assert second.get("/small.txt").body == b"small"
            second.close()
        wait_until(lambda: server.metrics.counters["handshakes:resumed"] == 2)


def test_plain_http_on_the_tls_port_is_told_so(root):
    with ThreadServer(root, None) as server, socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = sock.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"https://" in answer
    assert int(answer.split(b"Content-Length: ")[1].split(b"\r\n")[0]) == len(answer.partition(b"\r\n\r\n")[2])


def test_a_failed_handshake_gets_its_alert(root):
    with ThreadServer(root, None) as server:
        server.context.minimum_version = ssl.TLSVersion.TLSv1_3
        with pytest.raises(SSL.Error, match="alert protocol version"):
            Client(server.port, "TLSv1.2")
        wait_until(lambda: server.metrics.counters["ended:HandshakeFailed"] == 1)


@pytest.mark.parametrize(
    ("before", "status"),
    [(b"", None), (b"GET / HTTP/1.1\r\nHos", 408), (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab", 408)],
)
def test_idle_and_slow_clients_are_ended(root, before, status):
    with ThreadServer(root, None, limits=Limits(idle_timeout=0.2, header_timeout=0.2)) as server:
        peer = Client(server.port)
        if before:
            peer.send(before)
            assert peer.reply().status == status
        peer.wait_for_close()
        assert peer.tls.closed
        peer.close()


def test_a_handshake_that_does_not_come_is_ended(root):
    with ThreadServer(root, None, limits=Limits(handshake_timeout=0.2)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
            assert sock.recv(1) == b""
        wait_until(lambda: server.metrics.counters["ended:Overdue"] == 1)


def test_a_client_that_takes_nothing_is_ended_and_a_slow_one_is_not(root, kernel):
    limits = Limits(progress_timeout=0.4)
    huge = CONTENT * 8
    (root / "huge").write_bytes(huge)
    with ThreadServer(root, kernel, limits=limits, send_buffer=16_384, handover_bytes=0) as server:
        slow, stalled = (Client(server.port, receive_buffer=16_384) for _ in range(2))
        for peer in (slow, stalled):
            peer.send(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")
        slow.head()
        start = time.monotonic()
        while len(slow.tls.plain) < len(huge) * 3 // 4:  # slow, but progressing, for longer than the timeout
            slow.fill()
            time.sleep(0.02)
        assert time.monotonic() - start > 2 * limits.progress_timeout
        assert slow.until(len(huge)) == huge
        with pytest.raises(ConnectionError):
            stalled.head()
            stalled.until(len(huge))
        slow.close()


def test_drain_finishes_what_runs_and_ends_what_idles(root, kernel, tmp_path):
    with ThreadServer(root, kernel, send_buffer=16_384, handover_bytes=0, log_file=tmp_path / "log") as server:
        busy, idle = Client(server.port, receive_buffer=16_384), Client(server.port)
        idle.get("/small.txt")
        busy.send(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        busy.head()
        import signal

        server.worker.waker.write(signal.SIGTERM)
        idle.wait_for_close()
        assert idle.tls.closed
        idle.close()
        assert busy.until(len(CONTENT)) == CONTENT
        busy.wait_for_close()
        assert busy.tls.closed
        busy.close()
        wait_until(lambda: not server._thread.is_alive())
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.1", server.port))


def test_over_the_connection_limit_clients_wait_and_are_served(root):
    with ThreadServer(root, None, limits=Limits(connections=2)) as server:
        first, second = Client(server.port), Client(server.port)
        third = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        peer = MemoryClient(context("TLSv1.3", "AES-128-GCM"))
        peer.advance()
        third.sendall(peer.take())
        assert first.get("/small.txt").body == b"small"
        first.close()
        assert third.recv(10), "its handshake goes on once a place is free"
        third.close()
        second.close()


def test_no_descriptor_is_left_behind(root):
    with ThreadServer(root, FakeKernel(appetite=nibbling(1, blocks=False)), handover_bytes=0) as server:
        Client(server.port).close()
        before = len(os.listdir("/proc/self/fd"))
        for i in range(30):
            peer = Client(server.port)
            if i % 3 == 0:
                peer.get("/big")
            elif i % 3 == 1:
                peer.send(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n" * 9)
            peer.close()
        wait_until(lambda: not server.worker._connections)
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)  # what is asked for often stays open for a moment
