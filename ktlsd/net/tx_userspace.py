"""Sending in userspace mode: segments through OpenSSL into the socket, in large steps.

One step gathers up to 256 KiB of plaintext, encrypts it record by record and gives all records to one sendmsg. Measured: as
fast as SSLSocket.sendall over a mapping, and an idle connection keeps nothing of it.
"""

import socket
from collections.abc import Sequence
from typing import Final

from ktlsd.errors import FileCold, FileTruncated, PeerError, PeerTruncated
from ktlsd.net.gather import gather
from ktlsd.net.kernel import IOV_MAX, Kernel
from ktlsd.net.mappings import Mappings
from ktlsd.slices import Outgoing
from ktlsd.tls import records
from ktlsd.tls.session import STEP, Bios, Session

# Plaintext encrypted ahead of the socket: much for the calls it saves, little for a peer that reads slowly.
_BURST_MIN: Final = 4 * records.MAX_PLAINTEXT
_BURST_MAX: Final = 16 * records.MAX_PLAINTEXT
_TAIL: Final = records.MAX_PLAINTEXT  # a rest that is no longer goes along with the last step
WHOLE_MAX: Final = _BURST_MAX  # bytes that go whole or not at all
_HELD: Final = 1  # pieces of ciphertext that may wait for the next `flush`; more goes only when they have gone
_STEPS: Final = 4  # in one call, while the socket takes them
SCRATCH: Final = 524_288  # bytes


class Scratch:
    """What a worker's channels share: buffers for what is on its way, empty between calls, and mappings of hot files."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(SCRATCH))
        self.mappings = Mappings()
        self.bios = Bios()


class UserspaceTx:
    """The sending half of a channel until the kernel takes over. Holds at most one step's ciphertext."""

    __slots__ = ("_burst", "_kernel", "_notified", "_scratch", "_session", "_sock", "_unsent", "_untried")

    def __init__(self, sock: socket.socket, session: Session, kernel: Kernel, scratch: Scratch) -> None:
        self._sock = sock
        self._session = session
        self._kernel = kernel
        self._scratch = scratch
        self._unsent: list[bytes | memoryview] = []  # ciphertext that OpenSSL has written and TCP has not taken
        self._untried = False  # nor been offered: records of OpenSSL's own, or a response, which go along with what follows
        self._burst = _BURST_MIN
        self._notified = False

    def send(self, segments: Sequence[Outgoing]) -> int | None:
        """Encrypt and send from the front of `segments`; None if older ciphertext still waits. Raises FileTruncated."""
        if self._unsent and not self._untried and not self.flush():
            return None
        total, accepted = sum(map(len, segments)), 0
        for _ in range(_STEPS):
            left = total - accepted
            size = left if left <= self._burst + _TAIL else self._burst
            try:
                plain = gather(segments, self._scratch.view[:size], accepted)
            except (FileCold, FileTruncated):
                if not accepted:
                    raise
                break  # the caller has to know first what is gone
            if not plain:
                break
            before, accepted = accepted, accepted + len(plain)
            self._unsent += self._session.encrypt(plain)
            try:
                flushed = self.flush()
            except PeerTruncated:
                if not before:
                    raise
                return before  # that much went; the next call finds the connection lost
            if not flushed:
                self._burst = _BURST_MIN
                break
            self._burst = min(self._burst * 2, _BURST_MAX)
        return accepted

    def send_whole(self, data: bytes, *, last: bool = False, hold: bool = False) -> bool:
        """Encrypt and send all of it, or nothing if the socket has not taken what was before, or it is too much to hold.

        `last`: with close_notify behind it. `hold`: to be sent by the next `flush`, or with what follows.
        """
        unsent = self._unsent
        if last or unsent or len(data) > STEP:
            if len(data) > WHOLE_MAX or (unsent and (not self._untried or len(unsent) > _HELD) and not self.flush()):
                return False
            unsent += self._session.encrypt(memoryview(data))
            if last:
                self.notify_close()
            elif hold:
                self._untried = True
            else:
                self.flush()
            return True
        ciphertext = self._session.encrypt_step(data)
        if hold:
            unsent.append(ciphertext)
            self._untried = True
            return True
        sent = self._kernel.send(self._sock, (ciphertext,), more=False)
        if sent != len(ciphertext):
            unsent.append(memoryview(ciphertext)[sent or 0 :])
        return True

    def queue(self, ciphertext: bytes) -> None:
        """Put a record that the session wrote by itself behind all others."""
        if ciphertext:
            self._untried = self._untried or not self._unsent
            self._unsent.append(ciphertext)

    def flush(self) -> bool:
        """Send ciphertext that is left over; whether none is."""
        unsent = self._unsent
        self._untried = False
        while unsent:
            sent = self._kernel.send(self._sock, unsent if len(unsent) < IOV_MAX else unsent[:IOV_MAX], more=False)
            if sent is None:
                return False
            while unsent and sent >= len(unsent[0]):
                sent -= len(unsent.pop(0))
            if sent:
                unsent[0] = memoryview(unsent[0])[sent:]
        return True

    def notify_close(self) -> bool:
        """Send close_notify behind everything else; True once TCP has it."""
        if not self._notified:
            self._notified = True
            self.queue(self._session.close_notify())
        return self.flush()

    def all_taken(self) -> bool:
        """Whether TCP has everything: here nothing is held back but what `flush` sends."""
        return self.flush()

    def say_goodbye(self, error: PeerError) -> bool:
        """Send the alert OpenSSL wrote about `error` behind everything else; whether it wrote one."""
        self.queue(error.farewell)
        self.flush()
        return bool(error.farewell)
