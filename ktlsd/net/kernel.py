"""The socket calls a channel needs, each one system call, none of which waits.

Thin on purpose: a value, or `None` for would-block; errnos are translated here, once. `tests/fakes/kernel.py` stands in
for it where the machine's kernel has no TLS, and refuses what a kernel refuses.
"""

import errno
import fcntl
import os
import socket
import struct
import sys
import termios
from array import array
from collections.abc import Sequence
from typing import Final, Protocol

from ktlsd import uapi
from ktlsd.errors import FileTruncated, HandoverError, PeerTruncated
from ktlsd.net.pages import IOV_MAX, LOST, PagePipe, open_pipe

Buffer = bytes | bytearray | memoryview
__all__ = ["IOV_MAX", "Buffer", "Kernel", "LinuxKernel"]

# What a send may say when this connection is lost: the peer or the way to it is gone, the kernel has no memory, or its TLS
# could not encrypt (EBADMSG, EIO). Everything else from a send is a bug of ours.
_LOST: Final = frozenset(
    (
        errno.EPIPE,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.EHOSTDOWN,
        errno.ECONNREFUSED,  # these four by ICMP, when TCP gives up
        errno.EACCES,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.ENOMEM,
        errno.ENOBUFS,
        errno.EBADMSG,
        errno.EIO,
    )
)
_GONE_BEFORE_THE_FILE: Final = _LOST - {errno.EIO}  # which sendfile says of a disk
_RECORD_TYPE: Final = uapi.SOL_TLS, uapi.TLS_SET_RECORD_TYPE
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
_BYTES_ACKED_AT: Final = 120  # offsetof(struct tcp_info, tcpi_bytes_acked), u64, since 4.1
_TCP_CLOSE: Final = 7  # tcpi_state, include/net/tcp_states.h
_TCP_INFO_SIZE: Final = 128
_UNPACED: Final = (1 << 64) - 1


class Kernel(Protocol):
    """What a channel asks of the kernel. `None` means would block: nothing was accepted."""

    def preload(self) -> None:
        """Open what will be needed later."""

    def attach_ulp(self, sock: socket.socket) -> None:
        """Make the socket a TLS socket (it stays plain until `set_tx`). Raises HandoverError("TCP_ULP")."""

    def set_tx(self, sock: socket.socket, info: uapi.CryptoInfo) -> None:
        """Give the kernel the keys; from here on it encrypts all that is sent. Raises HandoverError("TLS_TX")."""

    def next_tx_record(self, sock: socket.socket, cipher_type: int) -> int | None:
        """Return the number of the next record the kernel will send under the current key; None if it won't tell."""

    def receive(self, sock: socket.socket, size: int) -> bytes | None:
        """Return at most `size` bytes, b"" at TCP's end. Raises PeerTruncated."""

    def peek(self, sock: socket.socket, size: int) -> bytes | None:
        """Return what `receive` would, and leave it there."""

    def send(self, sock: socket.socket, buffers: Sequence[Buffer], *, more: bool) -> int | None:
        """Return how many bytes of `buffers` were accepted; with `more` the TLS record stays open. Raises PeerTruncated."""

    def send_control(self, sock: socket.socket, content_type: int, payload: bytes) -> bool | None:
        """Send one whole control record; True once accepted. No record may be open. Raises PeerTruncated."""

    def push(self, sock: socket.socket) -> None:
        """Have TCP send what it holds back in the hope of more."""

    def sendfile(self, sock: socket.socket, fd: int, offset: int, count: int) -> int | None:
        """Return how many bytes of the file were accepted, 0 at its end. Raises PeerTruncated, FileTruncated."""

    def send_pages(self, sock: socket.socket, vectors: "array[int]", *, more: bool) -> tuple[int, int | None]:
        """Send memory, given as address and length one after the other, without a copy: it must not change until it is sent.

        Return how many bytes were offered, as many as go at a time, and how many accepted. Raises PeerTruncated; FileTruncated
        if a mapped file has become shorter or this can't be done here: nothing was sent then.
        """

    def taken_by_tcp(self, sock: socket.socket) -> int:
        """Return how many bytes of the wire TCP has taken since the connection began, acknowledged or not.

        Raises PeerTruncated for a connection that was reset: what it has not taken it never will.
        """

    def unacknowledged(self, sock: socket.socket) -> int:
        """Return how many bytes TCP has taken that the peer has not acknowledged."""

    def shutdown(self, sock: socket.socket) -> None:
        """End our direction (FIN)."""

    def pace(self, sock: socket.socket, rate: int | None) -> None:
        """Have TCP send at most so many bytes a second, as evenly as it can; None for no limit."""

    def reset(self, sock: socket.socket) -> None:
        """Close at once with RST: the client shall see that something is missing."""


class LinuxKernel:
    """The real one."""

    def __init__(self) -> None:
        self._pipe: PagePipe | None = None
        self._has_pipe: bool | None = None  # None: not tried yet

    def preload(self) -> None:
        """Open what `send_pages` needs: before a sandbox forbids it, and in the process that uses it."""
        self._pipe = open_pipe()
        self._has_pipe = self._pipe is not None

    def attach_ulp(self, sock: socket.socket) -> None:
        try:
            sock.setsockopt(uapi.SOL_TCP, uapi.TCP_ULP, b"tls")
        except OSError as exc:
            if exc.errno != errno.EEXIST:  # somebody attached it before: as good
                raise HandoverError("TCP_ULP", exc.errno or 0) from exc

    def set_tx(self, sock: socket.socket, info: uapi.CryptoInfo) -> None:
        try:
            sock.setsockopt(uapi.SOL_TLS, uapi.TLS_TX, info.pack())
        except OSError as exc:
            raise HandoverError("TLS_TX", exc.errno or 0) from None  # the chained traceback's frames hold the keys

    def next_tx_record(self, sock: socket.socket, cipher_type: int) -> int | None:
        try:
            info = sock.getsockopt(uapi.SOL_TLS, uapi.TLS_TX, uapi.CIPHERS[cipher_type].size)
        except OSError:
            return None  # before 5.16 only for AES-GCM
        return int.from_bytes(info[-8:], "big")  # rec_seq is the last field

    def receive(self, sock: socket.socket, size: int) -> bytes | None:
        try:
            return sock.recv(size)
        except BlockingIOError:
            return None
        except OSError as exc:
            raise _peer_error(exc) from exc

    def peek(self, sock: socket.socket, size: int) -> bytes | None:
        try:
            return sock.recv(size, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError as exc:
            raise _peer_error(exc) from exc

    def send(self, sock: socket.socket, buffers: Sequence[Buffer], *, more: bool) -> int | None:
        try:
            if len(buffers) == 1:
                return sock.send(buffers[0], socket.MSG_MORE if more else 0)
            return sock.sendmsg(buffers, (), socket.MSG_MORE if more else 0)
        except BlockingIOError:
            return None
        except OSError as exc:
            raise _peer_error(exc) from exc

    def send_control(self, sock: socket.socket, content_type: int, payload: bytes) -> bool | None:
        try:
            sock.sendmsg([payload], [(*_RECORD_TYPE, bytes([content_type]))])
        except BlockingIOError:
            return None
        except OSError as exc:
            raise _peer_error(exc) from exc
        return True

    def push(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # tcp(7): forces an explicit flush of pending output

    def sendfile(self, sock: socket.socket, fd: int, offset: int, count: int) -> int | None:
        try:
            return os.sendfile(sock.fileno(), fd, offset, count)
        except BlockingIOError:
            return None
        except OSError as exc:
            if exc.errno in _GONE_BEFORE_THE_FILE:
                raise _peer_error(exc) from exc
            raise FileTruncated(f"sendfile at {offset}: {exc.strerror}") from exc

    def send_pages(self, sock: socket.socket, vectors: "array[int]", *, more: bool) -> tuple[int, int | None]:
        if self._has_pipe is None:
            self.preload()
        if self._pipe is None:
            raise FileTruncated("this process may not splice pages")
        try:
            return self._pipe.send(sock.fileno(), vectors, more=more)
        except OSError as exc:
            if exc.errno in LOST:
                raise FileTruncated(f"vmsplice: {exc.strerror}") from exc
            raise _peer_error(exc) from exc

    def taken_by_tcp(self, sock: socket.socket) -> int:
        # An acknowledgement between the two questions would be missed in the sum: ask until none came in between.
        acked = _bytes_acked(sock)
        while True:
            taken, before = acked + self.unacknowledged(sock), acked
            acked = _bytes_acked(sock)
            if acked == before:
                return taken

    def unacknowledged(self, sock: socket.socket) -> int:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")  # SIOCOUTQ is the same number
        return int.from_bytes(answer, sys.byteorder)

    def shutdown(self, sock: socket.socket) -> None:
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            raise _peer_error(exc) from exc

    def pace(self, sock: socket.socket, rate: int | None) -> None:
        value = _UNPACED if rate is None else max(rate, 1)
        try:
            sock.setsockopt(socket.SOL_SOCKET, uapi.SO_MAX_PACING_RATE, struct.pack("=Q", value))
        except OSError:
            pass  # a connection that has just been reset

    def reset(self, sock: socket.socket) -> None:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        finally:
            sock.close()


def _bytes_acked(sock: socket.socket) -> int:
    info = sock.getsockopt(uapi.SOL_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    if info[0] == _TCP_CLOSE:
        raise PeerTruncated("connection lost: reset while it was being closed")
    return int(struct.unpack_from("=Q", info, _BYTES_ACKED_AT)[0])


def _peer_error(exc: OSError) -> Exception:
    """Translate a socket's errno: the peer's doing becomes PeerTruncated, anything else stays what it is, a bug of ours."""
    if exc.errno in _LOST:
        return PeerTruncated(f"connection lost: {exc.strerror}")
    return exc
