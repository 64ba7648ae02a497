"""Digests as tags, and where they come from."""

import base64
import os
import subprocess
import time

import pytest

from tests.e2e.asking import ask, served
from tests.e2e.test_program import ktlsd


@pytest.fixture
def root(tree):
    return tree


def test_hash_makes_digests_that_are_tags(root, tmp_path):
    import hashlib

    done = ktlsd("hash", "root", cwd=tmp_path)
    assert (done.returncode, done.stdout.split()[0]) == (0, "8")
    digest = hashlib.sha256(b"a.iso")
    with served(root) as server:
        reply = ask(server, "/a.iso", Want_Repr_Digest="sha-256=1")
        assert reply.headers["etag"] == f'"sha256-{digest.hexdigest()}"'
        assert reply.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
        odd = ask(server, "/%C3%BCn%C3%AF%20%22q%22.txt").headers["etag"]
        assert odd == f'"sha256-{hashlib.sha256(b"odd").hexdigest()}"'
        for name in ("file", "private/sub/file", "404.html", "page.html"):
            assert ask(server, f"/{name}").headers["etag"] == f'"sha256-{hashlib.sha256(name.encode()).hexdigest()}"'
        assert ask(server, "/.ktlsd-digests").status == 404
        (root / "a.iso").write_bytes(b"A.ISO")  # same size
        os.utime(root / "a.iso", (1, 1))
        assert "sha256" not in ask(server, "/a.iso").headers["etag"], "a digest is dropped when the file is another"
    with served(root, repr_digest=True) as server:
        assert "repr-digest" in ask(server, "/file").headers
    with served(root, digests=False) as server:
        assert "sha256" not in ask(server, "/file").headers["etag"]


def test_hash_goes_on_where_it_was_and_forgets_what_is_gone(root, tmp_path):
    ktlsd("hash", "root", cwd=tmp_path)
    lines = (root / ".ktlsd-digests").read_bytes().splitlines(keepends=True)
    assert lines == sorted(lines)
    (root / ".ktlsd-digests").unlink()
    fake = lines[0].replace(lines[0].split(b"\t")[3], b"0" * 64 + b"\n")  # a result that is known is not computed again
    (root / ".ktlsd-digests.part").write_bytes(fake + b"torn line without an end")
    (root / "file").unlink()
    (root / "new").write_bytes(b"new")
    done = ktlsd("hash", "root", "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 0
    again = (root / ".ktlsd-digests").read_bytes().splitlines(keepends=True)
    assert again[0] == fake
    assert {line.split(b"\t")[0] for line in again} == ({line.split(b"\t")[0] for line in lines} - {b"file"}) | {b"new"}
    assert not (root / ".ktlsd-digests.part").exists()
    assert ktlsd("hash", "gone", cwd=tmp_path).returncode == 2


def test_sums_beside_the_files(root):
    import hashlib

    good = hashlib.sha256(b"a.iso").hexdigest()
    (root / "SHA256SUMS").write_text(f"{good} *a.iso\n{'1' * 64}  file\nnonsense\n")
    (root / "page.html.sha256").write_text("2" * 64 + "  page.html\n")
    (root / "app.html.sha256").write_text("3" * 64 + "\n")
    (root / "404.html.sha256").write_text("4" * 64 + "  another.html\n")
    os.utime(root / "file", (time.time() + 60, time.time() + 60))
    with served(root) as server:
        tags = {
            name: ask(server, f"/{name}").headers["etag"] for name in ("a.iso", "file", "page.html", "app.html", "404.html")
        }
    assert tags["a.iso"].startswith(f'"sha256-{good}-'), "with size and time: a sums file doesn't say which version it means"
    assert "sha256" not in tags["file"], "changed after the sums were made"
    assert tags["page.html"].startswith(f'"sha256-{"2" * 64}-')
    assert tags["app.html"].startswith(f'"sha256-{"3" * 64}-')
    assert "sha256" not in tags["404.html"], "another file's sum"


def test_tags_survive_rsync_and_are_the_same_on_every_mirror(root, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(root), str(copy)], check=True)
    for source in (root / "file", root / "a.iso"):
        os.utime(source, ns=(1_700_000_000_123_456_789, 1_700_000_000_123_456_789))
        os.utime(copy / source.name, (1_700_000_000, 1_700_000_000))  # what rsync keeps
    with served(root) as one, served(copy) as two:
        for name in ("/file", "/a.iso"):
            assert ask(one, name).headers["etag"] == ask(two, name).headers["etag"]
            assert not ask(one, name).headers["etag"].startswith("W/")
