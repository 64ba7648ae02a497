"""What operators run into: rotated logs, changed password files, half a lock, files swapped behind old sums."""

import base64
import hashlib
import os
import signal
import subprocess
import sys

import pytest

from ktlsd.server import auth
from ktlsd.server.auth import hash_password
from ktlsd.settings import Rule
from tests import pki
from tests.client import Client, wait_until
from tests.e2e.asking import ask, served
from tests.e2e.test_program import ktlsd
from tests.serving import program


@pytest.fixture
def root(tree):
    return tree


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_a_rotated_log_is_opened_anew_and_nothing_is_lost(root, tmp_path, number):
    pki.write(tmp_path)
    log = tmp_path / "log"
    args = ["root", "--cert", "cert.pem", "--key", "key.pem", "--ktls", "off", "--access-log", "log"]
    with program(*args, cwd=tmp_path) as server:
        peer = Client(server.port)
        peer.get("/file")
        wait_until(lambda: log.exists() and log.read_text().count("\n") == 1)
        log.rename(tmp_path / "log.1")
        peer.get("/file")
        wait_until(lambda: (tmp_path / "log.1").read_text().count("\n") == 2)
        server.process.send_signal(number)
        wait_until(log.exists)
        assert peer.get("/file").status == 200, "no connection is dropped"
        wait_until(lambda: log.read_text().count("\n") == 1)
        peer.close()
        assert server.stop() == 0
        assert ("does not reload" in server.stderr.read_text()) == (number == signal.SIGHUP)


def basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_a_changed_password_file_counts_and_a_broken_one_does_not(root, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(auth, "_LOOK_EVERY", 0.0)
    users = tmp_path / "users"
    users.write_text(f"anna:{hash_password('a')}\n")
    with served(root, Rule(path="/private/**", auth=str(users))) as server:
        assert ask(server, "/private/file", Authorization=basic("anna", "a")).status == 200
        users.write_text("broken\n")
        assert ask(server, "/private/file", Authorization=basic("anna", "a")).status == 200
        assert "line 1: not USER:HASH" in caplog.text
        users.write_text(f"bert:{hash_password('b')}\n# changed\n")
        assert ask(server, "/private/file", Authorization=basic("bert", "b")).status == 200
        assert ask(server, "/private/file", Authorization=basic("anna", "a")).status == 401


def test_a_file_moved_into_place_with_an_old_time_is_not_what_the_sums_say(root):
    """cp -p, rsync -t and tar set mtime back; nobody sets ctime back."""
    sums = hashlib.sha256((root / "a.iso").read_bytes()).hexdigest()
    (root / "SHA256SUMS").write_text(f"{sums}  a.iso\n")
    (root / "file.sha256").write_text("5" * 64 + "  file\n")
    with served(root) as server:
        wanted = {"Want_Repr_Digest": "sha-256=1"}
        first = ask(server, "/a.iso", **wanted)
        before = first.headers["etag"]
        assert sums in before
        assert "repr-digest" in first.headers
        for name in ("a.iso", "file"):
            (root / "new").write_bytes(b"x" * (root / name).stat().st_size)
            os.utime(root / "new", (1, 1))
            (root / "new").rename(root / name)
        assert ask(server, "/a.iso").headers["etag"] != before
        for name in ("a.iso", "file"):
            assert "repr-digest" not in ask(server, f"/{name}", **wanted).headers
        assert ask(server, "/a.iso", Range="bytes=1-", If_Range=before).status == 200


@pytest.mark.parametrize(("text", "says"), [
    ('[tls]\nclient_auth = "require"', "tls.client_auth: means nothing without tls.client_ca"),
    ("[tls]\nhsts_subdomains = true", "tls.hsts_subdomains: means nothing without tls.hsts"),
    ('[tls]\nminimum = "TLSv1.1"', "tls.minimum: Invalid enum value 'TLSv1.1'; it is one of 'TLSv1.2', 'TLSv1.3'"),
    ("workers = 2", "workers: Invalid enum value 2; this release has only 1"),
    ('listen = "127.0.0.1:1"', 'write a list: listen = ["…"]'),
    ('[rule]\npath = "/"', "write [[rule]]"),
    ("rot = 1", "unknown field `rot`; did you mean root?"),
    ("[limits]\nidle = 1", "unknown field `idle`; "),
    ('[[rule]]\npath = "/x"\nstatus = 301', "rule[0].status: means nothing without redirect"),
    ('[log]\naccess = "no/such/folder/log"', "log.access: "),
    ('listen = ["127.0.0.1:1", "127.0.0.1:1"]', "listen: 127.0.0.1:1 is there twice"),
    ('listen = [":1"]\n[[http]]\nlisten = ["*:1"]', "http[0].listen: *:1 is there twice"),
    ('[[rule]]\npath = "/private"\nauth = "users"', "rule[0].path: /private is a folder; write /private/**"),
    ('[[rule]]\npath = "/private/"\nsigned = "key"', "rule[0].path: /private/ is a folder; write /private/**"),
])  # fmt: skip
def test_check_refuses_what_would_do_nothing_or_half(root, tmp_path, text, says):
    (tmp_path / "users").write_text(f"anna:{hash_password('a')}\n")
    (tmp_path / "key").write_text("0123456789abcdef" * 2)
    (tmp_path / "k.toml").write_text('root = "root"\n' + text + "\n")
    done = ktlsd("check", "k.toml", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert says in done.stderr


def test_passwd_wants_a_password(tmp_path):
    command = [sys.executable, "-m", "ktlsd", "passwd", "bob"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no password" in done.stderr


def test_sign_keeps_a_query_and_redirects_leave_no_bare_question_mark(root, tmp_path):
    (tmp_path / "key").write_text("0123456789abcdef" * 2)
    done = ktlsd("sign", "/private/file?a=b", "--key", "key", cwd=tmp_path)
    rules = (Rule(path="/private/**", signed=str(tmp_path / "key")), Rule(path="/old/*", redirect="/new{path}?{query}"))
    with served(root, *rules) as server:
        assert "?a=b&expires=" in done.stdout
        assert ask(server, done.stdout.strip()).status == 200
        assert ask(server, "/old/a").headers["location"] == "/new/old/a"
        assert ask(server, "/old/a?b").headers["location"] == "/new/old/a?b"


def test_hash_names_what_it_could_not_read(root, tmp_path):
    (root / "locked").write_bytes(b"x")
    (root / "locked").chmod(0)
    (root / "closed").mkdir()
    (root / "closed").chmod(0)
    from ktlsd.hashing import hash_tree

    root.chmod(0o777)
    tmp_path.chmod(0o755)
    user = os.geteuid()
    here = os.open(root, os.O_RDONLY)
    if user == 0:
        os.seteuid(65_534)
    try:
        done = hash_tree(f"/proc/self/fd/{here}", jobs=2, report=lambda progress: None)
    finally:
        os.seteuid(user)
        (root / "closed").chmod(0o755)
        os.close(here)
    assert sorted(done.problems) == ["'closed': Permission denied", "'locked': Permission denied"]
    assert done.known == 8


def test_a_name_no_request_can_name_is_not_listed(root):
    (root / "back\\slash").write_bytes(b"x")
    with served(root) as server:
        assert b"slash" not in ask(server, "/").body
