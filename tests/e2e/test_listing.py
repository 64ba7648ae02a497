"""Folders: what a browser, a crawler and a script see."""

import json
import os
import re
import shutil
import subprocess

import pytest

from ktlsd.settings import Files, Rule, Settings, Site
from tests import pki
from tests.client import Client, wait_until
from tests.e2e.modes import MODES, kernel_of
from tests.serving import ThreadServer, program

OLD = 1_700_000_000
ODD = {
    "a b": b"space", "ä ö": b"umlaut", "100%25": b"percent", "q?x#y": b"query", "<b>&\"'": b"html", "a:b": b"colon",
    os.fsdecode(b"\xff\xfe raw"): b"not utf-8", "new\nline": b"newline", "日本": b"cjk", "+plus;semi=eq": b"plus",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    for name, content in ODD.items():
        (folder / name).write_bytes(content)
    (folder / "sub/deep").mkdir(parents=True)
    (folder / "sub/deep/file").write_bytes(b"deep")
    (folder / "sub/small").write_bytes(b"1")
    (folder / "sub/large").write_bytes(b"2" * 3_000_000)
    os.utime(folder / "sub/small", (OLD + 60, OLD + 60))
    os.utime(folder / "sub/large", (OLD, OLD))
    (folder / ".hidden").write_bytes(b"x")
    (folder / "outside").symlink_to("/etc/passwd")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "inside").symlink_to("sub/small")
    (folder / "linked").symlink_to("sub")
    os.mkfifo(folder / "fifo")
    many = folder / "many"
    many.mkdir()
    for number in range(5000):
        (many / f"file{number:05}").touch()
    return folder


@pytest.fixture(scope="module", params=MODES)
def server(request, root):
    with ThreadServer(root, kernel_of(request.param), handover_bytes=0) as running:
        yield running


@pytest.fixture
def client(server):
    peer = Client(server.port)
    yield peer
    peer.close()


def hrefs(page):
    body = page.body.decode().partition("<tbody>")[2]
    return [href.replace("&amp;", "&").replace("&#39;", "'") for href in re.findall(r'<a href="([^"]*)"', body)]


def test_every_link_of_a_listing_leads_to_its_file(client):
    page = client.get("/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    links = hrefs(page)
    assert links[:3] == ["linked/", "many/", "sub/"], "folders first"
    found = {client.get("/" + link.removeprefix("./")).body for link in links if not link.endswith("/")}
    assert found == {*ODD.values(), b"1"}


def test_what_can_not_be_served_is_not_listed(client):
    text = client.get("/").body.decode()
    for name in (".hidden", "outside", "dangling", "fifo"):
        assert name not in text
        assert client.get(f"/{name}").status == 404
    assert "inside" in text


def test_names_are_escaped(client):
    text = client.get("/").body.decode()
    assert "<b>" not in text
    assert "&lt;b&gt;" in text
    assert "\ufffd" in text, "what is not UTF-8 is shown as such"


def test_sizes_dates_and_the_way_back(client):
    text = client.get("/sub/").body.decode()
    assert "2.9 MiB" in text
    assert "2023-11-14 22:13" in text
    assert 'datetime="2023-11-14T22:13:20Z"' in text
    assert '<a href="../">' in text
    deep = client.get("/sub/deep/").body.decode()
    assert '<a href="../">sub</a>/<a href="./">deep</a>' in deep


@pytest.mark.parametrize(("query", "order"), [
    ("", ["large", "small"]),
    ("?sort=name-desc", ["small", "large"]),
    ("?sort=size", ["small", "large"]),
    ("?sort=size-desc", ["large", "small"]),
    ("?sort=time", ["large", "small"]),
    ("?sort=time-desc", ["small", "large"]),
    ("?sort=nonsense&&=&%zz", ["large", "small"]),
])  # fmt: skip
def test_sorting_by_query(client, query, order):
    assert hrefs(client.get("/sub/" + query)) == ["../", "deep/", *order]


def test_json_for_those_who_prefer_it(client):
    reply = client.get("/sub/", Accept="application/json")
    assert reply.headers["content-type"] == "application/json"
    rows = json.loads(reply.body)
    assert rows[0]["type"] == "directory"
    assert rows[1:] == [
        {"name": "large", "type": "file", "mtime": "Tue, 14 Nov 2023 22:13:20 GMT", "size": 3_000_000},
        {"name": "small", "type": "file", "mtime": "Tue, 14 Nov 2023 22:14:20 GMT", "size": 1},
    ]
    assert client.get("/sub/").headers["vary"] == reply.headers["vary"] == "Accept"
    names = {row["name"]: row for row in json.loads(client.get("/", Accept="application/json").body)}
    assert client.get("/" + names["\ufffd\ufffd raw"]["href"]).body == b"not utf-8"


def test_a_listing_that_is_unchanged_is_304(client):
    tag = client.get("/sub/").headers["etag"]
    assert client.get("/sub/", If_None_Match=tag).status == 304
    assert client.get("/sub/?sort=size", If_None_Match=tag).status == 200


def chunks(client, target, accept):
    client.send(f"GET {target} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n".encode())
    status, headers = client.head()
    assert (status, headers["transfer-encoding"], "content-length" in headers) == (200, "chunked", False)
    out = []
    while True:
        line = b""
        while not line.endswith(b"\r\n"):
            line += client.until(1)
        size = int(line, 16)
        data = client.until(size + 2)
        assert data[-2:] == b"\r\n"
        if not size:
            return out
        out.append(data[:-2])


def test_large_folders_stream(client):
    pieces = chunks(client, "/many/", "text/html")
    assert len(pieces) > 3
    assert len(re.findall(rb'<a href="file\d{5}"', b"".join(pieces))) == 5000
    names = [row["name"] for row in json.loads(b"".join(chunks(client, "/many/", "application/json")))]
    assert names == [f"file{n:05}" for n in range(5000)]
    assert client.get("/sub/small").body == b"1", "the connection goes on"


def test_a_streamed_listing_for_http_1_0_ends_with_the_connection(server):
    peer = Client(server.port)
    peer.send(b"GET /many/ HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    status, headers = peer.head()
    assert (status, headers["connection"], "transfer-encoding" in headers) == (200, "close", False)
    peer.wait_for_close()
    assert peer.tls.closed
    assert len(re.findall(rb'<a href="file\d{5}"', bytes(peer.tls.plain))) == 5000
    peer.close()


def test_head_of_a_streamed_listing(client):
    client.send(b"HEAD /many/ HTTP/1.1\r\nHost: x\r\n\r\n")
    reply = client.reply(body=False)
    assert (reply.status, reply.headers["transfer-encoding"]) == (200, "chunked")
    assert client.get("/sub/small").body == b"1"


def test_a_listing_left_in_the_middle_leaves_nothing_behind(root):
    with ThreadServer(root, None) as server:
        Client(server.port).close()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            peer = Client(server.port)
            peer.send(b"GET /many/ HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
            peer.fill()
            peer.close()
        wait_until(lambda: not server.worker._connections)
        assert len(os.listdir("/proc/self/fd")) <= before
        peer = Client(server.port)
        assert chunks(peer, "/many/", "text/html"), "the places for long listings are free again"
        peer.close()


def test_listings_can_be_switched_off(root):
    settings = Settings(root=str(root), files=Files(listing=False), rule=(Rule(path="/sub/**", listing=True),))
    with ThreadServer(root, None, settings=settings) as server:
        peer = Client(server.port)
        assert peer.get("/").status == 404
        assert peer.get("/sub/").status == 200
        peer.close()


def test_a_template_of_ones_own(root, tmp_path):
    (tmp_path / "t.html").write_text("{% for e in entries %}[{{ e.text }}]{% endfor %}")
    settings = Settings(root=str(root), files=Files(listing_template=str(tmp_path / "t.html")))
    with ThreadServer(root, None, settings=settings) as server:
        peer = Client(server.port)
        assert peer.get("/sub/").body == b"[deep][large][small]"
        assert b"[&lt;b&gt;&amp;" in peer.get("/").body
        peer.close()


@pytest.fixture(scope="module")
def running(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("running")
    pki.write(folder)
    with program(str(root), "--cert", "cert.pem", "--key", "key.pem", "--ktls", "off", cwd=folder) as server:
        server.folder = folder
        yield server


def test_wget_mirrors_the_tree_and_nothing_more(running):
    command = ["wget", "-q", "-r", "-np", "-nH", "--ca-certificate=ca.pem", "-P", "mirror", "--restrict-file-names=nocontrol"]
    subprocess.run([*command, f"{running.url}/sub/"], cwd=running.folder, check=True, timeout=60)
    mirrored = {str(p.relative_to(running.folder / "mirror")) for p in (running.folder / "mirror").rglob("*") if p.is_file()}
    assert mirrored == {"sub/index.html", "sub/small", "sub/large", "sub/deep/index.html", "sub/deep/file"}
    assert (running.folder / "mirror/sub/large").stat().st_mtime == OLD


def test_rclone_reads_the_listing(running):
    assert shutil.which("rclone"), "rclone is missing: make test installs it"
    base = ["rclone", "--config", os.devnull, "--http-url", f"{running.url}/sub/", "--ca-cert", "ca.pem"]
    done = subprocess.run(
        [*base, "lsf", "-R", ":http:"], cwd=running.folder, capture_output=True, check=True, timeout=60, text=True
    )
    assert sorted(done.stdout.split()) == ["deep/", "deep/file", "large", "small"]
    subprocess.run([*base, "copy", ":http:", "copied"], cwd=running.folder, check=True, timeout=60)
    assert (running.folder / "copied/large").read_bytes() == b"2" * 3_000_000


def test_the_first_site_is_for_names_that_no_site_has(root, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/index.html").write_bytes(b"one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two/index.html").write_bytes(b"two")
    settings = Settings(
        site=(
            Site(names=("one.example",), root=str(tmp_path / "one")),
            Site(names=("two.example", "*.two.example"), root=str(tmp_path / "two")),
        )
    )
    with ThreadServer(root, None, settings=settings) as server:
        peer = Client(server.port)
        for host, body in {
            "one.example": b"one", "TWO.example": b"two", "two.example:8443": b"two", "a.b.two.example.": b"two", "x": b"one",
            "[::1]:1": b"one", "": b"one", "xtwo.example": b"one",
        }.items():  # fmt: skip
            peer.send(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert peer.reply().body == body, host
        peer.close()
