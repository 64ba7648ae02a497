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
        asked = 2
        while not log.read_text():
            assert peer.get("/file").status == 200, "no connection is dropped"
            asked += 1
            if number == signal.SIGHUP:
                peer.close()
                peer = Client(server.port)
        peer.close()
        if number == signal.SIGHUP:
            wait_until(lambda: "generation 2 serves" in server.stderr.read_text())
        assert server.stop() == 0
        assert log.read_text().count("\n") + (tmp_path / "log.1").read_text().count("\n") == asked


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
    ("workers = 0", "workers: Expected `int` >= 1"),
    ('workers = "many"', "workers: Invalid enum value 'many'; it is one of 'auto' or a number"),
    ('proxy_protocol = ["10.0.0.1/x"]', "proxy_protocol: '10.0.0.1/x' is not a network like 10.0.0.0/8"),
    ('[process]\nuser = "nobody-at-all"', "process.user: there is no user 'nobody-at-all'"),
    ('[process]\ngroup = "root"', "process.group: means nothing without process.user"),
    ('[metrics]\nlisten = ["x"]', "metrics.listen: 'x' is not HOST:PORT"),
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


# --- passwords and rules, where they could be walked round ----------------------------------------------------------------


def test_a_verification_that_fails_is_answered_once(root, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise ValueError("as if the hash were damaged")

    monkeypatch.setattr(auth, "_matches", fail)
    (tmp_path / "users").write_text(f"anna:{hash_password('a')}\n")
    with served(root, Rule(path="/private/**", auth=str(tmp_path / "users"))) as server:
        assert ask(server, "/private/file", Authorization=basic("anna", "a")).status == 500
        assert ask(server, "/file").status == 200
        assert caplog.text.count("a job failed") == 1


@pytest.mark.parametrize("stored", [
    "$2b$99$" + "a" * 53, "$2b$00$" + "a" * 53, "$2b$04$" + "a" * 21 + "a" + "a" * 31,
    "$scrypt$ln=64,r=8,p=1$AAAA$" + "A" * 43, "$scrypt$ln=20,r=99,p=1$AAAA$" + "A" * 43,
    "$scrypt$ln=0,r=8,p=1$AAAA$" + "A" * 43,
])  # fmt: skip
def test_a_hash_that_can_not_be_compared_with_is_refused(root, tmp_path, stored):
    (tmp_path / "users").write_text(f"anna:{stored}\n")
    (tmp_path / "k.toml").write_text('root = "root"\n[[rule]]\npath = "/**"\nauth = "users"\n')
    done = ktlsd("check", "k.toml", cwd=tmp_path)
    assert (done.returncode, "line 1: not USER:HASH" in done.stderr, done.stderr.count("\n")) == (2, True, 1)


def test_a_password_withdrawn_while_it_was_verified_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(auth, "_LOOK_EVERY", 0.0)
    users = tmp_path / "users"
    users.write_text(f"anna:{hash_password('a')}\n")
    passwords = auth.Passwords(str(users))
    header = basic("anna", "a").encode()
    work = passwords.check(header, 1.0)
    result = work.job()
    users.write_text(f"bert:{hash_password('b')}\n")
    passwords.check(basic("bert", "b").encode(), 2.0)  # somebody makes it look
    work.done(result)
    again = passwords.check(header, 3.0)
    again.done(again.job())
    assert passwords.check(header, 4.0) is False


def test_equal_credentials_are_verified_once(root, tmp_path, monkeypatch):
    calls = []
    real = auth._matches
    monkeypatch.setattr(auth, "_matches", lambda *args: calls.append(1) or real(*args))
    (tmp_path / "users").write_text(f"anna:{hash_password('a')}\n")
    with served(root, Rule(path="/private/**", auth=str(tmp_path / "users"))) as server:
        peers = [Client(server.port) for _ in range(16)]
        for peer in peers:
            peer.send(f"GET /private/file HTTP/1.1\r\nHost: x\r\nAuthorization: {basic('anna', 'a')}\r\n\r\n".encode())
        assert {peer.reply().status for peer in peers} == {200}
        for peer in peers:
            peer.close()
    assert len(calls) <= 2


def test_rules_count_for_the_file_that_is_sent(root, tmp_path):
    (tmp_path / "users").write_text(f"anna:{hash_password('a')}\n")
    (tmp_path / "key").write_text("0123456789abcdef" * 2)
    (root / "index.html").write_bytes(b"index")
    (root / "signed.txt").write_bytes(b"signed")
    rules = (
        Rule(path="*.html", auth=str(tmp_path / "users"), cache_control="no-store"),
        Rule(path="*.txt", signed=str(tmp_path / "key")),
        Rule(path="/**", try_files=("{path}", "{path}.html", "{path}.txt")),
    )
    with served(root, *rules) as server:
        for target in ("/", "/index.html", "/page", "/page.html"):
            assert ask(server, target).status == 401, target
            reply = ask(server, target, Authorization=basic("anna", "a"))
            assert (reply.status, reply.headers["cache-control"]) == (200, "no-store"), target
        assert ask(server, "/signed").status == 403


def test_cache_control_is_for_files_and_not_for_folders(root):
    with served(root, Rule(path="/**", headers={"Server": "mine"}), cache_control="max-age=9, immutable") as server:
        assert ask(server, "/file").headers["cache-control"] == "max-age=9, immutable"
        folder = ask(server, "/")
        assert "cache-control" not in folder.headers
        assert folder.headers["server"] == "mine"
        assert ask(server, "/", If_Match='"x"').status == 412


def test_long_listings_have_their_places_from_the_beginning(root):
    (root / "many").mkdir()
    for number in range(1000):
        (root / "many" / str(number)).touch()
    (root / "big").write_bytes(bytes(5_000_000))
    with served(root) as server:
        peers = [Client(server.port, receive_buffer=16_384) for _ in range(13)]
        for peer in peers:
            peer.send(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n" + b"GET /many/ HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        responder = next(iter(server.worker._entrance._doors.values())).services.responder._responder
        wait_until(lambda: responder._streams.taken == 32)
        for peer in peers:
            peer.close()
        wait_until(lambda: responder._streams.taken == 0)
        assert ask(server, "/file").status == 200


# --- odd values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mtime", [-(2**40), 2**45, 0, -1])
def test_times_beyond_the_calendar_are_no_error(root, mtime):
    try:
        os.utime(root / "file", (mtime, mtime))
    except (OverflowError, OSError):
        pytest.skip("this file system has no such time")
    with served(root) as server:
        assert ask(server, "/file").status == 200
        assert ask(server, "/", Accept="application/json").status == ask(server, "/").status == 200


@pytest.mark.parametrize("value", ["sha-256=   5", "sha-256=x", "sha-256=11", "sha-256=1;a=b", "sha-256=\xb2", "=", ",,"])
def test_odd_wants_are_no_error(root, value):
    (root / "SHA256SUMS").write_text(hashlib.sha256(b"file").hexdigest() + "  file\n")
    with served(root) as server:
        assert ask(server, "/file", Want_Repr_Digest=value).status == 200


def test_a_file_changed_in_the_second_it_was_hashed_in_has_no_digest(root, tmp_path):
    (root / "a.iso").write_bytes(b"first")
    assert ktlsd("hash", "root", cwd=tmp_path).returncode == 0
    (root / "a.iso").write_bytes(b"other")
    with served(root) as server:
        assert "sha256" not in ask(server, "/a.iso").headers["etag"]


@pytest.mark.parametrize(("text", "says"), [
    ('[[rule]]\npath = "/x"\ncontent_type = "text/plän"', "is not a media type"),
    ('[[site]]\nnames = ["a"]\nroot = "root"\ncert = "root/file"\nkey = "root/file"', "there is no certificate in it"),
])  # fmt: skip
def test_check_tries_what_can_be_tried(root, tmp_path, text, says):
    (tmp_path / "k.toml").write_text(text + "\n" if "site" in text else 'root = "root"\n' + text + "\n")
    done = ktlsd("check", "k.toml", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n"), says in done.stderr) == (2, 1, True), done.stderr
