"""Names, certificates and ports: sites by SNI and Host, mutual TLS, plain listeners."""

import datetime
import os
import socket
import ssl
import subprocess

import pytest
import trustme

from tests import pki
from tests.e2e.test_program import ktlsd
from tests.serving import program


@pytest.fixture
def root(tree):
    return tree


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
        server.plain = [int(line.rsplit(":", 1)[1].strip(" /\n")) for line in server.told if "http://" in line]
        server.folder = tmp_path
        yield server
        assert server.stop() == 0
        assert "bug" not in server.stderr.read_text()


def by_name(server, name):
    context = ssl.create_default_context(cafile=str(server.folder / "ca.pem"))
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock,
        context.wrap_socket(sock, server_hostname=name) as tls,
    ):
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
    redirecting, _serving = configured.plain
    ask = b"GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"
    answer = plain(redirecting, ask % (b"/a%20b?c=d", b"files.example:80"))
    assert answer.startswith(b"HTTP/1.1 308 ")
    assert b"Location: https://files.example:8443/a%20b?c=d\r\n" in answer
    assert b"Location: https://[::1]:8443/\r\n" in plain(redirecting, ask % (b"/", b"[::1]:80"))
    assert plain(redirecting, ask % (b"/.well-known/acme-challenge/token", b"x")).endswith(b"proof")
    assert plain(redirecting, ask % (b"/.well-known/acme-challenge/gone", b"x")).startswith(b"HTTP/1.1 404 ")
    assert b"308" in plain(redirecting, ask % (b"/.well-known/acme-challenge/../../file", b"x"))[:20]
    assert plain(redirecting, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert plain(redirecting, ask % (b"//evil.example/x", b":80")).startswith(b"HTTP/1.1 400 ")
    assert plain(redirecting, b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 405 ")
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
