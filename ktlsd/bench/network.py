"""The way between server and client: loopback, or two network namespaces of our own with delay and loss between them.

Servers, and whoever starts them, are in one of the namespaces, as /proc/net/tls_stat counts by namespace; the client's
sockets are made in the other one. Both have a loopback of their own that nothing is wrong with.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Final

from ktlsd.bench.answers import NotMeasurable

_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
_SERVER, _CLIENT = "10.255.255.1", "10.255.255.2"
_QUEUE: Final = 1_000_000  # packets netem holds; its own limit of 1,000 would drop what is only on its way
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Network:
    """Where servers listen (`host`), and from where they are asked."""

    def __init__(self, host: str = "127.0.0.1", servers: int = -1, clients: int = -1) -> None:
        """The descriptors are those of namespaces, -1 for the present one."""
        self.host = host
        self._servers = servers
        self._clients = clients

    @contextlib.contextmanager
    def at_client(self) -> Iterator[None]:
        """Be where clients are; only for the calling thread, and for making sockets."""
        if self._clients < 0:
            yield
            return
        _enter(self._clients)
        try:
            yield
        finally:
            _enter(self._servers)


LOOPBACK: Final = Network()


@contextlib.contextmanager
def network(delay_ms: float, loss_percent: float) -> Iterator[Network]:
    """Make a network that delays every packet (each way) and loses some; loopback for neither.

    The calling thread, and what it starts, is where servers are until the end. Raises NotMeasurable: not root, no tools, no
    netem.
    """
    if not delay_ms and not loss_percent:
        yield LOOPBACK
        return
    if os.geteuid() != 0:
        raise NotMeasurable("delay and loss need root: network namespaces and netem")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    ip, tc = shutil.which("ip", path=path), shutil.which("tc", path=path)
    if ip is None or tc is None:
        raise NotMeasurable("delay and loss need `ip` and `tc`: apt-get install iproute2")
    netem = ["delay", f"{delay_ms}ms"] if delay_ms else []
    netem += ["loss", f"{loss_percent}%"] if loss_percent else []
    with contextlib.ExitStack() as stack:
        home = _here(stack)
        stack.callback(_enter, home)
        clients, servers = _new(stack), _new(stack)
        there = f"/proc/{os.getpid()}/fd/{clients}"
        _run(ip, "link", "add", "server", "type", "veth", "peer", "name", "client", "netns", there)
        made = Network(_SERVER, servers, clients)
        _set_up(ip, tc, "server", _SERVER, netem)
        with made.at_client():
            _set_up(ip, tc, "client", _CLIENT, netem)
        yield made


def _set_up(ip: str, tc: str, device: str, address: str, netem: list[str]) -> None:
    _run(ip, "link", "set", "dev", "lo", "up")
    # Packets as they are on a wire: netem loses what it is given whole, which could be 64 KiB.
    _run(ip, "link", "set", "dev", device, "gso_max_segs", "1", "up")
    _run(ip, "address", "add", f"{address}/30", "dev", device)
    _run(tc, "qdisc", "add", "dev", device, "root", "netem", "limit", str(_QUEUE), *netem)


def _here(stack: contextlib.ExitStack) -> int:
    """Return the present namespace; it lives as long as its descriptor."""
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _new(stack: contextlib.ExitStack) -> int:
    """Go to a new namespace and return it."""
    if _libc.unshare(_CLONE_NEWNET):
        raise NotMeasurable(f"no network namespace: {os.strerror(ctypes.get_errno())}")
    return _here(stack)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # ours
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        if "netem" in command and "unknown" in said[0]:
            raise NotMeasurable("no delay and loss here: this kernel has no netem (modprobe sch_netem; CONFIG_NET_SCH_NETEM)")
        raise NotMeasurable(f"no delay and loss here: {' '.join(command)}: {said[0]}")
