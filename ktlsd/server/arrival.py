"""A connection from a proxy, before it is anybody's: first the proxy says who its client is (PROXY protocol)."""

import socket

from ktlsd.errors import Overdue, PeerTruncated
from ktlsd.net.kernel import Kernel
from ktlsd.protocol import proxy_protocol


class Arrival:
    """A source for the poller until `identify` has an answer."""

    __slots__ = ("_kernel", "deadline", "proxy", "sock")

    def __init__(self, sock: socket.socket, proxy: tuple[str, int], kernel: Kernel, deadline: float) -> None:
        """`proxy` is the address that connected, `deadline` monotonic seconds."""
        self.sock = sock
        self.proxy = proxy
        self.deadline = deadline
        self._kernel = kernel

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self.sock.fileno()

    def identify(self, now: float, *, ended: bool = False) -> tuple[str, int] | None:
        """Return who the client is, None while the header is not whole. What follows it stays in the socket.

        `ended`: nothing more will come.

        Raises ProxyHeaderError, PeerTruncated, Overdue.
        """
        data = self._kernel.peek(self.sock, proxy_protocol.MAX_HEADER)
        header = proxy_protocol.parse(data) if data else None
        if data == b"" or (ended and header is None):
            raise PeerTruncated("the proxy left before it said who its client is")
        if header is None:
            if now >= self.deadline:
                raise Overdue("no PROXY protocol header in time")
            return None
        length, client = header
        self._kernel.receive(self.sock, length)
        return client or self.proxy
