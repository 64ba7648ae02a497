"""Files, http.md's lines by name: what is opened, how, and what never is."""

import gzip
import hashlib
import os

import pytest

from tests.client import Client
from tests.e2e.asking import ask
from tests.e2e.modes import MODES, kernel_of
from tests.serving import ThreadServer

SECRET = b"secret outside the root"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(SECRET)
    (tmp_path / "outside/index.html").write_bytes(SECRET)
    folder = tmp_path / "root"
    (folder / "dir").mkdir(parents=True)
    (folder / "page.html").write_bytes(b"page")
    return folder


@pytest.fixture(params=MODES)
def server(request, root):
    with ThreadServer(root, kernel_of(request.param), handover_bytes=0) as running:
        yield running


def test_every_open_goes_through_the_one_gate(server, root):
    """Index, precompressed sibling, listing, sums file, digest index: a link out of the root is no way out for any of them."""
    (root / "page.html.gz").symlink_to("../outside/secret")
    (root / "page.html.sha256").symlink_to("../outside/secret")
    (root / "SHA256SUMS").symlink_to("../outside/secret")
    (root / ".ktlsd-digests").symlink_to("../outside/secret")
    (root / "dir/index.html").symlink_to("../../outside/index.html")
    (root / "away").symlink_to("../outside")
    (root / "absolute").symlink_to(root.parent / "outside/secret")
    reply = ask(server, "/page.html", Accept_Encoding="gzip", Want_Repr_Digest="sha-256=1")
    assert (reply.body, reply.headers.get("content-encoding"), "repr-digest" in reply.headers) == (b"page", None, False)
    for target in ("/dir/", "/away/secret", "/away/", "/absolute", "/page.html.gz", "/SHA256SUMS"):
        reply = ask(server, target)
        assert SECRET not in reply.body, target
        assert reply.status == (200 if target == "/dir/" else 404)
    assert b"away" not in ask(server, "/").body


def test_links_inside_the_root_work(server, root):
    (root / "relative").symlink_to("dir/../page.html")
    (root / "absolute").symlink_to(root / "page.html")
    (root / "folder").symlink_to("dir")
    assert ask(server, "/relative").body == ask(server, "/absolute").body == b"page"
    assert ask(server, "/folder").headers["location"] == "/folder/"


def test_hidden_files_are_denied_and_well_known_is_not(server, root):
    for name in (".git", ".well-known", "dir/.ssh", ".well-known/.deep"):
        (root / name).mkdir()
        (root / name / "x").write_bytes(b"x")
    assert ask(server, "/.well-known/x").body == b"x"
    for target in ("/.git/x", "/dir/.ssh/x", "/.well-known/.deep/x", "/%2egit/x", "/dir/../.git/x"):
        assert ask(server, target).status in (400, 404)


def test_only_regular_files_and_nothing_hangs(server, root):
    os.mkfifo(root / "fifo")
    os.mkfifo(root / "dir/index.html")
    os.mkfifo(root / "page.html.gz")
    os.mkfifo(root / "SHA256SUMS")
    os.symlink("/dev/zero", root / "zero")
    for target, status in (("/fifo", 404), ("/zero", 404), ("/dir/", 200)):  # a folder whose index is none is listed
        assert ask(server, target).status == status
    assert ask(server, "/page.html", Accept_Encoding="gzip").body == b"page"


def test_what_may_not_be_read_is_403_or_404_and_told_without_its_path(server, root):
    (root / "locked").write_bytes(b"x")
    (root / "locked").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65_534)  # root may read everything
    try:
        reply = ask(server, "/locked")
    finally:
        os.seteuid(user)
    assert (reply.status, str(root).encode() in reply.body) == (403, False)


def test_a_file_that_grows_or_is_replaced_is_sent_as_it_was_opened(server, root):
    content = os.urandom(3_000_000)
    (root / "big").write_bytes(content)
    peer = Client(server.port, receive_buffer=16_384)
    peer.send(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
    status, headers = peer.head()
    with (root / "big").open("ab") as file:
        file.write(b"more")
    (root / "big").unlink()
    assert (status, headers["content-length"]) == (200, "3000000")
    assert hashlib.sha256(peer.until(3_000_000)).digest() == hashlib.sha256(content).digest()
    assert peer.get("/big").status == 404
    peer.close()


def test_a_sibling_that_vanishes_is_no_error(server, root):
    (root / "page.html.gz").write_bytes(gzip.compress(b"page"))
    assert ask(server, "/page.html", Accept_Encoding="gzip").headers["content-encoding"] == "gzip"
    (root / "page.html.gz").unlink()
    reply = ask(server, "/page.html", Accept_Encoding="gzip")
    assert (reply.status, reply.body) == (200, b"page")
