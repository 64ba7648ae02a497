"""What a configuration can say about paths and names: rules, sites, passwords, signatures, plain ports."""

import base64
import datetime
import json
import os
import socket
import ssl
import subprocess
import time

import bcrypt
import pytest
import trustme

from ktlsd.server.auth import Signer, hash_password
from ktlsd.settings import Files, Rule, Settings
from tests import pki
from tests.client import Client, wait_until
from tests.e2e.test_program import ktlsd
from tests.serving import ThreadServer, program


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "private/sub").mkdir(parents=True)
    for name in ("file", "a.iso", "page.html", "private/file", "private/sub/file", "404.html", "app.html"):
        (folder / name).write_bytes(name.encode())
    (folder / 'ünï "q".txt').write_bytes(b"odd")
    return folder


def served(root, *rules, **files):
    return ThreadServer(root, None, settings=Settings(root=str(root), rule=rules, files=Files(**files)))


def ask(server, target, **fields):
    peer = Client(server.port)
    try:
        return peer.get(target, **fields)
    finally:
        peer.close()


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
        wait_until(lambda: not server.worker._jobs_running)
        other.close()


def test_a_flood_of_passwords_is_bounded(root, passwords, monkeypatch):
    from ktlsd.server import worker

    monkeypatch.setattr(worker, "_MAX_JOBS", 2)
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
    work.job()
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


# --- sites, certificates, plain ports -----------------------------------------------------------------------------------------


def write_pair(folder, name, *names, ca=None):
    leaf = (ca or pki.authority()).issue_cert(*names, key_type=trustme.KeyType.ECDSA)
    (folder / f"{name}.pem").write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
    leaf.private_key_pem.write_to_path(str(folder / f"{name}.key"))


CONFIG = """
listen = ["127.0.0.1:0"]
[tls]
cert = "cert.pem"
key = "key.pem"
hsts = 31536000
hsts_subdomains = true
[ktls]
mode = "off"
[[site]]
names = ["localhost"]
root = "root"
[[site]]
names = ["two.example", "*.two.example"]
root = "two"
cert = "two.pem"
key = "two.key"
[[http]]
listen = ["127.0.0.1:0"]
https_port = 8443
acme = "acme"
[[http]]
listen = ["127.0.0.1:0"]
action = "serve"
"""


@pytest.fixture
def configured(root, tmp_path):
    pki.write(tmp_path)
    write_pair(tmp_path, "two", "two.example", "*.two.example")
    (tmp_path / "two").mkdir()
    (tmp_path / "two/index.html").write_bytes(b"two")
    (tmp_path / "acme/.well-known/acme-challenge").mkdir(parents=True)
    (tmp_path / "acme/.well-known/acme-challenge/token").write_bytes(b"proof")
    (tmp_path / "k.toml").write_text(CONFIG)
    assert ktlsd("check", "k.toml", cwd=tmp_path).stdout == "k.toml: fine\n"
    with program("--config", "k.toml", cwd=tmp_path) as server:
        server.plain = [int(line.rsplit(":", 1)[1].strip(" /\n")) for line in server.told if "in the clear" in line]
        server.folder = tmp_path
        yield server
        assert server.stop() == 0
        assert "bug" not in server.stderr.read_text()


def by_name(server, name):
    context = ssl.create_default_context(cafile=str(server.folder / "ca.pem"))
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        with context.wrap_socket(sock, server_hostname=name) as tls:
            tls.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while data := tls.recv(65_536):
                answer += data
            names = [value for _, value in tls.getpeercert()["subjectAltName"]]
    return names, answer


def test_sites_have_their_own_certificates(configured):
    names, answer = by_name(configured, "a.two.example")
    assert "*.two.example" in names
    assert answer.endswith(b"two")
    names, answer = by_name(configured, "localhost")
    assert "localhost" in names
    assert b"Strict-Transport-Security: max-age=31536000; includeSubDomains" in answer


def plain(port, request):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(request)
        answer = b""
        while data := sock.recv(65_536):
            answer += data
    return answer


def test_a_plain_port_redirects_to_https(configured):
    redirecting, serving = configured.plain
    ask = b"GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"
    answer = plain(redirecting, ask % (b"/a%20b?c=d", b"files.example:80"))
    assert answer.startswith(b"HTTP/1.1 308 ")
    assert b"Location: https://files.example:8443/a%20b?c=d\r\n" in answer
    assert b"Location: https://[::1]:8443/\r\n" in plain(redirecting, ask % (b"/", b"[::1]:80"))
    assert plain(redirecting, ask % (b"/.well-known/acme-challenge/token", b"x")).endswith(b"proof")
    assert plain(redirecting, ask % (b"/.well-known/acme-challenge/gone", b"x")).startswith(b"HTTP/1.1 404 ")
    assert b"308" in plain(redirecting, ask % (b"/.well-known/acme-challenge/../../file", b"x"))[:20]
    assert plain(redirecting, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert plain(redirecting, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert plain(redirecting, ask % (b"/", b"evil\\@x")).startswith(b"HTTP/1.1 400 ")


def test_a_plain_port_can_serve_in_the_clear(configured):
    _, serving = configured.plain
    (configured.folder / "root/big").write_bytes(os.urandom(3_000_001))
    answer = plain(serving, b"GET /big HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"Strict-Transport-Security" not in head
    assert body == (configured.folder / "root/big").read_bytes()
    subprocess.run(
        ["curl", "-sSf", "-r", "5-", "-o", "out", f"http://localhost:{serving}/big"], cwd=configured.folder, check=True
    )
    assert (configured.folder / "out").read_bytes() == body[5:]


def test_clients_show_a_certificate(root, tmp_path):
    pki.write(tmp_path)
    people, strangers = trustme.CA(), trustme.CA()
    people.cert_pem.write_to_path(str(tmp_path / "people.pem"))
    write_pair(tmp_path, "anna", "anna@example.org", ca=people)
    write_pair(tmp_path, "eve", "eve@example.org", ca=strangers)
    write_pair(tmp_path, "bert", "bert@example.org", ca=people)
    revoke(tmp_path / "crl.pem", people, tmp_path / "bert.pem")
    (tmp_path / "k.toml").write_text(
        'root = "root"\nlisten = ["127.0.0.1:0"]\n[ktls]\nmode = "off"\n[tls]\ncert = "cert.pem"\nkey = "key.pem"\n'
        'client_ca = "people.pem"\nclient_crl = "crl.pem"\n'
    )
    with program("--config", "k.toml", cwd=tmp_path) as server:

        def curl(*args):
            command = ["curl", "-sS", "--cacert", "ca.pem", "-o", "out", "-w", "%{http_code}", *args, f"{server.url}/file"]
            return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

        assert curl("--cert", "anna.pem", "--key", "anna.key").stdout == "200"
        for args in ([], ["--cert", "eve.pem", "--key", "eve.key"], ["--cert", "bert.pem", "--key", "bert.key"]):
            assert curl(*args).returncode == 56
        assert server.stop() == 0


def revoke(path, ca, cert_path):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    issuer = x509.load_pem_x509_certificate(ca.cert_pem.bytes())
    key = serialization.load_pem_private_key(ca.private_key_pem.bytes(), None)
    bad = x509.load_pem_x509_certificate(cert_path.read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    entry = x509.RevokedCertificateBuilder().serial_number(bad.serial_number).revocation_date(now).build()
    builder = x509.CertificateRevocationListBuilder().issuer_name(issuer.subject).last_update(now - datetime.timedelta(days=1))
    crl = builder.next_update(now + datetime.timedelta(days=1)).add_revoked_certificate(entry).sign(key, hashes.SHA256())
    path.write_bytes(crl.public_bytes(serialization.Encoding.PEM))


# --- digests ------------------------------------------------------------------------------------------------------------------


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
    assert tags["a.iso"] == f'"sha256-{good}"'
    assert "sha256" not in tags["file"], "changed after the sums were made"
    assert tags["page.html"] == f'"sha256-{"2" * 64}"'
    assert tags["app.html"] == f'"sha256-{"3" * 64}"'
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
