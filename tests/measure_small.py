"""Small requests, handshakes, fairness and the start, ktlsd beside nginx, in turn: medians of ratios.

Userspace mode, or with --ktls auto the kernel where it can.

    python tests/measure_small.py [--rounds 7] [--ktls auto] [WHAT ...]

    http1       10 KB by HTTP/1.1, wrk -t1 -c16 (apt-get install wrk)
    http2       10 KB, h2load -c4 -m16 (apt-get install nghttp2-client)
    handshakes  a full handshake and one request each: wrk -t1 -c16 -H "Connection: close"
    resumed     how many connections to two workers are resumed, by a client that comes again
    workers     10 KB by HTTP/1.1: two workers against one, and how evenly
    fairness    64 downloads of 16 MiB at a time: fastest over slowest; how long a request has to wait beside them, and how
                long a turn of the worker's loop takes (strace)
    start       from the command to the first response

Rates are requests per second; CPU is the server's, user and system, from /proc/PID/schedstat.
"""

import argparse
import http.client
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import measure, pki
from tests.serving import Program, program

SECONDS = 3
KTLS = "off"
TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
TLS.check_hostname, TLS.verify_mode = False, ssl.CERT_NONE


def serve(folder: Path, *more: str) -> AbstractContextManager[Program]:
    """Userspace mode; a connection may ask as often as the tools like, as with the peer."""
    (folder / "many.toml").write_text("[limits]\nrequests_per_connection = 10000000\n")
    own = ("--cert", "cert.pem", "--key", "key.pem", "--ktls", KTLS, "--config", "many.toml")
    return program("root", *own, *more, cwd=folder)


def cpu(pids: list[int]) -> float:
    """Seconds."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids) / 1e9


def workers(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


def wrk(port: int, name: str = "10k", *more: str) -> float:
    told = subprocess.run(
        ["wrk", "-t1", "-c16", f"-d{SECONDS}", *more, f"https://127.0.0.1:{port}/{name}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "Non-2xx" not in told
    return float(re.search(r"Requests/sec:\s+([\d.]+)", told)[1])


def h2load(port: int) -> float:
    told = subprocess.run(
        ["h2load", "-c4", "-m16", f"-D{SECONDS}", f"https://127.0.0.1:{port}/10k"], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r" 0 failed, 0 errored", told), told
    return float(re.search(r"([\d.]+) req/s", told)[1])


def handshakes(port: int) -> float:
    return wrk(port, "small", "-H", "Connection: close")


def resumed(folder: Path) -> None:
    """How many connections are resumed, by one client that comes again and again to two workers."""
    with serve(folder, "--workers", "2") as server:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.minimum_version = context.maximum_version = version
            session, found = None, []
            for _ in range(501):
                with (
                    socket.create_connection(("127.0.0.1", server.port)) as sock,
                    context.wrap_socket(sock, session=session) as tls,
                ):
                    tls.sendall(b"GET /small HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    tls.recv(4096)
                    found.append(tls.session_reused)
                    session = tls.session
            shares = [cpu([pid]) for pid in workers(server.process.pid)]
            print(f"resumed, {version.name}, two workers: {sum(found[1:]) / 5:.1f} %; CPU so far {shares}", flush=True)


def get(port: int, path: str) -> int:
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=TLS, timeout=60)
    connection.request("GET", path)
    size = len(connection.getresponse().read())
    connection.close()
    return size


def pairs(
    what: str, rounds: int, ask: Callable[[int], float], ours: tuple[int, list[int]], theirs: tuple[int, list[int]]
) -> None:
    rates: dict[str, list[tuple[float, float]]] = {"ktlsd": [], "nginx": []}
    for number in range(rounds + 1):
        order = [("ktlsd", *ours), ("nginx", *theirs)]
        for name, port, pids in order if number % 2 else reversed(order):
            before = cpu(pids)
            rate = ask(port)
            if number:  # the first warms up
                rates[name].append((rate, (cpu(pids) - before) / (rate * SECONDS) * 1e6))
    ratios = sorted(a[0] / b[0] for a, b in zip(*rates.values(), strict=True))
    cpus = statistics.median(a[1] / b[1] for a, b in zip(*rates.values(), strict=True))
    shown = "; ".join(
        f"{name} {statistics.median(r for r, _ in found):,.0f}/s, {statistics.median(c for _, c in found):.0f} us CPU each"
        for name, found in rates.items()
    )
    print(
        f"{what}: {statistics.median(ratios):.2f} of nginx ({ratios[0]:.2f} to {ratios[-1]:.2f}), CPU {cpus:.2f}; {shown}",
        flush=True,
    )


def two_workers(folder: Path, rounds: int) -> None:
    found: dict[str, list[float]] = {"1": [], "2": []}
    shares = []
    with ExitStack() as stack:
        servers = {n: stack.enter_context(serve(folder, "--workers", n)) for n in found}
        for _ in range(rounds):
            for count, server in servers.items():
                pids = workers(server.process.pid)
                before = [cpu([pid]) for pid in pids]
                found[count].append(wrk(server.port))
                used = [cpu([pid]) - earlier for pid, earlier in zip(pids, before, strict=True)]
                if count == "2":
                    shares.append(min(used) / max(used))
    ratio = statistics.median(b / a for a, b in zip(found["1"], found["2"], strict=True))
    print(
        f"two workers: {ratio:.2f} of one; the one that did less did {statistics.median(shares):.2f} of the other", flush=True
    )


@contextmanager
def turns(pid: int) -> Iterator[list[float]]:
    """Collect how long the worker was busy between two waits, in seconds: by strace, which looks at nothing else."""
    found: list[float] = []
    if not shutil.which("strace") or "User Mode Linux" in Path("/proc/cpuinfo").read_text():  # there it slows down too much
        yield found
        return
    with tempfile.NamedTemporaryFile("r") as report:
        tracer = subprocess.Popen(
            ["strace", "--seccomp-bpf", "-f", "-ttt", "-T", "-e", "trace=epoll_wait", "-o", report.name, "-p", str(pid)],
            stderr=subprocess.PIPE,
        )
        assert tracer.stderr is not None
        tracer.stderr.readline()
        yield found
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=20)
        ended = None
        for line in report:
            match = re.search(r" (\d+\.\d+) epoll_wait.*<(\d+\.\d+)>$", line)
            if match:
                began, waited = float(match[1]), float(match[2])
                if ended is not None:
                    found.append(began - ended)
                ended = began + waited


def fairness(port: int, pid: int) -> None:
    seconds: list[float] = []
    begin = threading.Barrier(65)

    def load() -> None:
        begin.wait()
        started = time.monotonic()
        measure.download(port, "/16m")
        seconds.append(time.monotonic() - started)

    threads = [threading.Thread(target=load) for _ in range(64)]
    for thread in threads:
        thread.start()
    begin.wait()
    waits = []
    with turns(pid) as busy:
        while any(thread.is_alive() for thread in threads):
            started = time.monotonic()
            get(port, "/small")
            waits.append(time.monotonic() - started)
    for thread in threads:
        thread.join()
    even, wait, longest = min(seconds) / max(seconds), statistics.median(waits) * 1e3, max(waits) * 1e3
    print(f"64 downloads of 16 MiB: fastest over slowest {even:.2f}", flush=True)
    print(f"  a handshake and a small request beside them: median {wait:.0f} ms, longest {longest:.0f} ms", flush=True)
    if busy:
        busy.sort()
        ms = [1e3 * busy[int(len(busy) * part)] for part in (0.5, 0.99)]
        print(f"  a turn of the loop: median {ms[0]:.1f} ms, 99 % {ms[1]:.1f} ms, longest {1e3 * busy[-1]:.1f} ms", flush=True)


def start(folder: Path, rounds: int) -> None:
    taken = []
    for _ in range(rounds):
        began = time.monotonic()
        with program("root", "--cert", "cert.pem", "--key", "key.pem", "--workers", "1", cwd=folder) as server:
            get(server.port, "/small")
            taken.append(time.monotonic() - began)
    print(f"start to first response: {statistics.median(taken):.2f} s ({min(taken):.2f} to {max(taken):.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["http1", "http2", "handshakes", "resumed", "workers", "fairness", "start"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ktls", choices=["off", "auto"], default="off")
    asked = parser.parse_args()
    global KTLS
    KTLS = asked.ktls
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "root").mkdir()
        for file, size in (("10k", 10_240), ("small", 100), ("16m", 16 << 20)):
            (folder / "root" / file).write_bytes(bytes(size))
        pki.write(folder)
        server = stack.enter_context(serve(folder, "--workers", "1"))
        theirs = stack.enter_context(measure.nginx(folder))
        ours = (server.port, workers(server.process.pid))
        found = subprocess.run(["pgrep", "-f", f"nginx.*{folder}"], capture_output=True, text=True, check=False).stdout.split()
        other = (theirs.get("nginx", 0), [pid for master in found for pid in workers(int(master))])
        for what, tool, ask in (("http1", "wrk", wrk), ("http2", "h2load", h2load), ("handshakes", "wrk", handshakes)):
            if what in asked.what and not (theirs and shutil.which(tool)):
                print(f"{what}: not measured: apt-get install nginx-light wrk nghttp2-client")
            elif what in asked.what:
                pairs(what, asked.rounds, ask, ours, other)
        if "fairness" in asked.what:
            fairness(server.port, ours[1][0])
        if "resumed" in asked.what:
            resumed(folder)
        if "workers" in asked.what and shutil.which("wrk"):
            two_workers(folder, asked.rounds)
        if "start" in asked.what:
            start(folder, asked.rounds)


if __name__ == "__main__":
    main()
