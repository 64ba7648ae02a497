"""A connection without TLS, and the half of every connection that has nothing to do with TLS: the socket, order, the end."""

import enum
import socket
from collections.abc import Sequence
from typing import Final, Protocol

from ktlsd.errors import PeerError
from ktlsd.net.kernel import Kernel
from ktlsd.net.tx_plain import PlainTx
from ktlsd.net.tx_userspace import UserspaceTx
from ktlsd.slices import Outgoing

# More than a request needs; OpenSSL's memory BIO keeps the largest size it ever had, for every idle connection.
_RECEIVE: Final = 16_384
RECEIVES: Final = 8  # at most so many in one call: a peer that floods must not have the worker for itself


class Mode(enum.Enum):
    """Who encrypts what we send."""

    HANDSHAKE = "handshake"
    PLAIN = "plain"
    USERSPACE = "userspace"
    KERNEL = "kernel"


class Closing(enum.IntEnum):
    """How far `try_close` is."""

    NO = 0
    NOTIFIED = 1  # close_notify accepted; waiting until TCP has all
    FINISHED = 2  # our direction ended; waiting for the peer's end


class Facts(Protocol):
    """What was agreed with the peer; "" and False without TLS."""

    @property
    def version_name(self) -> str:
        """The TLS version, "TLSv1.3"."""

    @property
    def cipher_name(self) -> str:
        """The suite's name."""

    @property
    def alpn(self) -> str | None:
        """The protocol both agreed on (RFC 7301), None if there was no such agreement."""

    @property
    def resumed(self) -> bool:
        """Whether the handshake was an abbreviated one."""

    @property
    def key_updates(self) -> int:
        """How many KeyUpdates the peer has sent."""


class _NoTls:
    version_name = ""
    cipher_name = ""
    alpn = None
    resumed = False
    key_updates = 0


class PlainChannel:
    """One accepted TCP connection; what it says goes out as it is. The contract is in `net.channel`."""

    __slots__ = (
        "_came",
        "_closing",
        "_ended",
        "_kernel",
        "_over",
        "_sock",
        "_tx",
        "expiring",
        "facts",
        "has_input",
        "mode",
        "why_userspace",
    )

    def __init__(self, sock: socket.socket, kernel: Kernel) -> None:
        self._sock = sock
        self._kernel = kernel
        self._tx: UserspaceTx | PlainTx = PlainTx(sock, kernel)
        self._closing = Closing.NO
        self._came: bytes | None = None  # received by `fetch`, not yet passed on
        self.has_input = True  # the socket may hold input: a call stopped because it had received enough, or was not made yet
        self._ended = False  # TCP's end, or an error, stands behind it
        self._over = False  # and has been read
        self.facts: Facts = _NoTls()
        self.mode = Mode.PLAIN
        self.why_userspace = "no TLS on this port"
        self.expiring = False  # the keys can't be renewed: finish the response, then close

    def fileno(self) -> int:
        """The socket's descriptor, -1 once closed."""
        return self._sock.fileno()

    def note_input(self, *, ended: bool) -> None:
        """The poller saw an edge: there is input, and behind it the end if `ended`."""
        self.has_input = True
        self._ended = self._ended or ended

    def try_handshake(self) -> bool | None:
        """There is none."""
        return True

    def try_receive(self) -> bytes | None:
        """Return what came; b"" once the peer has ended its direction. None: would block. Raises PeerTruncated."""
        return self._receive()

    def fetch(self) -> None:
        """Receive now what `try_receive` is going to return. Raises PeerTruncated."""
        if self.has_input and self._came is None:
            self._came = self._take()

    def _receive(self) -> bytes | None:
        data = self._came
        if data is not None:
            self._came = None
            return data
        return self._take() if self.has_input else None

    def _take(self) -> bytes | None:
        data = self._kernel.receive(self._sock, _RECEIVE)
        # A short read has emptied the socket, if not the end stands behind it; whatever comes later is a new edge.
        if data is None or (0 < len(data) < _RECEIVE and not self._ended):
            self.has_input = False
        return data

    def try_send(self, segments: Sequence[Outgoing], *, body_bytes: int = 0) -> int | None:
        """Send from the front of `segments`; return how many bytes were accepted, None if none could be."""
        return self._tx.send(segments)

    def try_send_whole(self, data: bytes, *, body_bytes: int, last: bool = False, hold: bool = False) -> bool:
        """Send all of `data`, a response with so much body, if that is sure to go whole; False: nothing was accepted.

        `last`: `try_close` comes next. `hold`: the next `try_flush` sends it.
        """
        return False

    def try_flush(self) -> bool:
        """Send on what was accepted and is still held here; whether nothing is. The kernel sends on by itself."""
        return self._tx.flush()

    # --- ending ----------------------------------------------------------------------------------------------------

    def try_close(self) -> bool | None:
        """Go on with closing: True when the socket can be dropped. None: call again when the socket or the clock says so.

        Order (ktls.md §3.6): the last record closed, close_notify, everything in TCP, FIN, then input is read and thrown
        away until the peer's end, because unread input at close would make TCP send RST and destroy the tail.
        """
        if self._closing is Closing.NO:
            if not self._tx.notify_close():
                return None
            self._closing = Closing.NOTIFIED
        over = self._discard()
        if self._closing is Closing.NOTIFIED:
            if not self._tx.all_taken():
                return None
            self._kernel.shutdown(self._sock)
            self._closing = Closing.FINISHED
        return True if over else None

    def _discard(self) -> bool:
        """Read and throw away, so much in one call; whether the peer's end has come."""
        for _ in range(RECEIVES):
            if self._over:
                break
            data = self._receive()
            if data is None:
                return False
            if not data:
                self._over = True
                self.has_input = False
        return self._over

    def pace(self, rate: int | None) -> None:
        """Send at most so many bytes a second from now on; None for no limit."""
        self._kernel.pace(self._sock, rate)

    def unacknowledged(self) -> int:
        """Return how many bytes TCP still has to bring to the peer."""
        return self._kernel.unacknowledged(self._sock)

    def say_goodbye(self, error: PeerError) -> None:
        """Tell the peer what is wrong, if there is a way."""

    def send_plain(self, data: bytes) -> None:
        """Send bytes in the clear to a client that never spoke TLS; what doesn't go at once is dropped."""

    @property
    def told(self) -> bool:
        """Whether the peer has been told that this is the end: a `drop` now might destroy that, `try_close` does not."""
        return self._closing is not Closing.NO

    def abort(self) -> None:
        """Close at once with RST, without close_notify: the peer can tell that something is missing."""
        if self._sock.fileno() >= 0:
            self._kernel.reset(self._sock)

    def drop(self) -> None:
        """Close the socket; what TCP has taken is still delivered."""
        self._sock.close()
