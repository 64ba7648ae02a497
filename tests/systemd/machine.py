"""A machine with ktlsd installed as systemd/ktlsd.service says, and the words to talk to it.

Only for the test kernel (tests/kernel/uml.py, systemd=True): it writes to /etc, /opt and /srv as if they were its own.
"""

import hashlib
import http.client
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import pki

PROJECT = Path(__file__).parents[2]
IN_TMP = str(PROJECT).startswith("/tmp/")  # a clone there: it must be seen, and run
UNITS = Path("/etc/systemd/system")
CONFIG = Path("/etc/ktlsd/ktlsd.toml")
LOG = Path("/var/log/ktlsd/access.log")
DROP_IN = UNITS / "ktlsd.service.d/95-this-test.conf"
SERVED = Path("/srv/files")
SMALL, BIG = b"small\n" * 100, 24 << 20
SHORT = 60  # seconds that anything may take: ptrace mode is slow


def install() -> None:
    """Install units, program, certificate and files. The program is the project's own, by a script."""
    shutil.copytree(PROJECT / "systemd", UNITS, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.toml", "modules-load.d"))
    program = Path("/opt/ktlsd/bin/ktlsd")
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ktlsd "$@"\n')
    program.chmod(0o755)
    CONFIG.parent.mkdir()
    ca, _, _ = pki.write(CONFIG.parent)
    (CONFIG.parent / "key.pem").chmod(0o400)
    assert ca.exists()
    SERVED.mkdir(parents=True, exist_ok=True)
    Path("/srv/of-others").write_text("not to be seen")
    (SERVED / "small").write_bytes(SMALL)
    with (SERVED / "big").open("wb") as file:
        for number in range(BIG >> 20):
            file.write(hashlib.sha256(b"%d" % number).digest() * 32_768)
    # Where the project and its Python are instead of /opt and /usr; /root and /home are hidden but for these.
    needed = sorted({str(PROJECT), sys.prefix, sys.base_prefix} - {"/usr"})
    (UNITS / "ktlsd.service.d/90-tests.conf").write_text(
        f"[Service]\nProtectHome=tmpfs\nBindReadOnlyPaths={' '.join(needed)}\nEnvironment=PYTHONDONTWRITEBYTECODE=1\n"
        + ("PrivateTmp=no\nNoExecPaths=\nNoExecPaths=/srv/files /var/log/ktlsd /var/tmp\n" if IN_TMP else "")
    )
    systemctl("daemon-reload")
    # What was changed since it was last compiled would be compiled anew by every start: the service sees it read-only.
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(PROJECT / "ktlsd")], check=True)


def configure(extra: str = "") -> None:
    """Write the sample configuration, with two workers, and `extra` in front of its tables."""
    text = (PROJECT / "systemd/ktlsd.toml").read_text()
    top, _, tables = text.partition("[log]")
    CONFIG.write_text(f"{top}workers = 2\n{extra}\n[log]{tables}")


def override(*lines: str, section: str = "[Service]") -> None:
    """As `systemctl edit ktlsd`."""
    DROP_IN.write_text("\n".join((section, *lines, "")))
    systemctl("daemon-reload")


def systemctl(*arguments: str) -> str:
    """Raises CalledProcessError, whose stderr says why, if it fails."""
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=2 * SHORT)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
    return done.stdout


def show(name: str, unit: str = "ktlsd.service") -> str:
    """A property of the service."""
    return systemctl("show", unit, "--property", name, "--value").strip()


def main_pid() -> int:
    return int(show("MainPID"))


def workers() -> set[int]:
    """All processes of the service but the first."""
    path = Path("/sys/fs/cgroup/system.slice/ktlsd.service/cgroup.procs")
    return {int(line) for line in path.read_text().split()} - {main_pid()}


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    rows = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {key: value.strip() for key, _, value in rows}


class Journal:
    """What the journal says of our units from now on."""

    def __init__(self) -> None:
        told = self._ask("--lines=0", "--show-cursor").stdout
        self._cursor = told.rpartition("-- cursor: ")[2].strip()

    def text(self) -> str:
        subprocess.run(["journalctl", "--sync"], check=True, timeout=SHORT)
        return self._ask("--unit=ktlsd.service", "--unit=ktlsd.socket", f"--after-cursor={self._cursor}").stdout

    @staticmethod
    def _ask(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = ["journalctl", "--no-pager", "--quiet", "--output=cat", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SHORT)


def wait_for(what: str, condition: Callable[[], object], seconds: float = SHORT) -> None:
    """Poll until it holds: systemd has no event that could be waited for without D-Bus."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not happen within {seconds:g} s: {what}"
        time.sleep(0.05)


# --- a client ---------------------------------------------------------------------------------------------------------


def context() -> ssl.SSLContext:
    made = ssl.create_default_context()
    made.load_verify_locations(CONFIG.parent / "ca.pem")
    return made


def get(path: str = "/small", *, headers: dict[str, str] | None = None, host: str = "127.0.0.1") -> tuple[int, bytes]:
    """One request over a connection of its own: status and body."""
    connection = http.client.HTTPSConnection(host, 443, timeout=SHORT, context=context())
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def connect(*, receive_buffer: int | None = None) -> ssl.SSLSocket:
    """A connection whose handshake is done."""
    raw = socket.socket()
    if receive_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.settimeout(SHORT)
    raw.connect(("127.0.0.1", 443))
    return context().wrap_socket(raw, server_hostname="localhost")


class Download:
    """A client that has taken a part of the big file and can be told to take the rest."""

    def __init__(self) -> None:
        self._sock = connect(receive_buffer=32_768)  # bytes; most of the file must stay with the server
        self._sock.sendall(b"GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self._pieces = self._receive()
        self._hash = hashlib.sha256()
        self._taken = 0
        head = b""
        while b"\r\n\r\n" not in head:
            head += next(self._pieces)
        assert head.startswith(b"HTTP/1.1 200"), head
        self._add(head.partition(b"\r\n\r\n")[2])
        self.take(BIG // 8)

    def _receive(self) -> Iterator[bytes]:
        while data := self._sock.recv(65_536):
            yield data

    def _add(self, data: bytes) -> None:
        self._hash.update(data)
        self._taken += len(data)

    def take(self, count: int) -> None:
        """Take at least `count` bytes more, or up to the end."""
        goal = min(self._taken + count, BIG)
        while self._taken < goal:
            data = next(self._pieces, None)
            assert data is not None, f"it ended after {self._taken} of {BIG} bytes"
            self._add(data)

    def finish(self) -> None:
        """Take the rest, and be sure that it is the file."""
        self.take(BIG)
        self._sock.close()
        with (SERVED / "big").open("rb") as file:
            assert self._hash.hexdigest() == hashlib.file_digest(file, "sha256").hexdigest()


def kernel_has_tls() -> bool:
    return "tls" in Path("/proc/sys/net/ipv4/tcp_available_ulp").read_text().split()


def reset() -> None:
    """Stop everything and forget what the last test did."""
    subprocess.run(
        ["systemctl", "stop", "ktlsd.socket", "ktlsd-http.socket", "ktlsd-metrics.socket", "ktlsd.service"],
        timeout=2 * SHORT,
        check=True,
    )
    LOG.unlink(missing_ok=True)
    configure()
    socket_drop_in = UNITS / "ktlsd.service.d/10-socket.conf"
    if DROP_IN.exists() or not socket_drop_in.exists() or show("NeedDaemonReload") == "yes":
        DROP_IN.unlink(missing_ok=True)
        shutil.copy(PROJECT / "systemd/ktlsd.service.d/10-socket.conf", socket_drop_in)
        systemctl("daemon-reload")
    subprocess.run(["systemctl", "reset-failed"], check=True, timeout=SHORT)


def is_ours() -> bool:
    """Whether this is the test kernel, whose file system is thrown away."""
    return os.environ.get("KTLSD_UML_SYSTEMD") == "1" and Path("/mnt/job/job.json").exists()
