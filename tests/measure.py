"""What a download costs the server: CPU seconds and system calls per GB, in each mode it can run in here.

    python tests/measure.py cost      kernel mode (where the kernel has TLS) and userspace mode
    python tests/measure.py sendall   userspace mode against SSLSocket.sendall over a mapping of the same file
    python tests/measure.py share     the same server in the clear, by kernel TLS and in userspace mode, over HTTP/1.1
    python tests/measure.py http2     HTTP/2 in each mode and framing, HTTP/1.1, and nginx, one stream or `--streams`

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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hpack import Encoder

from tests import pki
from tests.h2peer import PREFACE, raw
from tests.serving import Program, program

_TICKS = os.sysconf("SC_CLK_TCK")
_CALL = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", re.MULTILINE)


def cpu_seconds(pid: int) -> tuple[float, float]:
    """User and system seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / _TICKS, int(fields[12]) / _TICKS


def download_http2(port: int, size: int, streams: int = 1) -> float:
    """Fetch /big over so many streams of one connection without looking at it; return seconds."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    widest = (1 << 31) - 1
    said = PREFACE + raw(4, 0, 0, b"\0\4" + widest.to_bytes(4, "big")) + raw(8, 0, 0, (widest - 65_535).to_bytes(4, "big"))
    block = Encoder().encode([(":method", "GET"), (":scheme", "https"), (":path", "/big"), (":authority", "localhost")])
    said += raw(1, 5, 1, block)
    for number in range(1, streams):
        said += raw(1, 5, 2 * number + 1, block)
    # Frames without their TLS: what is over when so much has come lacks a thousandth.
    wanted = streams * (size + 9 * (size // 16_384))
    with socket.create_connection(("127.0.0.1", port)) as sock:
        tls = context.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=True)
        assert tls.selected_alpn_protocol() == "h2"
        start = time.monotonic()
        tls.send(said)
        with socket.socket(fileno=tls.detach()) as plain:
            taken = 0
            while taken < wanted:
                count = len(_discard(plain))
                assert count, f"the connection ended after {taken} of {wanted} bytes"
                taken += count
        return time.monotonic() - start


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


def download_plain(port: int, target: str = "/big") -> tuple[int, float]:
    """The same in the clear."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        start = time.monotonic()
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        taken = 0
        while count := len(_discard(sock)):
            taken += count
        return taken, time.monotonic() - start


def share(size: int, rounds: int) -> None:
    """Print what encryption leaves of the throughput in the clear, by one and the same server: medians of pairs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        clear = free.getsockname()[1]
    with served(size) as folder, ExitStack() as stack:
        (folder / "clear.toml").write_text(f'[[http]]\nlisten = ["127.0.0.1:{clear}"]\naction = "serve"\n')
        own = ("--cert", "cert.pem", "--key", "key.pem", "--workers", "1")
        both = stack.enter_context(program("root", *own, "--config", "clear.toml", cwd=folder))
        kernel = "in the kernel" in "".join(both.told)
        asked: dict[str, Callable[[], tuple[int, float]]] = {"in the clear": lambda: download_plain(clear)}
        if kernel:
            asked["kernel mode"] = lambda: download(both.port)
        off = stack.enter_context(serve(folder, "off"))
        asked["userspace mode"] = lambda: download(off.port)
        found: dict[str, list[float]] = {name: [] for name in asked}
        for number in range(rounds + 1):
            for name in list(asked) if number % 2 else reversed(asked):
                taken, seconds = asked[name]()
                assert taken > size
                if number:  # the first warms up
                    found[name].append(seconds)
        for name, times in found.items():
            ratios = sorted(b / t for b, t in zip(found["in the clear"], times, strict=True))
            speed = size / statistics.median(times) / 1e6
            print(f"{name:>15}: {statistics.median(ratios):.2f} of it ({ratios[0]:.2f} to {ratios[-1]:.2f}), {speed:,.0f} MB/s")
        if kernel:
            gains = sorted(b / a for a, b in zip(found["kernel mode"], found["userspace mode"], strict=True))
            print(f"kernel mode over userspace mode: {statistics.median(gains):.2f} ({gains[0]:.2f} to {gains[-1]:.2f})")


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
            ["strace", "-f", "-c", "-o", report.name, "-p", str(server.workers()[0])], stderr=subprocess.PIPE, text=True
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
    return program("root", "--cert", "cert.pem", "--key", "key.pem", "--ktls", ktls, "--workers", "1", cwd=folder)


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
                before, spent = cpu_seconds(server.workers()[0]), 0.0
                for _ in range(rounds):
                    taken, seconds = download(server.port)
                    assert taken > size, "the download is not whole"
                    spent += seconds
                user, system = (b - a for a, b in zip(before, cpu_seconds(server.workers()[0]), strict=True))
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


NGINX = """
worker_processes 1; pid nginx.pid; error_log error.log; daemon off; user root;
events { worker_connections 1024; }
http { access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000; open_file_cache max=100;
  ssl_certificate cert.pem; ssl_certificate_key key.pem; root root;
  ssl_protocols TLSv1.3; http2_chunk_size CHUNK;
  server { listen 127.0.0.1:PORT1 ssl http2; ssl_conf_command Options KTLS; }
  server { listen 127.0.0.1:PORT2 ssl http2; } }
"""


@contextmanager
def nginx(folder: Path) -> Iterator[dict[str, int]]:
    """nginx for the same files; yields ports by what it does. Empty without nginx."""
    program = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
    if not program:
        yield {}
        return
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            ports.append(sock.getsockname()[1])
    text = NGINX.replace("PORT1", str(ports[0])).replace("PORT2", str(ports[1])).replace("CHUNK", "16k")
    (folder / "nginx.conf").write_text(text)
    with subprocess.Popen([program, "-p", str(folder), "-c", str(folder / "nginx.conf")], stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(200):
                try:
                    socket.create_connection(("127.0.0.1", ports[1])).close()
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            yield {"nginx, KTLS": ports[0], "nginx": ports[1]}
        finally:
            process.terminate()


def http2(size: int, rounds: int, streams: int) -> dict[str, float]:
    """Return the throughput of each contender over that of our HTTP/1.1 in its best mode, medians of the rounds."""
    with served(size) as folder, ExitStack() as stack:
        asked: dict[str, Callable[[], float]] = {}

        def ours(name: str, *lines: str) -> Program:
            (folder / f"{name}.toml").write_text("\n".join(lines))
            arguments = ["root", "--cert", "cert.pem", "--key", "key.pem", "--config", f"{name}.toml", "--workers", "1"]
            return stack.enter_context(program(*arguments, cwd=folder))

        first = ours("default")
        kernel = "in the kernel" in "".join(first.told)
        mode = "kernel" if kernel else "userspace"
        asked[f"HTTP/1.1, {mode}"] = lambda: sum(download(first.port)[1] for _ in range(streams))
        asked[f"HTTP/2, {mode}"] = lambda: download_http2(first.port, size, streams)
        if kernel:
            for name, line in (("sendfile", '[ktls]\nframing = "sendfile"'), ("copy", '[ktls]\nframing = "copy"')):
                port = ours(name, line).port
                asked[f"HTTP/2, kernel, {name}"] = lambda port=port: download_http2(port, size, streams)
            port = ours("off", "[ktls]", 'mode = "off"').port
            asked["HTTP/2, userspace"] = lambda: download_http2(port, size, streams)
        for name, port in stack.enter_context(nginx(folder)).items():
            if kernel or name == "nginx":
                asked[f"{name}, HTTP/2"] = lambda port=port: download_http2(port, size, streams)
        found: dict[str, list[float]] = {name: [] for name in asked}
        for number in range(rounds + 1):
            for name in list(asked) if number % 2 else reversed(asked):
                seconds = asked[name]()
                if number:  # the first warms up
                    found[name].append(seconds)
    base = found[next(iter(asked))]
    out = {}
    for name, times in found.items():
        ratios = sorted(b / t for b, t in zip(base, times, strict=True))
        out[name] = statistics.median(ratios)
        speed = streams * size / statistics.median(times) / 1e6
        print(f"{name:>26}: {out[name]:.2f} of HTTP/1.1 ({ratios[0]:.2f} to {ratios[-1]:.2f}), {speed:,.0f} MB/s")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "sendall", "share", "http2"])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=1)
    asked = parser.parse_args()
    if asked.what == "http2":
        http2(asked.mib << 20, asked.rounds, asked.streams)
        raise SystemExit
    {"cost": cost, "sendall": sendall, "share": share}[asked.what](asked.mib << 20, asked.rounds)
