"""Real clients, every version and cipher, full and resumed handshakes: bit for bit, and the kernel did it."""

import hashlib
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from ktlsd.net.handover import probe
from ktlsd.net.kernel import LinuxKernel
from tests import client, pki
from tests.serving import program, tls_stat

pytestmark = pytest.mark.ktls

SIZE = int(float(os.environ.get("KTLSD_TEST_BULK_MIB", "3")) * (1 << 20)) + 1
EVERY = [(v, c) for v in client.VERSIONS for c in client.CIPHERS]
SUITES = {
    ("TLSv1.3", "AES-128-GCM"): "TLS_AES_128_GCM_SHA256",
    ("TLSv1.3", "AES-256-GCM"): "TLS_AES_256_GCM_SHA384",
    ("TLSv1.3", "CHACHA20-POLY1305"): "TLS_CHACHA20_POLY1305_SHA256",
    ("TLSv1.2", "AES-128-GCM"): "ECDHE-ECDSA-AES128-GCM-SHA256",
    ("TLSv1.2", "AES-256-GCM"): "ECDHE-ECDSA-AES256-GCM-SHA384",
    ("TLSv1.2", "CHACHA20-POLY1305"): "ECDHE-ECDSA-CHACHA20-POLY1305",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    root = folder / "root"
    root.mkdir()
    rng, digest = random.Random(1), hashlib.sha256()
    with (root / "big").open("wb") as file:
        for left in range(SIZE, 0, -(1 << 20)):
            block = rng.randbytes(min(left, 1 << 20))
            file.write(block)
            digest.update(block)
    ca, cert, key = pki.write(folder)
    log = folder / "access.log"
    args = [str(root), "--cert", str(cert), "--key", str(key), "--access-log", str(log), "--ktls", "require"]
    with program(*args, cwd=folder) as server:
        server.sha256 = digest.hexdigest()
        server.folder, server.ca, server.log = folder, ca, log
        yield server
        assert server.stop() == 0
        assert "bug" not in server.stderr.read_text()


def with_curl(server, version, cipher, *, resumed):
    suite = SUITES[version, cipher]
    choice = ["--tlsv1.3", "--tls13-ciphers", suite] if version == "TLSv1.3" else ["--tls-max", "1.2", "--ciphers", suite]
    out = server.folder / "curl.out"
    url = f"{server.url}/big"
    command = ["curl", "-sSf", "--http1.1", "--cacert", str(server.ca), *choice, "-H", "Connection: close", "-o", str(out), url]
    if resumed:  # curl keeps sessions for the connections of one run
        command += ["-o", str(server.folder / "curl.first"), url]
    subprocess.run(command, check=True, timeout=100)
    return hashlib.sha256(out.read_bytes()).hexdigest(), 1 + resumed


def with_s_client(server, version, cipher, *, resumed):
    suite = SUITES[version, cipher]
    choice = ["-tls1_3", "-ciphersuites", suite] if version == "TLSv1.3" else ["-tls1_2", "-cipher", suite]
    session = server.folder / f"{version}{cipher}.session"
    base = ["openssl", "s_client", "-quiet", "-ign_eof", "-CAfile", str(server.ca), "-verify_return_error",
            "-servername", "localhost", "-connect", f"127.0.0.1:{server.port}", *choice]  # fmt: skip
    request = b"GET /big HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    runs = [["-sess_out", str(session)], ["-sess_in", str(session)]] if resumed else [[]]
    for extra in runs:
        done = subprocess.run([*base, *extra], input=request, capture_output=True, check=True, timeout=100)
    head, _, body = done.stdout.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    return hashlib.sha256(body).hexdigest(), len(runs)


def with_python(server, version, cipher, *, resumed):
    ctx = client.context(version, cipher)
    session = None
    for _ in range(1 + resumed):
        peer = client.Client(server.port, session=session, ctx=ctx)
        reply = peer.get("/big", Connection="close")
        peer.wait_for_close()
        assert peer.tls.closed, "no close_notify at the end"
        session = peer.tls.ssl.get_session()
        peer.tls.ssl.shutdown()
        peer.close()
    return hashlib.sha256(reply.body).hexdigest(), 1 + resumed


@pytest.mark.parametrize("download", [with_curl, with_s_client, with_python])
@pytest.mark.parametrize("resumed", [False, True], ids=["full", "resumed"])
@pytest.mark.parametrize(("version", "cipher"), EVERY)
def test_download(served, version, cipher, resumed, download):
    before, errors = tls_stat("TlsTxSw"), tls_stat("TlsDecryptError")
    seen = len(served.log.read_text().splitlines()) if served.log.exists() else 0
    digest, connections = download(served, version, cipher, resumed=resumed)
    assert digest == served.sha256
    assert tls_stat("TlsTxSw") - before == connections
    assert tls_stat("TlsDecryptError") == errors
    client.wait_until(lambda: len(served.log.read_text().splitlines()) >= seen + connections)
    entry = json.loads(served.log.read_text().splitlines()[-1])
    assert (entry["tls"]["tx"], entry["tls"]["version"], entry["tls"]["cipher"]) == ("kernel", version, SUITES[version, cipher])
    assert (entry["tls"]["resumed"], entry["bytes"], entry["complete"]) == (resumed, SIZE, True)


@pytest.fixture(scope="module", params=["copy", "sendfile", "mapped", "spliced"])
def framed(served, request):
    """A server that frames HTTP/2 in one of its ways, for the same files."""
    folder = served.folder / request.param
    folder.mkdir()
    (folder / "ktlsd.toml").write_text(f'[ktls]\nmode = "require"\nframing = "{request.param}"\n')
    args = [str(served.folder / "root"), "--cert", str(served.folder / "cert.pem"), "--key", str(served.folder / "key.pem")]
    log = folder / "access.log"
    with program(*args, "--config", "ktlsd.toml", "--access-log", str(log), cwd=folder) as server:
        server.folder, server.ca, server.log = folder, served.ca, log
        yield server
        assert server.stop() == 0
        assert "bug" not in server.stderr.read_text()


@pytest.mark.parametrize(("version", "cipher"), EVERY)
def test_download_by_http2(served, framed, version, cipher):
    suite = SUITES[version, cipher]
    choice = ["--tlsv1.3", "--tls13-ciphers", suite] if version == "TLSv1.3" else ["--tls-max", "1.2", "--ciphers", suite]
    out = framed.folder / "curl.out"
    before, errors = tls_stat("TlsTxSw"), tls_stat("TlsDecryptError")
    command = ["curl", "-sSf", "--http2", "--cacert", str(framed.ca), *choice, "-w", "%{http_version}", "-o", str(out)]
    done = subprocess.run([*command, f"{framed.url}/big"], check=True, timeout=100, capture_output=True, text=True)
    assert done.stdout == "2"
    assert hashlib.sha256(out.read_bytes()).hexdigest() == served.sha256
    assert tls_stat("TlsTxSw") - before == 1
    assert tls_stat("TlsDecryptError") == errors
    client.wait_until(lambda: framed.log.exists() and framed.log.read_text().endswith("\n"))
    entry = json.loads(framed.log.read_text().splitlines()[-1])
    assert (entry["protocol"], entry["tls"]["tx"], entry["bytes"], entry["complete"]) == ("HTTP/2", "kernel", SIZE, True)


def test_parallel_downloads_by_http2(served, framed):
    """Eight ranges over one connection, by curl."""
    piece = SIZE // 8 + 1
    command = ["curl", "-sSf", "--http2", "-Z", "--parallel-max", "8", "--cacert", str(framed.ca)]
    for number in range(8):
        command += ["-r", f"{number * piece}-{(number + 1) * piece - 1}", "-o", str(framed.folder / f"part{number}")]
        command += (
            [f"{framed.url}/big", "--next", "-sSf", "--http2", "--cacert", str(framed.ca)]
            if number < 7
            else [f"{framed.url}/big"]
        )
    subprocess.run(command, check=True, timeout=100)
    whole = b"".join((framed.folder / f"part{number}").read_bytes() for number in range(8))
    assert hashlib.sha256(whole).hexdigest() == served.sha256


@pytest.mark.parametrize("tool", ["wget", "aria2c", "gnutls-cli"])
def test_other_clients(served, tool):
    assert shutil.which(tool), f"{tool} is missing: make test installs it"
    out = Path(served.folder / f"{tool}.out")
    url = f"{served.url}/big"
    if tool == "wget":
        command = ["wget", "-q", "--ca-certificate", str(served.ca), "-O", str(out), url]
    elif tool == "aria2c":
        command = ["aria2c", "-q", "--ca-certificate", str(served.ca), "-x4", "-s4", "-k1M", "--allow-overwrite=true",
                   "--file-allocation=none", "--async-dns=false", "-d", str(out.parent), "-o", out.name, url]  # fmt: skip
    else:
        command = ["gnutls-cli", "--x509cafile", str(served.ca), "-p", str(served.port), "--logfile", "/dev/null", "localhost"]
    before = tls_stat("TlsTxSw")
    if tool == "gnutls-cli":  # slow at writing: a part is enough
        part = b"GET /big HTTP/1.1\r\nHost: localhost\r\nRange: bytes=5-200004\r\nConnection: close\r\n\r\n"
        done = subprocess.run(command, input=part, capture_output=True, check=True, timeout=100)
        assert done.stdout.partition(b"\r\n\r\n")[2] == (served.folder / "root/big").read_bytes()[5:200_005]
    else:
        subprocess.run(command, check=True, timeout=100)
        assert hashlib.sha256(out.read_bytes()).hexdigest() == served.sha256
    assert tls_stat("TlsTxSw") > before


@pytest.mark.parametrize("length", ["512", "4096"])
def test_a_client_with_max_fragment_length_stays_in_userspace(served, length):
    before = tls_stat("TlsTxSw")
    command = ["openssl", "s_client", "-quiet", "-ign_eof", "-maxfraglen", length, "-connect", f"127.0.0.1:{served.port}"]
    request = b"GET /big HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    done = subprocess.run(command, input=request, capture_output=True, check=True, timeout=100)
    assert hashlib.sha256(done.stdout.partition(b"\r\n\r\n")[2]).hexdigest() == served.sha256
    assert tls_stat("TlsTxSw") == before
    assert json.loads(served.log.read_text().splitlines()[-1])["tls"]["why"] == "client sent max_fragment_length"


@pytest.mark.parametrize("key", ["k", "K"])
def test_a_key_update_in_the_middle_of_a_download(served, key):
    """k: the client renews its keys. K: it asks us to renew ours too; before 6.14 the connection then ends, cleanly."""
    goes_on = key == "k" or probe(LinuxKernel()).rekey
    command = ["openssl", "s_client", "-tls1_3", "-connect", f"127.0.0.1:{served.port}", "-servername", "localhost"]
    request = b"GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n"
    complaints = (served.folder / "s_client.stderr").open("w+b")
    with complaints, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints) as process:
        output = _Output(process.stdout.fileno(), lambda: Path(complaints.name).read_text() + served.stderr.read_text())
        _say(process, request)
        output.read_until(lambda: b"\r\n\r\n" in output.seen)
        _say(process, key.encode() + b"\n")  # while most of the body is still to come
        # s_client looks at its stdin only while its stdout is full, and takes a line for a command only if it came alone.
        client.wait_until(lambda: "KEYUPDATE" in Path(complaints.name).read_text())
        assert output.body() == served.sha256
        if goes_on:
            _say(process, request)
            output.forget()
            assert output.body() == served.sha256
            _say(process, b"Q\n")
        else:
            assert output.rest().rstrip().endswith(b"closed"), "s_client says so when close_notify came"
        process.stdin.close()
        assert process.wait(20) == 0


def _say(process, line):
    process.stdin.write(line)
    process.stdin.flush()


class _Output:
    """What s_client prints: its own words about the session first, then the responses."""

    def __init__(self, fd, complaints):
        self._fd = fd
        self._complaints = complaints
        self.seen = bytearray()

    def read_until(self, condition):
        while not condition():
            data = os.read(self._fd, 1 << 16)
            assert data, f"s_client ended after {len(self.seen)} bytes: {self.seen[-300:]} {self._complaints()}"
            self.seen += data

    def _start(self):
        return self.seen.index(b"\r\n\r\n", self.seen.index(b"HTTP/1.1 200 OK")) + 4

    def body(self):
        self.read_until(lambda: b"HTTP/1.1 200 OK" in self.seen)
        self.read_until(lambda: b"\r\n\r\n" in self.seen)
        self.read_until(lambda: len(self.seen) >= self._start() + SIZE)
        return hashlib.sha256(self.seen[self._start() : self._start() + SIZE]).hexdigest()

    def forget(self):
        del self.seen[: self._start() + SIZE]

    def rest(self):
        out = bytes(self.seen[self._start() + SIZE :])
        while data := os.read(self._fd, 1 << 16):
            out += data
        return out
