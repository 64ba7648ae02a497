"""A server to test against: the worker in a thread of this process with any kernel, or the program itself."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ktlsd.net import handover
from ktlsd.net.channel import HandoverPolicy
from ktlsd.net.kernel import Kernel
from ktlsd.net.keylog_pipe import KeyLogPipe
from ktlsd.net.listeners import Listener
from ktlsd.server.accesslog import AccessLog
from ktlsd.server.admission import Trusted
from ktlsd.server.entrance import Door, Membership
from ktlsd.server.hot import HotResponses
from ktlsd.server.metrics import Metrics
from ktlsd.server.responder import Responder
from ktlsd.server.services import Services
from ktlsd.server.sites import Sites
from ktlsd.server.worker import Worker
from ktlsd.settings import Limits, Settings
from tests import pki


class ThreadServer:
    """One worker in a thread. `metrics` and `log` may be read while it runs."""

    def __init__(
        self, root: Path, kernel: Kernel | None, *, limits: Limits | None = None, send_buffer: int | None = None,
        facts: handover.KernelFacts | None = None, log_file: Path | None = None, settings: Settings | None = None,
        context: ssl.SSLContext | None = None, proxies: tuple[str, ...] = (), **policy: object,
    ) -> None:  # fmt: skip
        sock = socket.create_server(("127.0.0.1", 0))
        if send_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # accepted sockets inherit it
        sock.setblocking(False)
        self.port = sock.getsockname()[1]
        self.context = context or pki.server_context()
        self.metrics = Metrics()
        self._log_file = log_file
        log = AccessLog(str(log_file) if log_file else None, "json")
        self._sites = Sites(settings or Settings(root=str(root)))
        services = Services(HotResponses(Responder(self._sites)), log, self.metrics, limits or Limits())
        keylog = None
        if kernel is None:
            from ktlsd.net.kernel import LinuxKernel

            kernel, made = LinuxKernel(), HandoverPolicy(off="switched off")
        else:
            keylog = KeyLogPipe()
            keylog.attach(self.context)
            made = HandoverPolicy(facts or handover.probe(kernel), **policy)
        member = replace(Membership.alone(), proxies=Trusted(proxies) if proxies else None)
        doors = [Door(Listener(sock), self.context, services)]
        self.worker = Worker(doors, kernel, made, services, keylog=keylog, membership=member)
        self._thread = threading.Thread(target=self.worker.run, daemon=True)

    def __enter__(self) -> "ThreadServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._thread.is_alive():
            for _ in range(2):  # twice: at once
                try:
                    self.worker.waker.write(signal.SIGTERM)
                except OSError:
                    break
            self._thread.join(20)
        assert not self._thread.is_alive(), "the worker does not stop"

    def entries(self) -> list[dict]:
        assert self._log_file is not None
        return [json.loads(line) for line in self._log_file.read_text().splitlines()]


class Program:
    """`ktlsd serve` as a process of its own, on a free port."""

    def __init__(self, *args: str, cwd: Path, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "ktlsd", "serve", "--listen", "127.0.0.1:0", *args]
        merged = {**os.environ, **(env or {})}
        self.stderr = cwd / "stderr.txt"
        with self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(command, cwd=cwd, env=merged, stdout=subprocess.PIPE, stderr=stderr)
        assert self.process.stdout is not None
        self.told: list[str] = []
        for raw in self.process.stdout:
            line = raw.decode()
            self.told.append(line)
            if "encryption" in line:
                break
        match = re.search(r"https://[^/]*:(\d+)/", "".join(self.told))
        assert match, f"it did not start: {self.told} {self.stderr.read_text()}"
        self.port = int(match[1])
        self.url = f"https://localhost:{self.port}"

    def workers(self) -> list[int]:
        """The process numbers of its workers; there is at least one."""
        end = time.monotonic() + 10
        while not (found := self._children()) and time.monotonic() < end:
            time.sleep(0.01)
        return found

    def _children(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if entry.name.isdecimal() and int(fields[1]) == self.process.pid and fields[0] != "Z":
                found.append(int(entry.name))
        return sorted(found)

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 20) -> int:
        self.process.send_signal(number)
        assert self.process.stdout is not None
        rest, _ = self.process.communicate(timeout=seconds)
        self.told += rest.decode().splitlines(keepends=True)
        return self.process.returncode


@contextmanager
def program(*args: str, cwd: Path, env: dict[str, str] | None = None) -> Iterator[Program]:
    running = Program(*args, cwd=cwd, env=env)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.communicate()


def tls_stat(name: str) -> int:
    """A counter of /proc/net/tls_stat."""
    for line in Path("/proc/net/tls_stat").read_text().splitlines():
        key, value = line.split()
        if key == name:
            return int(value)
    raise KeyError(name)
