"""`ktlsd` as a stranger meets it: what it prints, what its exit status is, and that real clients get their files."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ktlsd.errors import StartError
from ktlsd.net import listeners
from tests import pki
from tests.client import Client
from tests.conftest import kernel_has_tls
from tests.serving import program

CONTENT = random.Random(4).randbytes(5_000_001)


def ktlsd(*args, cwd, env=None):
    command = [sys.executable, "-m", "ktlsd", *args]
    merged = {**os.environ, "XDG_DATA_HOME": str(cwd), **(env or {})}
    return subprocess.run(command, cwd=cwd, env=merged, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/big").write_bytes(CONTENT)
    pki.write(tmp_path)
    return tmp_path


@pytest.fixture
def running(folder):
    log = folder / "access.log"
    args = ["root", "--cert", "cert.pem", "--key", "key.pem", "--access-log", str(log), "--ktls", "off"]
    with program(*args, cwd=folder) as server:
        server.log = log
        yield server


@pytest.mark.parametrize(
    "command",
    [
        ["curl", "-sSf", "--http1.1", "--cacert", "ca.pem", "-o", "out", "{url}"],
        ["curl", "-sSf", "--compressed", "--cacert", "ca.pem", "-r", "0-", "-o", "out", "{url}"],
        ["wget", "-q", "--ca-certificate=ca.pem", "-O", "out", "{url}"],
        ["aria2c", "-q", "--ca-certificate=ca.pem", "-x16", "-s16", "-k1M", "--file-allocation=none", "--async-dns=false",
         "-o", "out", "{url}"],
    ],
    ids=lambda command: " ".join(command[:4]),
)  # fmt: skip
def test_real_clients_get_the_file(running, folder, command):
    assert shutil.which(command[0]), f"{command[0]} is missing: make test installs it"
    subprocess.run([part.format(url=f"{running.url}/big") for part in command], cwd=folder, check=True, timeout=60)
    assert (folder / "out").read_bytes() == CONTENT


def test_broken_downloads_are_resumed(running, folder):
    for tool in (
        ["curl", "-sSf", "--cacert", "ca.pem", "-C", "-", "-o"],
        ["wget", "-q", "--ca-certificate=ca.pem", "-c", "-O"],
    ):
        (folder / "part").write_bytes(CONTENT[:1_234_567])
        subprocess.run([*tool, "part", f"{running.url}/big"], cwd=folder, check=True, timeout=60)
        assert hashlib.sha256((folder / "part").read_bytes()).digest() == hashlib.sha256(CONTENT).digest()


def test_what_it_prints(running, folder):
    told = "".join(running.told)
    assert f"serves {folder / 'root'}" in told
    assert f"https://127.0.0.1:{running.port}/" in told
    assert "in userspace: switched off" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_with_0(running, number):
    peer = Client(running.port)
    peer.send(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
    peer.head()
    running.process.send_signal(number)
    assert peer.until(len(CONTENT)) == CONTENT
    peer.wait_for_close()
    assert peer.tls.closed
    peer.close()
    assert running.process.wait(20) == 0
    entry = json.loads(running.log.read_text())
    assert (entry["complete"], entry["bytes"]) == (True, len(CONTENT))
    assert "body_bytes:userspace:http/1.1=5000001" in running.stderr.read_text()


def test_a_second_signal_ends_at_once(running):
    peer = Client(running.port, receive_buffer=4096)
    peer.send(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
    peer.head()
    running.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        running.process.wait(0.5)
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 0
    peer.close()


def test_without_a_certificate_one_is_made_once(folder):
    digests = set()
    for _ in range(2):
        with program("root", "--ktls", "off", cwd=folder, env={"XDG_DATA_HOME": str(folder / "data")}) as server:
            told = "".join(server.told)
            ca = folder / "data/ktlsd/ca.pem"
            assert f"curl --cacert {ca} https://127.0.0.1:{server.port}/" in told
            subprocess.run(["curl", "-sSf", "--cacert", str(ca), "-o", "out", f"{server.url}/big"], cwd=folder, check=True)
            digests.add(ca.read_bytes())
            assert server.stop() == 0
    assert len(digests) == 1
    key = folder / "data/ktlsd/localhost.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["missing"], 2, "missing: no such directory"),
        (["root/big"], 2, "is a file"),
        (["root", "--cert", "cert.pem"], 2, "tls.key: is missing"),
        (["root", "--cert", "cert.pem", "--key", "no.pem"], 2, "tls.key: no.pem: no such file"),
        (["root", "--cert", "ca.pem", "--key", "key.pem"], 2, "does not belong to certificate ca.pem"),
        (["root", "--cert", "root/big", "--key", "key.pem"], 2, "there is no certificate in it"),
        (["root", "--cert", "cert.pem", "--key", "locked.pem"], 2, "is encrypted"),
        (["root", "--listen", "nonsense"], 2, "'nonsense' is not HOST:PORT"),
        (["root", "--listen", "no.such.host.invalid:1"], 1, "no such host"),
        (["root", "--listen", "192.0.2.1:8443"], 1, "not this machine's"),
        (["root", "--listen", "127.0.0.1:{busy}"], 1, "something listens there already"),
        (["root", "--workers", "0"], 2, "--workers"),
        (["root", "--alpn", "h3"], 2, "name h2, http/1.1"),
        (["root", "--ktls", "maybe"], 2, "maybe"),
        (["root", "--access-log", "no/such/dir/log"], 2, "log.access"),
        (["root", "--config", "bad.toml"], 2, "bad.toml: ktls.handover_bytes"),
        (["root", "--config", "missing.toml"], 2, "missing.toml"),
        (["root", "--nonsense"], 2, "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_end_in_one_line_and_a_status(folder, args, status, says):
    from cryptography.hazmat.primitives import serialization as s

    (folder / "bad.toml").write_text("[ktls]\nhandover_bytes = -5\n")
    key = s.load_pem_private_key((folder / "key.pem").read_bytes(), None)
    pem = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret"))
    (folder / "locked.pem").write_bytes(pem)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        # Nothing here may start, so none needs a port of its own but the one that is tested.
        done = ktlsd("serve", *[arg.format(busy=port) for arg in args], cwd=folder)
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    if not done.stderr.startswith("Usage:"):  # click's own, for what is no option at all
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_privileged_port_says_what_to_do(monkeypatch, number):
    def refuse(*_, **__):
        raise PermissionError(number, os.strerror(number))

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(StartError, match="CAP_NET_BIND_SERVICE"):
        listeners.bind("127.0.0.1", 443)


def test_the_command_line_wins_over_a_file_that_would_not_do(folder):
    """What a flag replaces may be wrong in the file; `check` still says so."""
    (folder / "old.toml").write_text('root = "gone"\nlisten = ["nonsense"]\n[tls]\ncert = "gone.pem"\nkey = "gone.key"\n')
    args = ["root", "--config", "old.toml", "--cert", "cert.pem", "--key", "key.pem", "--ktls", "off"]
    with program(*args, cwd=folder) as server:
        assert Client(server.port).get("/big").body == CONTENT
        assert server.stop() == 0
    done = ktlsd("check", "old.toml", cwd=folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_the_root_named_in_a_file_counts_from_the_file(folder):
    (folder / "conf").mkdir()
    (folder / "conf/k.toml").write_text('root = "../root"\n[tls]\ncert = "../cert.pem"\nkey = "../key.pem"\n')
    with program("--config", "conf/k.toml", "--ktls", "off", cwd=folder) as server:
        assert Client(server.port).get("/big").body == CONTENT
        assert server.stop() == 0


def test_check(folder):
    (folder / "good.toml").write_text('root = "root"\n[tls]\ncert = "cert.pem"\nkey = "key.pem"\n')
    good = ktlsd("check", "good.toml", cwd=folder)
    assert (good.returncode, good.stdout) == (0, "good.toml: fine\n")
    (folder / "pair.toml").write_text('root = "root"\n[tls]\ncert = "ca.pem"\nkey = "key.pem"\n')
    bad = ktlsd("check", "pair.toml", cwd=folder)
    assert bad.returncode == 2
    assert bad.stderr.startswith("ktlsd: pair.toml: key ")


def test_version_and_help(folder):
    assert ktlsd("--version", cwd=folder).stdout.startswith("ktlsd")
    for command in ([], ["serve"], ["doctor"], ["check"]):
        done = ktlsd(*command, "--help", cwd=folder)
        assert done.returncode == 0
        assert "Usage:" in done.stdout


def check_doctor(folder, *, works):
    text, machine = ktlsd("doctor", cwd=folder), ktlsd("doctor", "--json", cwd=folder)
    report = json.loads(machine.stdout)
    assert (text.returncode, machine.returncode, report["works"]) == ((0, 0, True) if works else (1, 1, False))
    assert {(c["version"], c["cipher"]) for c in report["combinations"]} == {
        (v, c) for v in ("TLSv1.2", "TLSv1.3") for c in ("AES-128-GCM", "AES-256-GCM", "CHACHA20-POLY1305")
    }
    return text, report


@pytest.mark.skipif(kernel_has_tls(), reason="this kernel has TLS: the next test is for it")
def test_doctor_and_require_without_kernel_tls(folder):
    text, report = check_doctor(folder, works=False)
    assert "modprobe tls" in text.stdout
    assert all(c["reason"] == "TCP_ULP:ENOENT" and c["remedy"] for c in report["combinations"])
    done = ktlsd("serve", "root", "--ktls", "require", cwd=folder)
    assert done.returncode == 1
    assert "TCP_ULP:ENOENT" in done.stderr
    assert "modprobe tls" in done.stderr


@pytest.mark.ktls
def test_doctor_with_kernel_tls(folder):
    _, report = check_doctor(folder, works=True)
    assert all(c["accepted"] for c in report["combinations"])


def test_secrets_stay_inside(folder):
    """No key log, key or secret in the environment's files, the log or stderr; no core dumps."""
    log = folder / "access.log"
    with program("root", "--cert", "cert.pem", "--key", "key.pem", "--access-log", str(log), cwd=folder) as server:
        peer = Client(server.port)
        peer.get("/big")
        limits = Path(f"/proc/{server.process.pid}/limits").read_text()
        (core,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
        assert core.split()[4:6] == ["0", "0"]
        peer.close()
        assert server.stop() == 0
        written = log.read_text() + server.stderr.read_text() + "".join(server.told)
        assert "SECRET" not in written
        assert "CLIENT_RANDOM" not in written
