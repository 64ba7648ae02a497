"""What a configuration can say about paths and names: rules, sites, passwords, signatures, plain ports."""

import base64
import json
import os
import subprocess
import time

import bcrypt
import pytest

from ktlsd.server.auth import Signer, hash_password
from ktlsd.settings import Rule
from tests.client import Client, wait_until
from tests.e2e.asking import ask, served
from tests.e2e.test_program import ktlsd


@pytest.fixture
def root(tree):
    return tree


def test_headers_and_cache_control_by_path(root):
    rules = (
        Rule(path="/**", headers={"X-Frame-Options": "DENY", "Server": "mirror"}, cache_control="no-cache"),
        Rule(path="*.iso", cache_control="max-age=31536000, immutable", headers={"X-Big": "yes"}),
        Rule(path="/private/*", headers={"X-Frame-Options": "SAMEORIGIN"}),
    )
    with served(root, *rules) as server:
        page, iso = ask(server, "/file"), ask(server, "/a.iso")
        assert (page.headers["cache-control"], iso.headers["cache-control"]) == ("no-cache", "max-age=31536000, immutable")
        assert (page.headers["server"], page.headers["x-frame-options"], iso.headers["x-big"]) == ("mirror", "DENY", "yes")
        assert "x-big" not in page.headers
        assert ask(server, "/private/file").headers["x-frame-options"] == "SAMEORIGIN"
        assert ask(server, "/private/sub/file").headers["x-frame-options"] == "DENY"
        again = ask(server, "/a.iso", If_None_Match=iso.headers["etag"])
        assert (again.status, again.headers["cache-control"]) == (304, "max-age=31536000, immutable")
        gone = ask(server, "/gone.iso")
        assert (gone.status, gone.headers.get("cache-control"), gone.headers["x-big"]) == (404, None, "yes")


def test_content_type_and_disposition(root):
    rules = (Rule(path="*.iso", content_type="application/x-mine"), Rule(path="/**", disposition="attachment"))
    with served(root, *rules) as server:
        iso = ask(server, "/a.iso")
        assert iso.headers["content-type"] == "application/x-mine"
        assert iso.headers["content-disposition"] == 'attachment; filename="a.iso"'
        odd = ask(server, "/%C3%BCn%C3%AF%20%22q%22.txt").headers["content-disposition"]
        assert odd == "attachment; filename=\"__n__ _q_.txt\"; filename*=UTF-8''%C3%BCn%C3%AF%20%22q%22.txt"


@pytest.mark.parametrize(("rule", "target", "status", "location"), [
    (Rule(path="/old/**", redirect="/new{path}"), "/old/a%20b?x=1", 302, "/new/old/a%20b"),
    (Rule(path="/old", redirect="https://other.example{path}?{query}", status=308), "/old?x=1", 308, "https://other.example/old?x=1"),
    (Rule(path="/old", redirect="/ü b", status=301), "/old", 301, "/%C3%BC%20b"),
])  # fmt: skip
def test_redirects(root, rule, target, status, location):
    with served(root, rule) as server:
        reply = ask(server, target)
        assert (reply.status, reply.headers["location"]) == (status, location)


def test_try_files_as_single_page_applications_want_it(root):
    with served(root, Rule(path="/**", try_files=("{path}", "{path}.html", "/app.html"))) as server:
        assert ask(server, "/file").body == b"file"
        assert ask(server, "/page").body == b"page.html"
        assert ask(server, "/some/route?x=1").body == b"app.html"
        assert ask(server, "/.hidden").status == 404
        assert ask(server, "/%2e%2e/x").status == 400
    with served(root, Rule(path="/**", try_files=("{path}", "/gone.html"))) as server:
        assert ask(server, "/nothing").status == 404


def preflight(server, origin, target="/file"):
    peer = Client(server.port)
    peer.send(
        f"OPTIONS {target} HTTP/1.1\r\nHost: x\r\nOrigin: {origin}\r\nAccess-Control-Request-Method: GET\r\n"
        "Access-Control-Request-Headers: range\r\n\r\n".encode()
    )
    reply = peer.reply()
    peer.close()
    return reply


def test_cors(root):
    with served(root, Rule(path="/**", cors=("*",)), Rule(path="/private/**", cors=("https://Good.example",))) as server:
        reply = ask(server, "/file", Origin="https://any.example", Range="bytes=0-0")
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (206, "*")
        assert "Content-Range" in reply.headers["access-control-expose-headers"]
        answer = preflight(server, "https://any.example")
        assert (answer.status, answer.headers["access-control-allow-methods"]) == (204, "GET, HEAD")
        assert "Range" in answer.headers["access-control-allow-headers"]
        good, bad = (ask(server, "/private/file", Origin=f"https://{name}.example") for name in ("good", "bad"))
        assert good.headers["access-control-allow-origin"] == "https://good.example"
        assert "access-control-allow-origin" not in bad.headers
        assert good.headers["vary"] == bad.headers["vary"] == "Origin"


# --- passwords --------------------------------------------------------------------------------------------------------------


def basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def passwords(tmp_path):
    weak = bcrypt.hashpw(b"pass", bcrypt.gensalt(4)).decode().replace("$2b$", "$2y$")
    (tmp_path / "users").write_text(f"# people\n\nanna:{hash_password('pässword')}\nbert:{weak}\n")
    return str(tmp_path / "users")


def test_basic_authentication(root, passwords):
    with served(root, Rule(path="/private/**", auth=passwords), Rule(path="/private/sub/**", auth="")) as server:
        refused = ask(server, "/private/file")
        assert refused.status == 401
        assert refused.headers["www-authenticate"] == 'Basic realm="files", charset="UTF-8"'
        for user, password in (("anna", "pässword"), ("bert", "pass")):
            for _ in range(2):
                assert ask(server, "/private/file", Authorization=basic(user, password)).body == b"private/file"
        for value in (basic("anna", "pass"), basic("nobody", "x"), "Basic !!!", "Basic YQ==", "Bearer x", basic("", "")):
            assert ask(server, "/private/file", Authorization=value).status == 401, value
        assert ask(server, "/private/gone").status == 401, "who may not read may not look what there is"
        assert ask(server, "/private/sub/file").body == b"private/sub/file"
        assert ask(server, "/file").status == 200


def test_passwords_are_verified_beside_the_loop(root, passwords):
    """While one client's password is computed, others are served; pipelined answers stay in order."""
    with served(root, Rule(path="/private/**", auth=passwords)) as server:
        slow, other = Client(server.port), Client(server.port)
        line = f"Authorization: {basic('anna', 'pässword')}\r\n"
        slow.send(f"GET /private/file HTTP/1.1\r\nHost: x\r\n{line}\r\nGET /file HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert other.get("/file").body == b"file"
        assert [slow.reply().body for _ in range(2)] == [b"private/file", b"file"]
        slow.send(f"GET /private/file HTTP/1.1\r\nHost: x\r\nAuthorization: {basic('x', 'y')}\r\n\r\n".encode())
        slow.close()  # gone before the verdict
        assert other.get("/file").body == b"file"
        wait_until(lambda: not len(server.worker._jobs))
        other.close()


def test_a_flood_of_passwords_is_bounded(root, passwords, monkeypatch):
    from ktlsd.server import jobs

    monkeypatch.setattr(jobs, "_MAX_JOBS", 2)
    with served(root, Rule(path="/private/**", auth=passwords)) as server:
        peers = [Client(server.port) for _ in range(12)]
        for number, peer in enumerate(peers):
            peer.send(f"GET /private/file HTTP/1.1\r\nHost: x\r\nAuthorization: {basic('anna', number)}\r\n\r\n".encode())
        statuses = [peer.reply().status for peer in peers]
        assert set(statuses) == {401, 503}
        assert peers[0].get("/file").status == 200
        for peer in peers:
            peer.close()


@pytest.mark.parametrize("line", ["anna", "anna:", "anna:plain", "anna:$apr1$x$y", ":$2y$04$abc", "anna:{SHA}x"])
def test_a_password_file_that_will_not_do_is_told_by_line(root, tmp_path, line):
    (tmp_path / "users").write_text(f"# first\n{line}\n")
    (tmp_path / "k.toml").write_text('root = "root"\n[[rule]]\npath = "/**"\nauth = "users"\n')
    done = ktlsd("check", "k.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert "users: line 2: not USER:HASH" in done.stderr
    assert done.stderr.count("\n") == 1


def test_passwd_makes_a_line_that_works(root, tmp_path):
    from ktlsd.server.auth import Later, Passwords

    done = subprocess.run(
        [os.sys.executable, "-m", "ktlsd", "passwd", "anna"], input="geheim\n", capture_output=True, text=True, check=True
    )
    (tmp_path / "users").write_text(done.stdout)
    assert "geheim" not in done.stdout
    users = Passwords(str(tmp_path / "users"))
    header = basic("anna", "geheim").encode()
    work = users.check(header, time.monotonic())
    assert isinstance(work, Later)
    work.done(work.job())
    assert users.check(header, time.monotonic()) is True
    assert isinstance(users.check(header, time.monotonic() + 1e6), Later), "a verdict does not last for ever"


# --- signed addresses -------------------------------------------------------------------------------------------------------


@pytest.fixture
def key(tmp_path):
    (tmp_path / "key").write_text("0123456789abcdef0123456789abcdef\n")
    return str(tmp_path / "key")


def test_signed_addresses_expire(root, key, tmp_path):
    with served(root, Rule(path="/private/**", signed=key)) as server:
        assert ask(server, "/private/file").status == 403
        done = ktlsd("sign", "https://files.example/private/file", "--key", "key", "--expires", "60", cwd=tmp_path)
        url = done.stdout.strip()
        assert url.startswith("https://files.example/private/file?expires=")
        target = url.removeprefix("https://files.example")
        assert ask(server, target).body == b"private/file"
        assert ask(server, target, Range="bytes=0-1").status == 206
        assert ask(server, target.replace("/private/file", "/private/sub/file")).status == 403
        assert ask(server, target[:-1] + ("0" if target[-1] != "0" else "1")).status == 403
        assert ask(server, target.replace("expires=", "expires=9")).status == 403
        assert ask(server, target.replace("/private/", "/./private//")).body == b"private/file", "the path is what was signed"
        from ktlsd.protocol.semantics import parse_path

        old = Signer(key).query(parse_path(b"/private/file"), int(time.time()) - 1)
        expired = ask(server, f"/private/file?{old}")
        assert (expired.status, b"expired" in expired.body) == (403, True)


def test_a_weak_key_is_refused(root, tmp_path):
    (tmp_path / "weak").write_text("secret")
    (tmp_path / "k.toml").write_text('root = "root"\n[[rule]]\npath = "/**"\nsigned = "weak"\n')
    done = ktlsd("check", "k.toml", cwd=tmp_path)
    assert (done.returncode, "openssl rand" in done.stderr, done.stderr.count("\n")) == (2, True, 1)


# --- errors -----------------------------------------------------------------------------------------------------------------


def test_errors_are_helpful_and_tell_nothing(root):
    with served(root) as server:
        page = ask(server, "/gone<script>")
        assert (page.status, page.headers["content-type"]) == (404, "text/html; charset=utf-8")
        assert b"script" not in page.body
        assert str(root).encode() not in page.body
        answer = ask(server, "/gone", Accept="application/json")
        assert json.loads(answer.body)["status"] == 404


@pytest.mark.parametrize(("text", "says"), [
    ("rule = 3", "rule: Expected `array`"),
    ("[[rule]]", "rule[0]: Object missing required field `path`"),
    ('[[rule]]\npath = "/"\nunknown = 1', "rule[0]: Object contains unknown field `unknown`"),
    ('[[rule]]\npath = "/"\nheaders = {"Bad Name" = "x"}', "rule[0].headers: 'Bad Name' is not a header's name"),
    ('[[rule]]\npath = "/"\nheaders = {X = "a\\r\\nb"}', "rule[0].headers.X: 'a\\r\\nb' can't be a header's value"),
    ('[[rule]]\npath = "/"\nheaders = {Content-Length = "1"}', "Content-Length is ktlsd's own to say"),
    ('[[rule]]\npath = "/"\ncontent_type = "nonsense"', "rule[0].content_type: 'nonsense' is not a media type"),
    ('[[rule]]\npath = "/"\ndisposition = "maybe"', "rule[0].disposition: Invalid enum value"),
    ('[[rule]]\npath = "/"\nauth = "gone"', "rule[0].auth: "),
    ('[[rule]]\npath = "/"\nsigned = "gone"', "rule[0].signed: "),
    ('[[rule]]\npath = "/"\ncors = ["nonsense"]', "rule[0].cors: 'nonsense' is not an origin"),
    ('[[rule]]\npath = "/"\nredirect = "javascript:x"', "rule[0].redirect: "),
    ('[[rule]]\npath = "/"\nredirect = "/x"\nstatus = 200', "rule[0].status: Invalid enum value 200"),
    ('[[rule]]\npath = "/"\ntry_files = ["x"]', "rule[0].try_files: 'x' starts neither"),
    ('[[site]]\nnames = []\nroot = "root"', "site[0].names: Expected `array` of length >= 1"),
    ('[[site]]\nnames = ["a b"]\nroot = "root"', "site[0].names: 'a b' is not a host name"),
    ('[[site]]\nnames = ["a"]\nroot = "root"\n[[site]]\nnames = ["A"]\nroot = "root"', "site[1].names: A is site[0]'s already"),
    ('[[site]]\nnames = ["a"]\nroot = "gone"', "site[0].root: "),
    ('[[site]]\nnames = ["a"]\nroot = "root"\ncert = "root/file"', "site[0].key: is missing"),
    ('[[http]]\nlisten = ["x"]', "http[0].listen: 'x' is not HOST:PORT"),
    ('[[http]]\nlisten = [":80"]\nacme = "gone"', "http[0].acme: "),
    ('[files]\nindex = ["a/b"]', "files.index: 'a/b' is not a file name"),
    ('[files]\nlisting_template = "gone"', "files.listing_template: "),
    ('[files]\nlisting_template = "broken.html"', "broken.html: line 1: "),
    ('[files]\nlisting_template = "wrong.html"', "wrong.html: 'nonsense' is undefined"),
    ('[tls]\nclient_ca = "gone"', "tls.client_ca: "),
    ('[tls]\nclient_crl = "root/file"', "tls.client_crl: means nothing without"),
], ids=lambda value: value[:60] if value.startswith(("[", "rule")) else "")  # fmt: skip
def test_check_names_file_key_and_reason(root, tmp_path, text, says):
    (tmp_path / "broken.html").write_text("{% for %}")
    (tmp_path / "wrong.html").write_text("{{ nonsense }}")
    (tmp_path / "k.toml").write_text((text if "[[site]]" in text else 'root = "root"\n' + text) + "\n")
    done = ktlsd("check", "k.toml", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n"), "Traceback" in done.stderr) == (2, 1, False)
    assert done.stderr.startswith("ktlsd: k.toml: ")
    assert says in done.stderr
