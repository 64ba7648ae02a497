"""A kernel with TLS, in Python: encrypts for real over real TCP sockets, refuses what a kernel refuses.

It keeps open records, holds back what TCP would not take, and fails the test when a control record is sent behind an open
one. `faults` maps a step ("TCP_ULP", "TLS_TX") to the errno it shall fail with; `rekey` is whether a second key is taken;
`appetite` returns how many of n offered bytes are accepted (0: would block).
"""

import ctypes
import errno
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence

from ktlsd import uapi
from ktlsd.errors import FileTruncated, HandoverError, PeerTruncated
from ktlsd.net.kernel import IOV_MAX, Buffer, LinuxKernel
from ktlsd.tls import records
from ktlsd.tls.protection import Protection


class _Socket:
    def __init__(self) -> None:
        self.ulp = False
        self.protection: Protection | None = None
        self.first_number = 0
        self.open_record = bytearray()
        self.pending = bytearray()  # sealed, not taken by TCP


class FakeKernel(LinuxKernel):
    def __init__(
        self,
        *,
        faults: dict[str, int] | None = None,
        rekey: bool = True,
        appetite: Callable[[int], int] | None = None,
    ) -> None:
        self.faults = dict(faults or {})
        self.rekey = rekey
        self.appetite = appetite or (lambda n: n)
        self.installed = 0
        self.rekeyed = 0
        self.control_records: list[tuple[int, bytes]] = []
        self._sockets: dict[socket.socket, _Socket] = {}
        self._lock = threading.RLock()
        self._tx_work: threading.Thread | None = None

    def _state(self, sock: socket.socket) -> _Socket:
        return self._sockets.setdefault(sock, _Socket())

    # --- setsockopt ---

    def attach_ulp(self, sock: socket.socket) -> None:
        if "TCP_ULP" in self.faults:
            raise HandoverError("TCP_ULP", self.faults["TCP_ULP"])
        self._state(sock).ulp = True

    def set_tx(self, sock: socket.socket, info: uapi.CryptoInfo) -> None:
        state = self._state(sock)
        if "TLS_TX" in self.faults:
            raise HandoverError("TLS_TX", self.faults["TLS_TX"])
        if not state.ulp:
            raise HandoverError("TLS_TX", errno.ENOPROTOOPT)
        uapi.CryptoInfo.unpack(info.pack())
        if state.protection is not None:
            if not self.rekey or info.version != uapi.TLS_1_3_VERSION:
                raise HandoverError("TLS_TX", errno.EBUSY)
            assert not state.open_record, "a new key while a record is open"
            self.rekeyed += 1
        else:
            self.installed += 1
        state.protection = Protection(info)

    def next_tx_record(self, sock: socket.socket, cipher_type: int) -> int | None:
        protection = self._state(sock).protection
        assert protection is not None
        return protection.number

    # --- sending ---

    def send(self, sock: socket.socket, buffers: Sequence[Buffer], *, more: bool) -> int | None:
        state = self._state(sock)
        if state.protection is None:
            return super().send(sock, buffers, more=more)
        if not self._push(sock):
            return None
        assert len(buffers) <= IOV_MAX, "EMSGSIZE"
        data = _copied(buffers)
        accepted = self.appetite(len(data))
        if accepted == 0:
            return None
        self._take(state, data[:accepted], end=not more and accepted == len(data))
        self._push(sock)
        return accepted

    def sendfile(self, sock: socket.socket, fd: int, offset: int, count: int) -> int | None:
        state = self._state(sock)
        assert state.protection is not None, "sendfile before the keys were installed would go out in the clear"
        if not self._push(sock):
            return None
        wanted = min(self.appetite(count), 1 << 18)
        if wanted == 0:
            return None
        try:
            data = os.pread(fd, wanted, offset)
        except OSError as exc:
            raise FileTruncated(str(exc)) from exc
        self._take(state, data, end=len(data) == count)
        self._push(sock)
        return len(data)

    def send_pages(self, sock: socket.socket, vectors, *, more: bool) -> tuple[int, int | None]:
        """Reads the memory at once, as a kernel with no hardware at hand does."""
        pages = [(ctypes.c_char * vectors[at + 1]).from_address(vectors[at]) for at in range(0, len(vectors), 2)]
        try:
            data = _copied(pages)
        except OSError as exc:
            raise FileTruncated(str(exc)) from exc
        return len(data), self.send(sock, [data], more=more)

    def send_control(self, sock: socket.socket, content_type: int, payload: bytes) -> bool | None:
        state = self._state(sock)
        assert state.protection is not None
        assert not state.open_record, "a control record behind an open record"
        if not self._push(sock) or self.appetite(1) == 0:
            return None
        self.control_records.append((content_type, payload))
        with self._lock:
            state.pending += state.protection.seal(content_type, payload)
        self._push(sock)
        return True

    def _take(self, state: _Socket, data: bytes, *, end: bool) -> None:
        assert state.protection is not None
        state.open_record += data
        while len(state.open_record) >= records.MAX_PLAINTEXT or (end and state.open_record):
            piece = bytes(state.open_record[: records.MAX_PLAINTEXT])
            del state.open_record[: records.MAX_PLAINTEXT]
            with self._lock:
                state.pending += state.protection.seal(records.APPLICATION_DATA, piece)

    def _push(self, sock: socket.socket) -> bool:
        """Give TCP what it would not take before; what is still left then is tx_work's."""
        state = self._state(sock)
        with self._lock:
            while state.pending:
                sent = super().send(sock, [bytes(state.pending)], more=False)
                if sent is None:
                    self._start_tx_work()
                    return False
                del state.pending[:sent]
        return True

    def _start_tx_work(self) -> None:
        if self._tx_work is None or not self._tx_work.is_alive():
            self._tx_work = threading.Thread(target=self._work, daemon=True)
            self._tx_work.start()

    def _work(self) -> None:
        """The kernel's tx_work: pushes by itself, whether or not anybody calls."""
        while True:
            time.sleep(0.002)
            with self._lock:
                waiting = [sock for sock, state in self._sockets.items() if state.pending and sock.fileno() >= 0]
                if not waiting:
                    self._tx_work = None
                    return
                for sock in waiting:
                    try:
                        self._push(sock)
                    except PeerTruncated:
                        self._state(sock).pending.clear()

    def shutdown(self, sock: socket.socket) -> None:
        assert not self._state(sock).pending, "FIN while the kernel's TLS still holds records: they are lost"
        super().shutdown(sock)


def _copied(buffers) -> bytes:
    """Copy as a kernel copies: what is not there (a mapped file that was truncated) is EFAULT and not SIGBUS."""
    with open(os.memfd_create("copied"), "r+b", buffering=0) as memory:
        for at in range(0, len(buffers), IOV_MAX):
            wanted = sum(len(memoryview(buffer).cast("B")) for buffer in buffers[at : at + IOV_MAX])
            if os.writev(memory.fileno(), buffers[at : at + IOV_MAX]) != wanted:
                raise OSError(errno.EFAULT, "short copy")
        memory.seek(0)
        return memory.read()


def nibbling(seed: int, *, blocks: bool = True) -> Callable[[int], int]:
    """Return an appetite that accepts anything between nothing and everything.

    Without `blocks` never nothing: no edge follows such a would-block, and who waits for one would wait for ever.
    """
    rng = random.Random(seed)

    def appetite(count: int) -> int:
        kind = rng.random()
        if blocks and kind < 0.15:
            return 0
        return count if kind < 0.5 else rng.randint(1, count)

    return appetite
