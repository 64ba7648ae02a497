"""What a download costs the server: CPU seconds and system calls per GB, in each mode it can run in here.

    python tests/measure.py cost      kernel mode (where the kernel has TLS) and userspace mode
    python tests/measure.py sendall   userspace mode against SSLSocket.sendall over a mapping of the same file

The client does the handshake, then discards ciphertext in the kernel (recv with MSG_TRUNC): it is not the bottleneck. Both
sides alternate in one run; ratios are medians of the pairs. Under User Mode Linux all CPU time counts as system time.
"""

import argparse
import mmap
import os
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import pki
from tests.serving import Program, program

_TICKS = os.sysconf("SC_CLK_TCK")
_CALL = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", re.MULTILINE)


def cpu_seconds(pid: int) -> tuple[float, float]:
    """User and system seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / _TICKS, int(fields[12]) / _TICKS


def download(port: int, target: str = "/big") -> tuple[int, float]:
    """Fetch without looking at it; return bytes of the wire behind the request, and seconds."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port)) as sock:
        tls = context.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=True)
        start = time.monotonic()
        tls.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        raw = socket.socket(fileno=tls.detach())
        with raw:
            taken = 0
            while count := len(_discard(raw)):
                taken += count
        return taken, time.monotonic() - start


_sink = bytearray(1 << 20)


def _discard(sock: socket.socket) -> memoryview:
    """Receive and throw away up to 1 MiB; as long as what came."""
    count = sock.recv_into(_sink, len(_sink), socket.MSG_TRUNC)
    return memoryview(_sink)[:count]


def calls_of(server: Program, size: int) -> dict[str, int] | None:
    """System calls by name during one download; None without strace."""
    if not shutil.which("strace"):
        return None
    with tempfile.NamedTemporaryFile() as report:
        tracer = subprocess.Popen(
            ["strace", "-f", "-c", "-o", report.name, "-p", str(server.process.pid)], stderr=subprocess.PIPE, text=True
        )
        assert tracer.stderr is not None
        tracer.stderr.readline()  # "attached"
        taken, _ = download(server.port)
        tracer.send_signal(signal.SIGINT)
        tracer.wait(20)
        assert taken > size
        return {name: int(count) for count, name in _CALL.findall(Path(report.name).read_text()) if name != "total"}


@contextmanager
def served(size: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        (folder / "root").mkdir()
        noise = os.urandom(1 << 20)
        with (folder / "root/big").open("wb") as file:
            for _ in range(size >> 20):
                file.write(noise)
        pki.write(folder)
        yield folder


def serve(folder: Path, ktls: str):
    return program("root", "--cert", "cert.pem", "--key", "key.pem", "--ktls", ktls, cwd=folder)


def calls(size: int) -> dict[str, int]:
    """System calls by name during one download of `size` bytes in kernel mode, printed too. Needs strace."""
    with served(size) as folder, serve(folder, "require") as server:
        download(server.port)
        counted = calls_of(server, size)
        assert counted is not None, "strace is missing: make test installs it"
        print(f"\n{size >> 20} MiB in kernel mode: {sum(counted.values()) / (size / 1e9):,.0f} calls per GB: {counted}")
        return counted


def cost(size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Measure each mode; return {mode: {user, system, seconds, calls}}, all per GB (1e9 bytes of payload)."""
    out: dict[str, dict[str, float]] = {}
    with served(size) as folder:
        for ktls in ("auto", "off"):
            with serve(folder, ktls) as server:
                mode = "kernel" if "in the kernel" in "".join(server.told) else "userspace"
                if mode in out:
                    continue
                download(server.port)
                before, spent = cpu_seconds(server.process.pid), 0.0
                for _ in range(rounds):
                    taken, seconds = download(server.port)
                    assert taken > size, "the download is not whole"
                    spent += seconds
                user, system = (b - a for a, b in zip(before, cpu_seconds(server.process.pid), strict=True))
                gigabytes = size * rounds / 1e9
                out[mode] = {"user": user / gigabytes, "system": system / gigabytes, "seconds": spent / gigabytes}
                calls = calls_of(server, size)
                if calls is not None:
                    out[mode]["calls"] = sum(calls.values()) / (size / 1e9)
                    print(f"{mode}: one download of {size >> 20} MiB: {calls}")
    for mode, row in out.items():
        print(f"{mode:>10}: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()) + "   (per GB)")
    return out


@contextmanager
def sendall_server(folder: Path) -> Iterator[int]:
    """The toy to be compared with, in a process of its own: SSLSocket.sendall over a mapping. Yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pid = os.fork()
        if not pid:
            try:
                _sendall_forever(listener, folder)
            finally:
                os._exit(1)
        try:
            yield listener.getsockname()[1]
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _sendall_forever(listener: socket.socket, folder: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    with (folder / "root/big").open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        while True:
            sock, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with context.wrap_socket(sock, server_side=True) as tls:
                tls.recv(4096)
                tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(view))
                tls.sendall(view)


def sendall(size: int, rounds: int) -> float:
    """Return our throughput in userspace mode over that of SSLSocket.sendall, the median of the pairs."""
    with served(size) as folder, serve(folder, "off") as server, sendall_server(folder) as port:
        download(port)
        download(server.port)
        ratios = []
        for number in range(rounds):
            pair = [port, server.port] if number % 2 else [server.port, port]
            seconds = {p: download(p)[1] for p in pair}
            ratios.append(seconds[port] / seconds[server.port])
            print(f"  sendall {size / seconds[port] / 1e6:,.0f} MB/s, ktlsd {size / seconds[server.port] / 1e6:,.0f} MB/s")
    ratio = statistics.median(ratios)
    print(f"ktlsd / SSLSocket.sendall: {ratio:.3f} (median of {rounds} pairs, {size >> 20} MiB, {ssl.OPENSSL_VERSION})")
    return ratio


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "sendall"])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    {"cost": cost, "sendall": sendall}[asked.what](asked.mib << 20, asked.rounds)
