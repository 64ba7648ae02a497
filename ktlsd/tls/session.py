"""One TLS session of a server, sans-IO: ciphertext in, plaintext out, and back; and its keys, ready for the kernel.

Every byte that leaves passes `OutgoingRecords`, so the session alone knows the number of the next record (design law:
count, never assume). Once its keys are in the kernel nothing that OpenSSL still writes may be sent: its numbers are stale.
"""

import ssl
from typing import Final

from ktlsd import uapi
from ktlsd.errors import HandshakeFailed, PeerAlert, PeerError, PlainHttp, RecordError, UnexpectedMessage
from ktlsd.tls import keylog, schedule
from ktlsd.tls.hello import CLIENT_HELLO, MAX_FRAGMENT_LENGTH, SERVER_HELLO, Hello
from ktlsd.tls.records import MAX_PLAINTEXT, OutgoingRecords, application_bytes, rec_seq
from ktlsd.tls.suites import Suite, suite_by_name

STEP: Final = 4 * MAX_PLAINTEXT  # bytes that OpenSSL encrypts in one call
# A record has 16 KiB; what is much more and holds no plaintext are KeyUpdates, which nobody counts where there is no key log.
_IDLE_INPUT_MAX: Final = 65_536  # bytes
_HELD_OUT_MAX: Final = 65_536  # bytes of answers to them
_VERSIONS: Final = {"TLSv1.2": uapi.TLS_1_2_VERSION, "TLSv1.3": uapi.TLS_1_3_VERSION}


class Bios:
    """Two memory BIOs, through which the sessions of one thread go one after the other.

    A BIO keeps the largest size it ever had, some 88 KiB after a download: one pair for all sessions instead of one for each.
    Between calls both are empty: what a session has not read, or has not been asked for, it keeps itself.
    """

    __slots__ = ("incoming", "outgoing")

    def __init__(self) -> None:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()


class Session:
    """A server's end of one TLS connection over two memory BIOs.

    Handshake: `handshake` until `established`. Then `decrypt` and `encrypt`. `learn` takes what the key log said while
    this session worked; without it everything works but `export_tx`.
    """

    __slots__ = (
        "_aligned",
        "_client_hello",
        "_counts",
        "_held_in",
        "_held_out",
        "_idle_input",
        "_incoming",
        "_outgoing",
        "_records",
        "_secret",
        "_server_hello",
        "_ssl",
        "established",
        "key_updates",
        "may_have_logged",
        "peer_closed",
        "suite",
        "version",
    )

    def __init__(self, context: ssl.SSLContext, bios: Bios | None = None, *, exports: bool = True) -> None:
        """`bios` may be shared with other sessions of the same thread. Not `exports`: its keys will never be wanted."""
        bios = bios or Bios()
        self._incoming = bios.incoming
        self._outgoing = bios.outgoing
        self._aligned = exports  # what came ends where a record does; who asks no key log need not know
        self._idle_input = 0  # bytes that came since there was plaintext in them
        self._held_in = b""  # ciphertext that OpenSSL has not read: what came behind the client's Finished
        self._held_out = b""  # records that OpenSSL wrote by itself while it read
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._client_hello = Hello(CLIENT_HELLO)
        self._server_hello = Hello(SERVER_HELLO)
        self._records = OutgoingRecords()
        self._counts = exports  # records; and remembers what its keys are made of
        self._secret: bytes | None = None  # TLS 1.3: the server's traffic secret; TLS 1.2: the master secret
        self.established = False
        self.peer_closed = False
        self.key_updates = 0  # how many the peer has sent
        self.may_have_logged = True  # whether there may have been a KeyUpdate in what was decrypted last
        self.version = 0  # uapi's number once established, 0 for one the kernel doesn't know
        self.suite: Suite | None = None

    # --- what was agreed -------------------------------------------------------------------------------------------

    @property
    def version_name(self) -> str:
        """The version's name as OpenSSL writes it, "TLSv1.3", and "" before the handshake."""
        return self._ssl.version() or "" if self.established else ""

    @property
    def cipher_name(self) -> str:
        """OpenSSL's name of the suite, "" before the handshake."""
        cipher = self._ssl.cipher() if self.established else None
        return cipher[0] if cipher else ""

    @property
    def resumed(self) -> bool:
        """Whether the handshake was an abbreviated one."""
        return bool(self._ssl.session_reused)

    @property
    def alpn(self) -> str | None:
        """The protocol both agreed on, None if the client didn't ask or had nothing in common."""
        return self._ssl.selected_alpn_protocol()

    @property
    def server_name(self) -> str | None:
        """The name the client asked for (SNI); None if it asked for none."""
        return self._ssl.server_hostname

    @property
    def limits_fragments(self) -> bool:
        """Whether the client sent max_fragment_length: the kernel fills records to 16,384 bytes and can't honour it."""
        return MAX_FRAGMENT_LENGTH in self._client_hello.extensions

    # --- handshake -------------------------------------------------------------------------------------------------

    def handshake(self, ciphertext: bytes) -> bytes:
        """Feed what came, return what must go out (b"" if nothing); `established` tells when it is done.

        Bytes behind the client's Finished stay inside and come out of `decrypt(b"")`. Raises HandshakeFailed with
        OpenSSL's alert as `farewell`, PeerAlert if the peer gave up, PlainHttp if this is no TLS at all.
        """
        if self._counts:
            self._client_hello.feed(ciphertext)
        self._aligned = self._aligned and application_bytes(ciphertext) >= 0
        self._put(ciphertext)
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as exc:
            raise _handshake_error(exc, self._take()) from exc
        else:
            self._finish_handshake()
        finally:
            self._keep()
        out = self._take()
        if self._counts:
            self._server_hello.feed(out)
            self._records.feed(out)
        return out

    def _finish_handshake(self) -> None:
        self.established = True
        self.version = _VERSIONS.get(self._ssl.version() or "", 0)
        self.suite = suite_by_name(self.cipher_name)
        if self.version == uapi.TLS_1_3_VERSION:
            # What leaves in the step that took the client's Finished (tickets) is under the application key already.
            self._records.start()

    def learn(self, lines: bytes) -> None:
        """Take the lines that the key log wrote while this session worked; other sessions' lines are passed over."""
        for label, client_random, secret in keylog.parse(lines):
            if self._client_hello.random is not None and client_random != self._client_hello.random:
                continue
            if label in (keylog.MASTER, keylog.SERVER_TRAFFIC):
                self._secret = secret if self._counts else None
            elif label == keylog.CLIENT_UPDATED:
                self.key_updates += 1

    # --- the BIOs, which others use in between ----------------------------------------------------------------------

    def _put(self, ciphertext: bytes) -> None:
        """Give OpenSSL what it has not read yet. What a session that died left behind belongs to nobody."""
        if self._incoming.pending:
            self._incoming.read()
        if self._outgoing.pending:
            self._outgoing.read()
        if self._held_in:
            ciphertext, self._held_in = self._held_in + ciphertext, b""
        if ciphertext:
            self._incoming.write(ciphertext)

    def _keep(self) -> None:
        """Leave nothing in them."""
        if self._incoming.pending:
            self._held_in = self._incoming.read()
        if self._outgoing.pending:
            self._held_out += self._outgoing.read()

    def _take(self) -> bytes:
        """Return all records that OpenSSL has written, the oldest first."""
        out = self._outgoing.read()
        if self._held_out:
            out, self._held_out = self._held_out + out, b""
        return out

    # --- application data ------------------------------------------------------------------------------------------

    def decrypt(self, ciphertext: bytes) -> bytes:
        """Feed what came, return the plaintext of all whole records so far; sets `peer_closed` at close_notify.

        Raises RecordError, UnexpectedMessage or PeerAlert; OpenSSL's own alert is in `farewell` and only of use in
        userspace mode.
        """
        self.may_have_logged = True
        came = -1
        if self._aligned:
            came = application_bytes(ciphertext)
            self._aligned = came >= 0
        incoming, outgoing, plain, kept = self._incoming, self._outgoing, b"", False
        if self._held_in or incoming.pending or outgoing.pending:
            self._put(ciphertext)
        else:
            incoming.write(ciphertext)
        try:
            if incoming.pending:
                plain = self._ssl.read(MAX_PLAINTEXT)
                self.peer_closed = not plain
            while incoming.pending and not self.peer_closed:
                piece = self._ssl.read(MAX_PLAINTEXT)
                plain += piece
                self.peer_closed = not piece
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.peer_closed = True
        except ssl.SSLError as exc:
            raise _record_error(exc, self._take()) from exc
        finally:
            if incoming.pending or outgoing.pending:
                kept = True
                self._keep()
        if self._counts:
            self.may_have_logged = not plain or len(plain) != came  # every byte that came was application data, or not
        if plain:
            self._idle_input = 0
        if kept or not plain:
            self._limit(0 if plain else len(ciphertext))
        return plain

    def _limit(self, count: int) -> None:
        """What is kept for the peer has its bounds, and what comes and says nothing."""
        self._idle_input += count
        if self._idle_input > _IDLE_INPUT_MAX or len(self._held_out) > _HELD_OUT_MAX:
            raise UnexpectedMessage("KeyUpdates, and nothing else")

    def take_output(self) -> bytes:
        """Return records that OpenSSL wrote by itself while it read: in TLS 1.2 the alert that refuses a renegotiation."""
        out = self._take() if self._held_out else b""
        if out:
            self._records.feed(out)
        return out

    def encrypt(self, plaintext: bytes | memoryview) -> list[bytes]:
        """Return the records for `plaintext`, one buffer per 65,536 bytes: larger ones were no faster, one per record took 20 %
        more time per byte.
        """
        return [self.encrypt_step(plaintext[at : at + STEP]) for at in range(0, len(plaintext), STEP)]

    def encrypt_step(self, plaintext: bytes | memoryview) -> bytes:
        """Return the records for at most STEP bytes, which must not be none."""
        try:
            self._ssl.write(plaintext)
            out = self._take() if self._held_out else self._outgoing.read()
        except BaseException as exc:  # whatever it is: nothing may stay in what others use, too
            self._take()
            if not isinstance(exc, ssl.SSLError):
                raise
            raise RecordError(f"OpenSSL can't encrypt any more: {exc.reason}") from exc
        if self._counts:
            self._records.feed(out)
        return out

    def close_notify(self) -> bytes:
        """Return the record that ends our direction, b"" if the session is beyond that."""
        if not self.established:
            return b""
        try:
            self._ssl.unwrap()
        except ssl.SSLError:
            pass  # WantRead: the peer's own close_notify is not here yet; anything else: the session is dead
        out = self._take()
        self._records.feed(out)
        return out

    # --- keys ------------------------------------------------------------------------------------------------------

    def keep_keys(self) -> None:
        """Say that its keys will never be exported: from now on it doesn't know its secret, nor count records."""
        self._counts, self._secret = False, None
        self._aligned = False  # its context may go on logging, for others' sake: nothing is left out

    @property
    def exportable(self) -> bool:
        """Whether `export_tx` can work: established, a suite the kernel's headers know, and the secret was learnt."""
        hellos = self._client_hello.random is not None and self._server_hello.random is not None
        return hellos and bool(self.version) and self.suite is not None and self._secret is not None

    def export_tx(self) -> uapi.CryptoInfo:
        """Return the keys of our direction with the number of the next record.

        Everything this session has put out must be in TCP before the kernel gets them: later bytes would be encrypted twice.
        """
        assert self.suite is not None, "ask exportable first"
        assert self._secret is not None
        suite, number = self.suite, rec_seq(self._records.count)
        if self.version == uapi.TLS_1_3_VERSION:
            key, iv = schedule.tls13_keys(self._secret, suite)
        else:
            ours, theirs = self._server_hello.random, self._client_hello.random
            assert ours is not None, "an established session has seen both hellos"
            assert theirs is not None
            _, (key, iv) = schedule.tls12_keys(self._secret, theirs, ours, suite)
        if suite.cipher_type == uapi.TLS_CIPHER_CHACHA20_POLY1305:
            return uapi.CryptoInfo(self.version, suite.cipher_type, iv=iv, key=key, salt=b"", rec_seq=number)
        if self.version == uapi.TLS_1_2_VERSION:
            # OpenSSL starts the explicit nonce at random and adds one per record; the kernel goes on adding one.
            iv += ((int.from_bytes(self._records.explicit_nonce, "big") + 1) % (1 << 64)).to_bytes(8, "big")
        return uapi.CryptoInfo(self.version, suite.cipher_type, iv=iv[4:], key=key, salt=iv[:4], rec_seq=number)

    def answer_key_update(self) -> bytes:
        """Return our KeyUpdates if the peer's asked for any, else b"" (RFC 8446 §4.6.3); call it when `key_updates` rose.

        In userspace mode send them and `advance_tx` by their number: OpenSSL writes one record for each request but the last
        while it reads the next. In kernel mode throw them away, their numbers are stale: the kernel sends one.
        """
        try:
            self._ssl.write(b"")  # OpenSSL writes the KeyUpdate it owes, and nothing else
        except ssl.SSLError as exc:
            self._take()
            raise RecordError(f"OpenSSL can't answer a KeyUpdate: {exc.reason}") from exc
        return self._take()

    def advance_tx(self, generations: int = 1) -> None:
        """Go on by so many generations of our direction's secret, to record number 0 (RFC 8446 §7.2)."""
        if not self._counts:
            return
        assert self.suite is not None
        assert self._secret is not None
        for _ in range(generations):
            self._secret = schedule.next_generation(self._secret, self.suite)
        self._records.start()


def _handshake_error(exc: ssl.SSLError, farewell: bytes) -> PeerError:
    reason = exc.reason or type(exc).__name__
    if reason in ("HTTP_REQUEST", "HTTPS_PROXY_REQUEST"):
        return PlainHttp("plain HTTP on the TLS port")
    if "_ALERT_" in reason:
        return PeerAlert(f"the client ended the handshake: {_alert_name(reason)}")
    return HandshakeFailed(f"handshake failed: {_words(reason)}", farewell=farewell)


def _record_error(exc: ssl.SSLError, farewell: bytes) -> PeerError:
    reason = exc.reason or type(exc).__name__
    if "_ALERT_" in reason:
        return PeerAlert(f"the client sent an alert: {_alert_name(reason)}")
    kind = RecordError if "MAC" in reason or "RECORD" in reason or "LENGTH" in reason else UnexpectedMessage
    return kind(f"bad record: {_words(reason)}", farewell=farewell)


def _alert_name(reason: str) -> str:
    return _words(reason.partition("_ALERT_")[2])


def _words(reason: str) -> str:
    return reason.lower().replace("_", " ")
