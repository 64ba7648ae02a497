"""Servers that are measured, as processes of their own: started, waited for, asked what they used, and stopped for sure."""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ktlsd
from ktlsd import __version__, devcert
from ktlsd.bench import usage
from ktlsd.bench.answers import NotMeasurable, WrongAnswer
from ktlsd.bench.network import LOOPBACK, Network
from ktlsd.bench.result import Tls
from ktlsd.bench.usage import Usage

HANDOVER_BYTES: Final = 65_536  # ktlsd's own default, said in its configuration so that it is in the result
_START: Final = 20.0  # seconds
_STOP: Final = 5.0
_STEP: Final = 0.02
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_libc: Final = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class Place:
    """A folder in which a measurement lives: what is served is in `root`, and the certificate is the same for all."""

    folder: Path
    network: Network = LOOPBACK

    @property
    def root(self) -> Path:
        """What is served."""
        return self.folder / "root"

    @property
    def cert(self) -> Path:
        """PEM, the leaf."""
        return self.folder / "localhost.pem"

    @property
    def key(self) -> Path:
        """PEM, PKCS #8."""
        return self.folder / "localhost.key"

    def prepare(self) -> None:
        """Make the folder's parts. Servers that give up root must be able to read what they serve. Raises StartError."""
        self.folder.chmod(0o755)
        self.root.mkdir(mode=0o755, exist_ok=True)
        devcert.ensure(self.folder)


class Server:
    """One that runs. `tls` is who is to encrypt; `program` is name, version and what was switched on."""

    def __init__(
        self, name: str, command: Sequence[str | Path], place: Place, *, label: str, env: Mapping[str, str] | None = None
    ) -> None:
        """Start it; `label` names its log. Raises NotMeasurable."""
        self.name = name
        self.network = place.network
        self.program = name
        self.tls: Tls = "userspace"
        self.port = 0
        self.configuration = ""
        self.kernel_from = 0  # bytes; responses of fewer are encrypted in userspace all the same
        self._log = place.folder / f"{label}.log"
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(  # noqa: S603  # the commands are ours
                    [str(word) for word in command],
                    cwd=place.folder,
                    env={**os.environ, **(env or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
        except OSError as exc:
            raise NotMeasurable(f"{name}: can't be started: {exc.strerror}") from exc

    @property
    def pid(self) -> int:
        """The process that was started."""
        return self._process.pid

    def pids(self) -> list[int]:
        """Return it and its descendants. Raises WrongAnswer if it has ended."""
        if self._process.poll() is not None:
            raise WrongAnswer(f"the server has ended (status {self._process.returncode}): {self.told()}")
        return usage.family(self.pid)

    def usage(self) -> Usage:
        """Return what its processes have used so far."""
        return usage.of(self.pids())

    def told(self, lines: int = 3) -> str:
        """Return the end of what it printed."""
        text = self._log.read_text("utf-8", "replace").strip().splitlines()
        return "; ".join(line.strip() for line in text[-lines:]) or "it said nothing"

    def await_line(self, pattern: str) -> re.Match[str]:
        """Return the match of what it prints once it serves. Raises NotMeasurable."""
        end = time.monotonic() + _START
        while time.monotonic() < end and self._process.poll() is None:
            if found := re.search(pattern, self._log.read_text("utf-8", "replace")):
                return found
            time.sleep(_STEP)
        raise self._not_started()

    def await_port(self, port: int) -> None:
        """Wait until somebody listens. Raises NotMeasurable."""
        self.port = port
        end = time.monotonic() + _START
        while time.monotonic() < end and self._process.poll() is None:
            try:
                socket.create_connection((self.network.host, port), timeout=1).close()
                return
            except OSError:
                time.sleep(_STEP)
        raise self._not_started()

    def _not_started(self) -> NotMeasurable:
        return NotMeasurable(f"{self.name}: it does not start: {self.told()}")

    def stop(self) -> None:
        """End it and all that it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)  # its session's own group: start_new_session
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP)
                if not _group_lives(self.pid):
                    return


def _end_with_parent() -> None:
    """In the child: have the kernel end it if we are killed."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _group_lives(group: int) -> bool:
    end = time.monotonic() + _STOP
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return False
        time.sleep(_STEP)
    return True


def free_port(network: Network) -> int:
    """Return a port that nobody listens at now."""
    with socket.create_server((network.host, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def ktlsd_configuration(place: Place, *, kernel: bool, handover_bytes: int, framing: str) -> str:
    """Return ktlsd's configuration, fair to others: one worker, no access log, connections that stay as long as wanted."""
    mode = "require" if kernel else "off"
    return f"""\
root = "{place.root}"
listen = ["{place.network.host}:0"]
workers = 1

[tls]
cert = "{place.cert}"
key = "{place.key}"

[ktls]
mode = "{mode}"
handover_bytes = {handover_bytes}
framing = "{framing}"

[limits]
requests_per_connection = 10000000
"""


def start_ktlsd(
    place: Place, *, kernel: bool, handover_bytes: int = HANDOVER_BYTES, framing: str = "spliced", label: str = ""
) -> Server:
    """Start `ktlsd serve` and wait until it serves. Raises NotMeasurable."""
    label = label or f"ktlsd-{'kernel' if kernel else 'userspace'}"
    text = ktlsd_configuration(place, kernel=kernel, handover_bytes=handover_bytes, framing=framing)
    config = place.folder / f"{label}.toml"
    config.write_text(text)
    ours = str(Path(ktlsd.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "ktlsd", "serve", "--config", str(config)]
    server = Server("ktlsd", command, place, label=label, env={"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"})
    try:
        server.port = int(server.await_line(r"https://[^/\s]*:(\d+)/(?s:.*)  encryption .*\n")[1])
    except BaseException:
        server.stop()
        raise
    server.tls = "kernel" if kernel else "userspace"
    server.kernel_from = handover_bytes if kernel else 0
    server.configuration = text
    server.program = f"ktlsd/{__version__}, {f'kernel TLS from {handover_bytes} bytes on' if kernel else 'kernel TLS off'}"
    return server
