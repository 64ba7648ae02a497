"""Listening sockets: bind with errors an operator can act on, accept in bursts without ever spinning."""

import errno
import os
import socket
from collections.abc import Mapping
from typing import Final

from ktlsd.errors import StartError

# accept(2): errors of the one connection that was about to be accepted, not of the listener.
_CLIENT_GONE: Final = frozenset(
    (
        errno.ECONNABORTED,
        errno.EPERM,
        errno.EPROTO,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
    )
)
_FIRST_INHERITED: Final = 3  # SD_LISTEN_FDS_START
_NAMES: Final = ("https", "http", "metrics")  # FileDescriptorName=; others count as the first
_BACKLOG: Final = 4096  # the kernel cuts it to net.core.somaxconn
_PRIVILEGED_HINT: Final = (
    "ports below net.ipv4.ip_unprivileged_port_start (1024 by default) need CAP_NET_BIND_SERVICE: "
    "use another port, or give the program that capability"
)


def bind(host: str, port: int) -> list[socket.socket]:
    """Return listening, non-blocking sockets, one for each address of `host`; "" is all addresses. Raises StartError.

    Of a name's addresses those that this machine hasn't got are left out (localhost without IPv6), if any is left.
    """
    try:
        infos = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as exc:
        raise StartError(f"cannot listen on {address_text(host, port)}: no such host; give an address of this machine") from exc
    bound: list[socket.socket] = []
    refused: OSError | None = None
    for family, _, _, _, address in infos:
        try:
            # Port 0 is any free one: the same for all addresses.
            sock = socket.create_server((str(address[0]), port), family=family, backlog=_BACKLOG)
        except OSError as exc:
            if exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                refused = exc
                continue
            for other in bound:
                other.close()
            raise _bind_error(host, port, exc) from exc
        sock.setblocking(False)
        port = sock.getsockname()[1]
        bound.append(sock)
    if not bound:
        assert refused is not None, "getaddrinfo returns an address or raises"
        raise _bind_error(host, port, refused) from refused
    return bound


def _bind_error(host: str, port: int, exc: OSError) -> StartError:
    hints = {
        errno.EADDRINUSE: "something listens there already (`ss -ltnp` shows it; ktlsd itself, if the address is only spelled "
        "anew): stop it or use another port",
        errno.EACCES: _PRIVILEGED_HINT,
        errno.EPERM: _PRIVILEGED_HINT,
        errno.EADDRNOTAVAIL: "that address is not this machine's",
    }
    reason = os.strerror(exc.errno or 0)
    shown = address_text(host or "*", port)
    return StartError(f"cannot listen on {shown}: {reason}; {hints.get(exc.errno or 0, 'use another address or port')}")


def address_text(host: str, port: int) -> str:
    """Return host:port, IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def inherited(environment: Mapping[str, str]) -> dict[str, list[socket.socket]]:
    """Return the listening sockets that systemd has opened for us (sd_listen_fds(3)), by name. Raises StartError."""
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = int(environment.get("LISTEN_FDS", "0"))
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[socket.socket]] = {}
    for number in range(count):
        sock = adopt(_FIRST_INHERITED + number)
        if (
            sock.family not in (socket.AF_INET, socket.AF_INET6)
            or sock.type != socket.SOCK_STREAM
            or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        ):
            raise StartError(
                f"socket {number} from systemd does not listen for TCP: use ListenStream= with a port, and Accept=no"
            )
        name = names[number] if number < len(names) else ""
        found.setdefault(name if name in _NAMES else _NAMES[0], []).append(sock)
    return found


def adopt(fd: int) -> socket.socket:
    """Return an open listening socket as one of ours."""
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    os.set_inheritable(fd, False)
    return sock


class Listener:
    """A listening socket as a source for the poller."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.deadline = float("inf")

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port it is bound to."""
        host, port = self._sock.getsockname()[:2]
        return host, port

    def try_accept(self) -> tuple[socket.socket, tuple[str, int]] | None:
        """Return a new connection, non-blocking and without Nagle's delay, and who it is; None if none waits.

        Raises OSError(EMFILE, ENFILE, ENOBUFS, ENOMEM): the caller must stop asking for a while.
        """
        while True:
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                return None
            except OSError as exc:
                if exc.errno not in _CLIENT_GONE:
                    raise
                continue
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock, address[:2]

    def close(self) -> None:
        """Stop listening."""
        self._sock.close()
