"""One encrypted connection: starts in userspace, may hand its sending side to the kernel, same contract throughout.

The only place that knows which of the two it is. The contract, in either mode:

- A call returns at once: `None` means would block, nothing was accepted.
- What `try_send` accepted is gone and never sent again; what it did not accept is still the caller's.
- `try_receive` returns b"" once the peer has closed its direction; ours stays open (half-close).
- `try_close` loses nothing that was accepted and ends in close_notify; `abort` makes the peer see that something is missing.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from ktlsd import uapi
from ktlsd.errors import HandoverError, PeerAlert, PeerError, PeerTruncated, PlainHttp, UnexpectedMessage
from ktlsd.net import handover
from ktlsd.net.handover import KernelFacts
from ktlsd.net.kernel import Kernel
from ktlsd.net.keylog_pipe import KeyLogPipe
from ktlsd.net.plain import RECEIVES, Closing, Mode, PlainChannel
from ktlsd.net.tx_kernel import Framing, KernelTx
from ktlsd.net.tx_userspace import Scratch, UserspaceTx
from ktlsd.slices import Outgoing
from ktlsd.tls import records
from ktlsd.tls.session import Session


@dataclass(frozen=True, slots=True)
class HandoverPolicy:
    """When a connection's keys go to the kernel.

    `handover_bytes`: a response body at least this long hands over, 0 at once. `rekey_bytes`: payload after which a key is
    renewed, None for the cipher's own limit (RFC 8446 §5.5). `off` is the reason no connection may, "" if they may.
    `framing`: how frames of HTTP/2 go into the kernel.
    """

    facts: KernelFacts = field(default_factory=KernelFacts)
    handover_bytes: int = 65_536
    rekey_bytes: int | None = None
    off: str = ""
    framing: Framing = Framing.SPLICED


class Channel(PlainChannel):
    """One accepted TCP connection and its TLS session. The caller owns time, order and HTTP."""

    __slots__ = (
        "_behind_finished",
        "_keylog",
        "_payload_left",
        "_policy",
        "_scratch",
        "session",
    )

    def __init__(
        self,
        sock: socket.socket,
        session: Session,
        kernel: Kernel,
        policy: HandoverPolicy,
        *,
        keylog: KeyLogPipe | None,
        scratch: Scratch,
    ) -> None:
        super().__init__(sock, kernel)
        self._policy = policy
        self._keylog = keylog
        self._scratch = scratch
        self._tx = UserspaceTx(sock, session, kernel, scratch)
        self._payload_left = 0  # bytes the present key may still protect
        self.session = session
        self.facts = session
        self.mode = Mode.HANDSHAKE
        self.why_userspace = policy.off
        self._behind_finished = True  # bytes that came with the client's Finished may wait inside the session

    # --- handshake -------------------------------------------------------------------------------------------------

    def try_handshake(self) -> bool | None:
        """Go on with the handshake: True once done. Raises HandshakeFailed, PlainHttp, PeerAlert, PeerTruncated."""
        tx = self._tx
        assert isinstance(tx, UserspaceTx)
        while not self.session.established:
            if not tx.flush():
                return None
            ciphertext = self._receive()
            if ciphertext is None:
                return None
            if not ciphertext:
                raise PeerTruncated("the client left during the handshake")
            try:
                tx.queue(self.session.handshake(ciphertext))
            except PeerError as exc:
                if isinstance(exc, PlainHttp):
                    exc.request = ciphertext
                self.say_goodbye(exc)
                raise
            finally:
                self._learn()
        self._established()
        return True  # its last records go with what is sent next, or by `try_flush`: soon, for clients with Nagle's delay

    def _established(self) -> None:
        self.mode = Mode.USERSPACE
        if not self.why_userspace:
            self.why_userspace = self._reason_against()
        if self.why_userspace:
            self.session.keep_keys()
        self._payload_left = self._key_limit()

    def _learn(self) -> None:
        """Give the session what the key log wrote while it was at work."""
        if self._keylog is not None:
            self.session.learn(self._keylog.drain())

    def _reason_against(self) -> str:
        """Why this session can't ever go to the kernel, "" if it can."""
        session = self.session
        if not session.version or session.suite is None:
            return f"{session.version_name} {session.cipher_name} is not a kernel cipher"
        refusal = self._policy.facts.refusal(session.version, session.suite.cipher_type)
        if refusal:
            return refusal
        if session.limits_fragments:
            return "client sent max_fragment_length"
        if not session.exportable:
            return "no key log line for this session"
        return ""

    # --- receiving -------------------------------------------------------------------------------------------------

    def try_receive(self) -> bytes | None:
        """Return decrypted bytes; b"" once the peer has ended its direction by close_notify. None: would block.

        Raises PeerTruncated (TCP ended without close_notify), PeerAlert, RecordError, UnexpectedMessage; the last two
        have been told to the peer as an alert, if it could be.
        """
        session = self.session
        if self._behind_finished:  # it waits inside since the handshake, and is older than TCP's end
            self._behind_finished = False
            if plain := self._decrypt(b""):
                return plain
        for _ in range(RECEIVES):
            if session.peer_closed:
                return b""
            ciphertext = self._receive()
            if ciphertext is None:
                return None
            if not ciphertext:
                raise PeerTruncated("TCP ended without close_notify")
            plain = self._decrypt(ciphertext)
            if plain:
                return plain
        return None  # `has_input` tells that this was not the socket's end

    def _decrypt(self, ciphertext: bytes) -> bytes:
        session = self.session
        before = session.key_updates
        try:
            plain = session.decrypt(ciphertext)
        except PeerError as exc:
            self.say_goodbye(exc)
            raise
        finally:
            if session.may_have_logged:
                self._learn()  # whatever happened: what stays in the pipe would fill it, and OpenSSL waits for room
        if session.version == uapi.TLS_1_3_VERSION:
            if session.key_updates != before:
                self._answer_key_update()
        elif refusal := session.take_output():
            if isinstance(self._tx, UserspaceTx):
                self._tx.queue(refusal)
            error = UnexpectedMessage("the client wants to renegotiate")
            self.say_goodbye(error)
            raise error
        if session.peer_closed:
            self.has_input = True  # the end came along: there is no other edge for it
        return plain

    def _answer_key_update(self) -> None:
        """Act on the peer's KeyUpdate; if it asked for ours, that goes before anything else we send (RFC 8446 §4.6.3)."""
        try:
            answer = self.session.answer_key_update()
        finally:
            self._learn()
        if not answer:
            return
        if isinstance(self._tx, UserspaceTx):
            self._tx.queue(answer)
            self.session.advance_tx(records.number_of(answer))
            self._payload_left = self._key_limit()
        else:
            self._renew_keys()  # OpenSSL's record has a stale number and is thrown away; the kernel sends ours

    # --- sending ---------------------------------------------------------------------------------------------------

    def try_send(self, segments: Sequence[Outgoing], *, body_bytes: int = 0) -> int | None:
        """Send from the front of `segments`; return how many bytes were accepted, None if none could be.

        `body_bytes` is the length of the response body they belong to: it decides about the hand-over. File slices are
        only read from; the caller advances them by the count. Raises PeerTruncated, FileTruncated.
        """
        if not self.why_userspace and body_bytes >= self._policy.handover_bytes and isinstance(self._tx, UserspaceTx):
            if not self._tx.flush():
                return None
            self._hand_over()
        sent = self._tx.send(segments)
        if sent:
            self._payload_left -= sent
            if self._payload_left <= 0:
                self._renew_keys()
        return sent

    def try_send_whole(self, data: bytes, *, body_bytes: int, last: bool = False, hold: bool = False) -> bool:
        """Send a small response in one piece if it goes by userspace and nothing waits; False: nothing was accepted.

        `last`: `try_close` comes next; its close_notify goes along. `hold`: the next `try_flush` sends it.
        """
        tx = self._tx
        if not isinstance(tx, UserspaceTx) or (not self.why_userspace and body_bytes >= self._policy.handover_bytes):
            return False
        if not tx.send_whole(data, last=last, hold=hold):
            return False
        self._payload_left -= len(data)
        if self._payload_left <= 0:
            self._renew_keys()
        return True

    def _hand_over(self) -> None:
        """Give the kernel the keys; if it refuses, stay in userspace for good and remember why."""
        taken = self._kernel.taken_by_tcp(self._sock)
        info = self.session.export_tx()
        try:
            handover.install(self._kernel, self._sock, info)
        except HandoverError as exc:
            self.why_userspace = exc.reason
            self.session.keep_keys()
            return
        scratch, framing = self._scratch, self._policy.framing
        self._tx = KernelTx(self._sock, self.session, self._kernel, scratch, framing, info=info, taken_before=taken)
        self.mode = Mode.KERNEL

    def _renew_keys(self) -> None:
        """The present key may not be used much longer: go to the next one, or to an end if there can be no other."""
        self._payload_left = self._key_limit()
        tls13 = self.session.version == uapi.TLS_1_3_VERSION
        if isinstance(self._tx, KernelTx) and tls13 and self._policy.facts.rekey:
            self._tx.renew_keys()
        else:
            self.expiring = True  # a kernel before 6.14, TLS 1.2, or Python's ssl, which can't start a KeyUpdate

    def _key_limit(self) -> int:
        cipher_type = self.session.suite.cipher_type if self.session.suite else 0
        return self._policy.rekey_bytes or records.application_limit(cipher_type)

    # --- ending ----------------------------------------------------------------------------------------------------

    def say_goodbye(self, error: PeerError) -> None:
        """Tell the peer what is wrong, if that can be done in order; then only `try_close` is left to do."""
        if self._closing is Closing.NO and not isinstance(error, PeerAlert):
            try:
                if self._tx.say_goodbye(error):
                    self._closing = Closing.NOTIFIED
            except PeerError:
                pass  # gone already: nobody to tell

    def send_plain(self, data: bytes) -> None:
        """Send bytes in the clear to a client that never spoke TLS; what doesn't go at once is dropped."""
        assert self.mode is Mode.HANDSHAKE
        try:
            if self._kernel.send(self._sock, [data], more=False):
                self._closing = Closing.NOTIFIED
        except PeerError:
            pass  # gone already: nobody to tell

    def drop(self) -> None:
        """Close the socket; what TCP has taken is still delivered."""
        # OpenSSL takes a session that ends without its own close_notify for a broken one and won't resume it: curl, which
        # uses session IDs and no tickets in TLS 1.2, would never resume after kernel mode. The record goes nowhere.
        if self._closing is Closing.NO or isinstance(self._tx, KernelTx):
            self.session.close_notify()
        self._sock.close()
