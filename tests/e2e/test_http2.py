"""HTTP/2 over the whole server: what a client gets, in userspace mode and over a kernel that encrypts, however framed."""

import os
import random
import re
import subprocess
import threading

import pytest

from ktlsd.net.tx_kernel import Framing
from ktlsd.server.connection import Connection
from ktlsd.settings import Limits
from tests.client import Client, context, wait_until
from tests.e2e.modes import MODES, kernel_of
from tests.h2client import Http2Client, http2_context
from tests.h2peer import PREFACE, raw
from tests.serving import ThreadServer

CONTENT = random.Random(4).randbytes(700_001)
WAYS = [pytest.param("userspace", Framing.COPY, id="userspace")] + [
    pytest.param(mode, framing, id=f"{name}-{framing.value}", marks=pytest.mark.ktls if name == "kernel" else ())
    for mode, name in (("fake", "fake"), ("nibbling", "nibbling"), ("kernel", "kernel"))
    for framing in Framing
]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "dir").mkdir(parents=True)
    (folder / "big").write_bytes(CONTENT)
    (folder / "other").write_bytes(CONTENT[::-1])
    (folder / "10k").write_bytes(CONTENT[:10_240])
    (folder / "frame").write_bytes(CONTENT[:16_384])
    (folder / "empty").write_bytes(b"")
    (folder / "dir/index.html").write_bytes(b"dir")
    for number in range(300):
        (folder / f"dir-{number:03}").mkdir()
    return folder


@pytest.fixture
def server(root, tmp_path, request):
    mode, framing = getattr(request, "param", ("userspace", Framing.COPY))
    with ThreadServer(root, kernel_of(mode), log_file=tmp_path / "log", handover_bytes=100_000, framing=framing) as running:
        yield running


def in_every_way(function):
    return pytest.mark.parametrize(("mode", "framing"), WAYS)(function)


@pytest.fixture
def serve(root, tmp_path):
    running = []

    def start(mode, framing, **options):
        server = ThreadServer(
            root, kernel_of(mode), log_file=tmp_path / "log", handover_bytes=100_000, framing=framing, **options
        )
        running.append(server)
        return server.__enter__()

    yield start
    for server in running:
        server.stop()


@in_every_way
def test_files_of_all_sizes(serve, mode, framing):
    client = Http2Client(serve(mode, framing).port, window=1 << 20, connection_window=1 << 24)
    wanted = {"10k": CONTENT[:10_240], "big": CONTENT, "frame": CONTENT[:16_384], "empty": b"", "other": CONTENT[::-1]}
    for name, body in [*wanted.items(), ("big", CONTENT), ("big", CONTENT)]:  # at the second time it is mapped
        stream = client.fetch(f"/{name}")
        assert stream.status == 200
        assert stream.body == body
    client.close()


@in_every_way
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_many_streams_at_a_time(serve, mode, framing, version):
    client = Http2Client(serve(mode, framing).port, window=30_000, connection_window=100_000, version=version)
    wanted = {}
    for number in range(20):
        name = ("big", "other", "10k")[number % 3]
        wanted[client.ask(f"/{name}", range=f"bytes={number * 100}-{number * 100 + 90_000}")] = name, number * 100
    for stream_id, (name, start) in wanted.items():
        (stream,) = client.finish(stream_id)
        whole = {"big": CONTENT, "other": CONTENT[::-1], "10k": CONTENT[:10_240]}[name]
        assert stream.body == whole[start : start + 90_001]
        assert stream.status == 206
    client.close()


@in_every_way
def test_tiny_windows_and_tiny_reads(serve, mode, framing):
    client = Http2Client(serve(mode, framing).port, window=1_000, receive_buffer=4_096)
    first, second = client.ask("/big", range="bytes=0-120000"), client.ask("/other", range="bytes=1-50000")
    while not (client.streams[first].ended and client.streams[second].ended):
        client.read(700)
    assert client.streams[first].body == CONTENT[:120_001]
    assert client.streams[second].body == CONTENT[::-1][1:50_001]
    client.close()


@in_every_way
def test_resets_at_random_moments_leave_the_others_whole(serve, mode, framing):
    rng = random.Random(9)
    server = serve(mode, framing)
    client = Http2Client(server.port, window=100_000, connection_window=1 << 20)
    for _ in range(15):
        kept, dropped = client.ask("/big"), client.ask("/other")
        for _ in range(rng.randrange(12)):
            client.read(rng.choice([100, 3_000, 100_000]))
        if not client.streams[dropped].ended:
            client.http.reset_stream(dropped, 8)
            client.said()
        (stream,) = client.finish(kept)
        assert stream.body == CONTENT
    client.close()
    wait_until(lambda: len(server.worker._connections) == 0)
    assert server.metrics.counters["requests"] == 30


@in_every_way
@pytest.mark.parametrize("mapped", [0, 2], ids=["first", "again"])
def test_a_file_that_becomes_shorter(serve, root, mode, framing, mapped):
    """Its stream ends in an error; if no frame of it had begun, the others go on."""
    server = serve(mode, framing)
    client = Http2Client(server.port, window=20_000, connection_window=1 << 24, auto=False)
    (root / "shrinking").write_bytes(CONTENT)
    for _ in range(mapped):
        client.http.reset_stream(client.ask("/shrinking"))
        client.said()
    cut = client.ask("/shrinking")
    while len(client.streams[cut].body) < 20_000:
        client.read()
    os.truncate(root / "shrinking", 20_000)
    client.http.increment_flow_control_window(1 << 20, cut)
    client.said()
    try:
        (stream,) = client.finish(cut)
    except (ConnectionError, AssertionError):
        stream = client.streams[cut]  # the connection was cut
        assert framing is Framing.SENDFILE
    else:
        assert stream.reset == 2
        assert client.finish(client.ask("/10k"))[0].body == CONTENT[:10_240]
    assert not stream.ended
    assert bytes(stream.body) == CONTENT[: len(stream.body)]
    wait_until(lambda: any(not entry["complete"] for entry in server.entries()))


def test_the_same_answers_as_http1(server):
    """Status, fields and bodies of HTTP/1.1 and HTTP/2 are made by the same code."""
    ranges = ("bytes=5-9", "bytes=99999-", "bytes=0-1,5000-5001")
    asked = [(method, "/10k", {}) for method in ("GET", "HEAD", "POST", "OPTIONS", "BREW")]
    asked += [("GET", "/10k", {"range": value}) for value in ranges]
    asked += [("GET", "/10k", {"if-none-match": "*"}), ("GET", "/10k", {"if-match": '"x"'})]
    asked += [("GET", "/", {}), ("GET", "/", {"accept": "application/json"}), ("HEAD", "/nope", {})]
    asked += [("GET", path, {}) for path in ("/nope", "/dir", "/dir/", "/%2e%2e/x", "/%00", "/a%2Fb", "/.hidden", "/empty")]
    second = Http2Client(server.port)
    for method, target, fields in asked:
        first = Client(server.port)
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        first.send(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{lines}\r\n".encode())
        first.wait_for_close()
        head, _, body = bytes(first.tls.plain).partition(b"\r\n\r\n")
        status, *headers = head.decode("latin-1").split("\r\n")
        (stream,) = second.finish(second.ask(target, method=method, **fields))
        assert stream.status == int(status.split()[1]), (method, target)
        old = {name.lower(): value for name, value in (line.split(": ", 1) for line in headers)}
        chunked = old.pop("transfer-encoding", None)
        for name in ("connection", "date"):
            old.pop(name)
        new = {name: value for name, value in stream.headers.items() if name not in (":status", "date")}
        if "boundary" in old.get("content-type", ""):
            assert len(stream.body) == len(body)
            old.pop("content-type"), new.pop("content-type")
        elif not chunked:
            assert stream.body == body
        assert new == old, (method, target)
    second.close()


def test_a_long_listing_is_made_along_with_downloads(root, server):
    for number in range(700):
        (root / "dir" / f"f{number:04}").touch()
    os.unlink(root / "dir/index.html")
    client = Http2Client(server.port, window=1 << 20, connection_window=1 << 24)
    listing, file = client.ask("/dir/"), client.ask("/big")
    first, second = client.finish(listing, file)
    assert first.status == 200
    assert first.body.count(b"f0") >= 700
    assert second.body == CONTENT


def test_what_is_offered_is_what_the_settings_say(root):
    from ktlsd.server.contexts import build_context
    from ktlsd.settings import Tls
    from tests import pki

    _, cert, key = pki.write(root.parent)
    for alpn, expected in ((("h2", "http/1.1"), b"h2"), (("http/1.1",), b"http/1.1"), (("http/1.1", "h2"), b"http/1.1")):
        with ThreadServer(root, None, context=build_context(Tls(cert=str(cert), key=str(key), alpn=alpn))) as server:
            ctx = context("TLSv1.3", "AES-256-GCM")
            ctx.set_alpn_protos([b"h2", b"http/1.1"])
            client = Client(server.port, ctx=ctx)
            assert client.tls.ssl.get_alpn_proto_negotiated() == expected
            client.close()


def test_who_does_not_ask_for_http2_gets_http1(server):
    client = Client(server.port)
    assert client.get("/10k").body == CONTENT[:10_240]
    client.close()


# --- ends ----------------------------------------------------------------------------------------------------------


def test_a_drain_loses_nothing(server):
    """Requests that come while the client has not heard of the end are answered."""
    client = Http2Client(server.port, window=50_000, connection_window=1 << 20, auto=False)
    running = client.ask("/big")
    while len(client.streams[running].body) < 50_000:
        client.read()
    server.worker.waker.write(15)
    wait_until(lambda: server.worker._draining)
    late = client.ask("/10k")  # before our GOAWAY has been read
    client.http.increment_flow_control_window(1 << 20, running)
    client.said()
    _drained(client, running, late)
    assert client.streams[running].body == CONTENT
    assert client.streams[late].body == CONTENT[:10_240]
    assert client.goaway == [(0, (1 << 31) - 1), (0, late)]
    client.close()
    server._thread.join(10)
    assert not server._thread.is_alive()


def _drained(client, *stream_ids):
    """Read to the end; h2's client believes itself closed at the first GOAWAY, so frames are read here."""
    from h2.connection import ConnectionState

    while True:
        try:
            data = client.sock.recv(1 << 18)
        except ConnectionResetError:
            break
        if not data or client.tls.closed:
            break
        client.tls.receive(data)
        while client.tls.plain:
            length = 9 + int.from_bytes(client.tls.plain[:3], "big")
            if len(client.tls.plain) < length:
                break
            frame = bytes(client.tls.plain[:length])
            rest = client.tls.plain[length:]
            client.http.state_machine.state = ConnectionState.CLIENT_OPEN
            client.tls.plain = bytearray(frame)
            client.understand()
            client.tls.plain = rest
            if not client.tls.closed:
                client.http.state_machine.state = ConnectionState.CLIENT_OPEN
    assert all(client.streams[s].ended for s in stream_ids)


def test_an_idle_client_that_does_not_answer_is_not_waited_for(root, tmp_path):
    with ThreadServer(root, None, limits=Limits(linger_timeout=0.3, drain_timeout=20)) as server:
        client = Http2Client(server.port)
        client.fetch("/10k")
        server.worker.waker.write(15)
        server._thread.join(5)
        assert not server._thread.is_alive()
        client.close()


def test_an_idle_client_is_told_goodbye(root):
    with ThreadServer(root, None, limits=Limits(idle_timeout=0.2)) as server:
        client = Http2Client(server.port)
        client.fetch("/10k")
        while client.read():
            pass
        assert client.goaway == [(0, 1)]
        assert client.tls.closed
        client.close()


def test_a_client_that_says_nothing_is_told_so(root):
    with ThreadServer(root, None, limits=Limits(header_timeout=0.2)) as server:
        client = Client(server.port, ctx=http2_context())
        client.send(PREFACE[:5])
        client.wait_for_close()
        assert client.tls.closed
        frames = bytes(client.tls.plain)
        assert frames[-200:].find(b"SETTINGS_TIMEOUT") > 0 or b"in time" in frames
        client.close()


def test_a_client_that_opens_no_window_is_cut(root):
    with ThreadServer(root, None, limits=Limits(progress_timeout=0.3)) as server:
        client = Http2Client(server.port, window=1_000, auto=False)
        client.ask("/big")
        with pytest.raises((AssertionError, ConnectionError)):
            while True:
                assert client.read()
        wait_until(lambda: server.metrics.counters["ended:Overdue"] == 1)
        client.close()


def test_a_client_that_opens_no_window_is_cut_though_it_talks(root):
    with ThreadServer(root, None, limits=Limits(progress_timeout=0.5)) as server:
        client = Http2Client(server.port, window=1_000, auto=False)
        client.ask("/big")
        client.sock.settimeout(0.1)
        with pytest.raises((AssertionError, ConnectionError)):
            for _ in range(100):
                client.send(raw(6, 0, 0, bytes(8)))
                try:
                    while True:  # the answer, and then nothing
                        assert client.read()
                except TimeoutError:
                    pass
        wait_until(lambda: server.metrics.counters["ended:Overdue"] == 1)
        client.close()


def test_a_violation_ends_in_goaway_one_line_and_a_counter(root, caplog):
    caplog.set_level("INFO", "ktlsd")
    with ThreadServer(root, None) as server:
        client = Http2Client(server.port, window=1 << 20, connection_window=1 << 20)
        client.fetch("/big")
        client.send(raw(8, 0, 0, bytes(4)))
        while client.read():
            pass
        assert client.goaway == [(1, 1)]
        assert client.tls.closed, "the connection ends as TLS ends"
        client.close()
        wait_until(lambda: server.metrics.counters["ended:Http2Error:PROTOCOL_ERROR"] == 1)
    assert sum("HTTP/2 PROTOCOL_ERROR" in line for line in caplog.messages) == 1


def test_a_flood_leaves_the_others_served(root, caplog):
    with ThreadServer(root, None) as server:
        stop = threading.Event()
        ended = []

        def flood():
            while not stop.is_set():
                try:
                    client = Http2Client(server.port)
                    for _ in range(400):
                        client.send(b"".join(raw(6, 0, 0, bytes(8)) for _ in range(100)))
                    client.close()
                except OSError:  # cut, while talking or before
                    pass
                ended.append(1)

        attacker = threading.Thread(target=flood)
        attacker.start()
        client = Http2Client(server.port, window=1 << 20, connection_window=1 << 24)
        for _ in range(20):
            assert client.fetch("/big").body == CONTENT
        wait_until(lambda: ended)
        stop.set()
        attacker.join(30)
        assert server.metrics.counters["ended:Http2Error:ENHANCE_YOUR_CALM"] >= 1
        client.close()


def test_the_log_has_a_line_for_each_stream(server):
    client = Http2Client(server.port, window=20_000)
    client.fetch("/10k")
    dropped = client.ask("/big")
    client.http.reset_stream(dropped, 8)
    client.said()
    client.fetch("/nope")
    client.fetch("/10k", expect="miracles")
    client.close()
    wait_until(lambda: len(server.entries()) == 4)
    # Status 0: it was reset before there was an answer.
    by_target = {(entry["target"], entry["status"] or 200): entry for entry in server.entries()}
    assert by_target["/10k", 200]["protocol"] == "HTTP/2"
    assert by_target["/10k", 200]["bytes"] == 10_240
    assert by_target["/nope", 404]["complete"]
    assert by_target["/10k", 417]["complete"]
    assert not by_target["/big", 200]["complete"]


@pytest.mark.parametrize("mode", MODES)
def test_resumption_and_key_updates_work_as_in_http1(serve, mode):
    server = serve(mode, Framing.COPY)
    client = Http2Client(server.port, window=1 << 20, connection_window=1 << 24)
    for number in range(3):
        assert client.fetch("/big").body == CONTENT
        if hasattr(client.tls.ssl, "key_update"):
            client.tls.ssl.key_update(number % 2)
    client.close()


def test_clients_that_leave_leave_nothing_behind(root, server):
    """In the middle of a frame, of a listing that has no window, of a read."""
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        client = Http2Client(server.port, window=1 << 20, receive_buffer=4_096, auto=False)
        client.ask("/big")
        client.ask("/")
        client.read(1_000 * number + 1)
        client.close()
    wait_until(lambda: not server.worker._connections)
    client = Http2Client(server.port)
    assert client.fetch("/").status == 200
    client.close()
    wait_until(lambda: not server.worker._connections)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)  # what is asked for often stays open for a moment


def test_a_client_that_does_not_read_costs_no_turns(root, server, monkeypatch):
    """A listing in the making, and a file that is more urgent and fills the socket."""
    for number in range(700):
        (root / "dir" / f"f{number:04}").touch()
    os.unlink(root / "dir/index.html")
    with (root / "huge").open("wb") as file:
        file.truncate(64 << 20)
    client = Http2Client(server.port, window=1 << 30, connection_window=1 << 30, receive_buffer=4_096, auto=False)
    client.ask("/dir/", range="bytes=0-5")
    client.ask("/huge", priority="u=0")
    wait_until(lambda: server.metrics.counters["requests"] == 2)
    turns = []
    real = Connection.pump
    monkeypatch.setattr(Connection, "pump", lambda *args: (turns.append(1), real(*args))[1])
    other = Http2Client(server.port)
    for _ in range(20):
        other.fetch("/10k")
    assert len(turns) < 400, "the worker spins"
    other.close()
    client.close()


# --- other people's clients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", [None, "u=3", "u=1, i"])
def test_nghttp(server, priority):
    """Several streams, frames as nghttp reads them; they share, or come one after the other if the client says so."""
    urls = [f"https://localhost:{server.port}/{name}" for name in ("big", "other")]
    said = ["-H", f"priority: {priority}"] if priority else []
    command = ["nghttp", "-nv", "-w", "20", "-W", "24", "--no-dep", *said, *urls]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.findall(r"recv DATA frame <length=(\d+), flags=0x(\d\d), stream_id=(\d+)>", done.stdout)
    sizes = dict.fromkeys((stream_id for _, _, stream_id in found), 0)
    for length, _, stream_id in found:
        sizes[stream_id] += int(length)
    assert list(sizes.values()) == [len(CONTENT)] * 2
    assert sum(int(flags, 16) & 1 for _, flags, _ in found) == 2
    shares = len({stream_id for _, _, stream_id in found[: len(found) // 2 - 2]}) == 2
    assert shares == (priority != "u=3")


@pytest.mark.parametrize("streams", [1, 100, 1000])
def test_h2load(server, streams):
    """As many requests at a time as a client likes: those beyond our limit wait in the client."""
    command = ["h2load", "-n", "3000", "-c", "3", "-m", str(streams), f"https://localhost:{server.port}/10k"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert "3000 succeeded, 0 failed, 0 errored, 0 timeout" in done.stdout, done.stdout
    assert f"({3000 * 10_240})" in done.stdout, done.stdout


def test_curl_resumes_and_ranges(root, server, tmp_path):
    url = f"https://localhost:{server.port}/big"
    (tmp_path / "out").write_bytes(CONTENT[:300_000])
    subprocess.run(["curl", "-sSfk", "--http2", "-C", "-", "-o", str(tmp_path / "out"), url], check=True, timeout=60)
    assert (tmp_path / "out").read_bytes() == CONTENT
