"""RFC 9112, each obligation by name, asked of a running server in every mode; and its parser against nginx's."""

import os
import shutil
import socket
import subprocess
import time

import pytest

from ktlsd.settings import Limits
from tests.client import Client
from tests.corpus.requests import CORPUS
from tests.e2e.modes import MODES, kernel_of
from tests.serving import ThreadServer

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    (folder / "file").write_bytes(b"file")
    (folder / b"\xff\xfe odd %41 name;a=b".decode("utf-8", "surrogateescape")).write_bytes(b"odd")
    (folder / "dir").mkdir()
    (folder / "dir/a").write_bytes(b"a")
    return folder


@pytest.fixture(scope="module", params=MODES)
def server(request, root):
    with ThreadServer(root, kernel_of(request.param), handover_bytes=0) as running:
        yield running


def ask(server, request):
    """Send a request and one smuggled behind it; return the statuses that came, and whether the server closed."""
    peer = Client(server.port)
    peer.sock.settimeout(10)
    peer.send(request + SMUGGLED + b"GET /end HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    statuses = []
    while True:
        try:
            reply = peer.reply()
        except ConnectionError:
            break
        statuses.append(reply.status)
    assert peer.tls.closed
    peer.close()
    return statuses


def get(fields=b"Host: x\r\n", target=b"/file", version=b"HTTP/1.1", body=b""):
    return b"GET " + target + b" " + version + b"\r\n" + fields + b"\r\n" + body


@pytest.mark.parametrize("request_", [
    get(b""),
    get(b"Host: x\r\nHost: x\r\n"),
    get(b"Host: a b\r\n"),
    get(b"Host: x/y\r\n"),
    get(b"Host: u@x\r\n"),
    get(b"Host : x\r\n"),
    get(b"Host: x\r\nA : b\r\n"),
    get(b"Host: x\r\n A: folded\r\n"),
    get(b"Host: x\r\nA: b\r\n\tfolded\r\n"),
    get(b"Host: x\r\nA: b\rc\r\n"),
    get(b"Host: x\r\nA: b\0c\r\n"),
    get(b"Host: x\r\nA: b\x01c\r\n"),
    get(b"Host: x\r\nA: b\x7fc\r\n"),
    get(b"Host: x\r\n: b\r\n"),
    get(b"Host: x\r\nA\xe9: b\r\n"),
    get(b"Host: x\r\nno colon\r\n"),
    get(b"Host: x\r\nContent-Length: +1\r\n", body=b"x"),
    get(b"Host: x\r\nContent-Length: 1_0\r\n"),
    get(b"Host: x\r\nContent-Length: 0x1\r\n"),
    get(b"Host: x\r\nContent-Length: -1\r\n"),
    get(b"Host: x\r\nContent-Length: \xb2\r\n"),
    get(b"Host: x\r\nContent-Length: 1, 2\r\n"),
    get(b"Host: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n"),
    get(b"Host: x\r\nContent-Length: 99999999999999999999999\r\n"),
    get(b"Host: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n", body=b"0\r\n\r\n"),
    get(b"Host: x\r\nTransfer-Encoding: gzip\r\n"),
    get(b"Host: x\r\nTransfer-Encoding: chunked, gzip\r\n"),
    get(b"Host: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", body=b"0\r\n\r\n"),
    get(b"Host: x\r\nTransfer-Encoding: xchunked\r\n"),
    get(b"Host: x\r\nTransfer-Encoding: \x0bchunked\r\n"),
    get(b"Host: x\r\nTransfer-Encoding: chunked\r\n", version=b"HTTP/1.0", body=b"0\r\n\r\n"),
    get(b"Host: x\r\nTransfer-Encoding: chunked\r\n", body=b"zz\r\n"),
    get(b"Host: x\r\nTransfer-Encoding: chunked\r\n", body=b"3\r\nabcd\r\n0\r\n\r\n"),
    get(b"Host: x\r\nTransfer-Encoding: chunked\r\n", body=b"1\nx\n0\n\n"),
    get(target=b"*"),
    get(target=b"file"),
    get(target=b"ftp://x/file"),
    get(target=b"http:///file"),
    get(target=b"/a b"),
    get(version=b"HTTP/1.11"),
    get(version=b"http/1.1"),
    get(version=b"HTTP/x.1"),
    b"GET /file\r\n\r\n",
    b"GET\t/file\tHTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET  /file HTTP/1.1\r\nHost: x\r\n\r\n",
    b" GET /file HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /file HTTP/1.1\nHost: x\n\n",
], ids=repr)  # fmt: skip
def test_what_is_malformed_gets_400_and_the_end(server, request_):
    """Whatever stands behind it is not taken for a request: that is how requests are smuggled."""
    assert ask(server, request_) == [400]


@pytest.mark.parametrize("request_", [
    get(b"Host: x\r\nContent-Length: 5\r\n", body=b"12345"),
    get(b"Host: x\r\nContent-Length: 5\r\nContent-Length: 5\r\n", body=b"12345"),
    get(b"Host: x\r\nTransfer-Encoding: chunked\r\n", body=b"3;ext=1\r\nabc\r\n0\r\nTrailer: x\r\n\r\n"),
    get(b"Host: x\r\nTransfer-Encoding: Chunked\r\n", body=b"00\r\n\r\n"),
    get(b"Host: x\r\nContent-Length: 0\r\n"),
], ids=repr)  # fmt: skip
def test_a_gets_body_is_read_and_dropped(server, request_):
    assert ask(server, request_) == [200, 404, 404]


def test_a_refusal_behind_a_good_request_is_sent_in_its_turn(server):
    peer = Client(server.port)
    peer.send(get() + get(b"Host: x\r\nA : b\r\n") + SMUGGLED)
    good = peer.reply()
    assert (good.status, good.headers.get("connection")) == (200, None)
    bad = peer.reply()
    assert (bad.status, bad.headers["connection"]) == (400, "close")
    peer.wait_for_close()
    assert (peer.tls.closed, bytes(peer.tls.plain)) == (True, b"")
    peer.close()


def test_a_body_over_the_cap_ends_the_connection(server):
    assert ask(server, get(b"Host: x\r\nContent-Length: 70000\r\n", body=b"x" * 70_000)) == [413]
    assert ask(server, get(b"Host: x\r\nTransfer-Encoding: chunked\r\n", body=b"11170\r\n" + b"x" * 70_000)) == [413]


@pytest.mark.parametrize(("request_", "statuses"), [
    (get(target=b"http://x/file"), [200, 404, 404]),
    (get(target=b"HTTPS://other:1/file"), [200, 404, 404]),
    (get(target=b"http://x"), [200, 404, 404]),
    (get(target=b"http://x?q"), [200, 404, 404]),
    (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", [204, 404, 404]),
    (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", [405, 404, 404]),
    (b"\r\n\r\n" + get(), [200, 404, 404]),
    (get(b"Host:x\r\n"), [200, 404, 404]),
    (get(b"Host: \t x \t\r\n"), [200, 404, 404]),
    (get(b"hOsT: x\r\nX: \xe9\xff\r\n"), [200, 404, 404]),
    (get(b"Host: [::1]:443\r\n"), [200, 404, 404]),
    (get(b"Host:\r\n"), [200, 404, 404]),
    (get(version=b"HTTP/1.0"), [200]),
    (get(b"", version=b"HTTP/1.0"), [200]),
    (get(b"Connection: keep-alive\r\n", version=b"HTTP/1.0"), [200, 404, 404]),
    (get(b"Host: x\r\nConnection: close\r\n"), [200]),
    (get(b"Host: x\r\nConnection: close\r\nContent-Length: 5\r\n", body=b"12345"), [200]),
    (get(b"Host: x\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: 5\r\n"), [200]),
    (get(version=b"HTTP/1.2"), [200, 404, 404]),
    (get(version=b"HTTP/2.0"), [505]),
], ids=repr)  # fmt: skip
def test_what_is_well_formed_is_answered(server, request_, statuses):
    assert ask(server, request_) == statuses


@pytest.mark.parametrize(("request_", "status"), [
    (get(target=b"/" + b"a" * 8200), 414),
    (get(b"Host: x\r\nA: " + b"a" * 33_000 + b"\r\n"), 431),
    (get(b"Host: x\r\n" + b"A: b\r\n" * 101), 431),
    (b"GET /" + b"a" * 9000, 414),
    (b"A" * 9000, 414),
], ids=["line", "field", "fields", "open line", "open method"])  # fmt: skip
def test_limits(server, request_, status):
    assert ask(server, request_)[:1] == [status]


@pytest.mark.parametrize(("target", "body"), [
    (b"/%66ile", b"file"),
    (b"/dir/%61", b"a"),
    (b"/%FF%FE%20odd%20%2541%20name%3Ba=b", b"odd"),
    (b"/%ff%fe%20odd%20%2541%20name;a%3Db", b"odd"),
    (b"/dir//a", b"a"),
    (b"/dir/./a", b"a"),
    (b"/file?../../etc", b"file"),
    (b"/file?a%zz", b"file"),
])  # fmt: skip
def test_percent_decoding_exactly_once(server, target, body):
    peer = Client(server.port)
    peer.send(get(target=target))
    assert peer.reply().body == body
    peer.close()


@pytest.mark.parametrize("target", [
    b"/..", b"/../file", b"/dir/../file", b"/%2e%2e/file", b"/.%2e/file", b"/dir/%2E%2E/%2E%2E/etc/passwd", b"/%00",
    b"/file%00.html", b"/%", b"/%4", b"/%zz", b"/dir%2fa", b"/dir%5ca", b"/dir\\a", b"/%252e%252e/file", b"/..%c0%af..",
    b"/%c0%ae%c0%ae/file",
])  # fmt: skip
def test_no_path_steps_out(server, target):
    assert ask(server, get(target=target))[0] in (400, 404)


def test_plain_http_on_the_tls_port_gets_a_helpful_400(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(b"GET /file?x HTTP/1.1\r\nHost: files.example\r\n\r\n")
        answer = sock.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"Use https://files.example/file?x\n")


def test_a_header_that_does_not_end_gets_408(root):
    with ThreadServer(root, None, limits=Limits(header_timeout=0.3)) as server:
        peer = Client(server.port)
        start = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - start < 10:
                peer.send(b"GET /file HTTP/1.1\r\n" if time.monotonic() - start < 0.05 else b"A: b\r\n")
                time.sleep(0.04)
                peer.sock.setblocking(False)
                try:
                    peer.fill()
                except BlockingIOError:
                    pass
                peer.sock.settimeout(10)
                if b"408" in peer.tls.plain:
                    raise OSError("answered")
        assert b"HTTP/1.1 408 " in peer.tls.plain
        peer.close()


def test_requests_per_connection_are_limited(root):
    with ThreadServer(root, None, limits=Limits(requests_per_connection=3)) as server:
        peer = Client(server.port)
        replies = [peer.get("/file") for _ in range(3)]
        assert [reply.headers.get("connection") for reply in replies] == [None, None, "close"]
        peer.wait_for_close()
        peer.close()


# --- against nginx ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nginx(root, tmp_path_factory):
    if not shutil.which("nginx", path="/usr/sbin:/usr/bin:/bin"):
        pytest.fail("nginx is missing: make test installs it")
    folder = tmp_path_factory.mktemp("nginx")
    path = folder / "socket"
    for name in ("body", "proxy", "fastcgi", "uwsgi", "scgi"):
        (folder / name).mkdir()
    (folder / "nginx.conf").write_text(
        f"user root; daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;"
        f" fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;"
        f" server {{ listen unix:{path}; root {root}; large_client_header_buffers 4 8k; lingering_close always; }} }}\n"
    )
    os.chmod(folder, 0o755)
    process = subprocess.Popen(["/usr/sbin/nginx", "-c", str(folder / "nginx.conf"), "-p", str(folder)], stderr=subprocess.PIPE)
    end = time.monotonic() + 10
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "nginx does not start"
        time.sleep(0.02)
    yield path
    process.kill()
    process.communicate()


def nginx_statuses(path, request):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        sock.sendall(request + SMUGGLED + b"GET /end HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        try:
            while data := sock.recv(65_536):
                answer += data
        except ConnectionResetError:
            pass
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize("name", sorted(CORPUS))
def test_no_request_is_seen_where_nginx_sees_none(name, root, nginx):
    """Differential: where we find more requests in the same bytes than nginx does, one of us can be smuggled past."""
    with ThreadServer(root, None) as server:
        ours = ask(server, CORPUS[name])
    theirs = nginx_statuses(nginx, CORPUS[name])
    assert len(ours) <= max(len(theirs), 1), (ours, theirs)
    if theirs and theirs[0] == 400:
        assert ours[0] >= 400, (ours, theirs)
