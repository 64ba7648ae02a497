"""One connection to a server that is measured: from the handshake to the last byte, either looked at or thrown away.

Blocking sockets throughout. The handshake is done over memory BIOs, so that every byte of the wire is counted.
"""

import functools
import socket
import ssl
import struct
import time
from dataclasses import dataclass
from typing import Final

from hpack import Decoder

from ktlsd import uapi
from ktlsd.bench import answers
from ktlsd.bench.answers import Answer, Http1Answer, Http2Answer, Kind, NotMeasurable, Payload, RawAnswer, WrongAnswer
from ktlsd.bench.network import LOOPBACK, Network
from ktlsd.tls import records
from ktlsd.tls.suites import suite_by_name

STALL: Final = 20.0  # seconds without a byte, then it won't come any more
_GRACE: Final = 0.05  # seconds for bytes that may still come when all that must come has
_END: Final = 1.0  # seconds for a server to end its connection
_SLACK: Final = 128  # bytes; a date, a ticket or a header may be a little shorter the next time
_SINK: Final = 4 << 20  # bytes; never written to, so they take no memory
_RECEIVE: Final = 1 << 18
VERSIONS: Final = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}
OPENSSL_CIPHERS: Final = {
    "": "ECDHE+AES256+AESGCM:ECDHE+AES128+AESGCM:ECDHE+CHACHA20",
    "AES-128-GCM": "ECDHE+AES128+AESGCM",
    "AES-256-GCM": "ECDHE+AES256+AESGCM",
    "CHACHA20-POLY1305": "ECDHE+CHACHA20",
}
CIPHERS: Final = tuple(OPENSSL_CIPHERS)[1:]


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked for, where and how.

    `version` "" is in the clear. `cipher` "" leaves it to the server; TLS 1.3's can be looked at, not chosen. `streams`
    are HTTP/2's, at a time. `closes`: the server is to end the connection behind its answer, where HTTP can say so.
    """

    port: int
    payload: Payload
    kind: Kind
    version: str = "TLSv1.3"
    cipher: str = ""
    streams: int = 1
    closes: bool = True
    network: Network = LOOPBACK


@dataclass(frozen=True, slots=True)
class Wire:
    """What one verified transfer took: bytes of the wire behind the request, and in which bounds others may be."""

    bytes: int
    least: int
    most: int
    version: str  # as agreed on, "" in the clear
    cipher: str


class Connection:
    """One connection, ready to ask: the handshake is done, and with HTTP/2 everything that can be is settled."""

    def __init__(self, ask: Ask) -> None:
        """Raises NotMeasurable if it comes to no agreement."""
        self.ask_for = ask
        self.wire = 0  # bytes that came since `ask`, or before it behind all that was read
        self.version = self.cipher = ""
        self._tls: ssl.SSLObject | None = None
        self._ended = False  # by the peer's close_notify
        self._records = 0  # how many of them had plaintext for us
        self._decoder = Decoder()
        try:
            with ask.network.at_client():
                self.sock = socket.create_connection((ask.network.host, ask.port), timeout=STALL)
        except OSError as exc:
            raise NotMeasurable(f"nobody answers at port {ask.port}: {exc.strerror or exc}") from exc
        try:
            self._prepare()
        except (OSError, WrongAnswer) as exc:
            self.close()
            raise NotMeasurable(f"no connection came about: {exc}") from exc
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        ask = self.ask_for
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.settimeout(None)  # Python's own timeout would be a poll before every recv
        self._patience(STALL)
        if ask.version:
            self._handshake()
        if ask.kind == "h2":
            self._settle()
        if ask.kind == "raw":
            if not ask.version:
                self._receive(1)  # it has been accepted: with loss, connections come about in any order
            self._request = b"\1"
        elif ask.kind == "http/1.1":
            self._request = answers.http1_request(ask.payload.name, closes=ask.closes)
        else:
            self._request = answers.http2_requests(ask.payload.name, ask.streams)

    def _patience(self, seconds: float) -> None:
        whole = int(seconds)
        value = struct.pack("ll", whole, int((seconds - whole) * 1e6))  # struct timeval
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def _handshake(self) -> None:
        ask = self.ask_for
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context(ask.kind, ask.version, ask.cipher).wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.sock.sendall(self._outgoing.read())
            except ssl.SSLError as exc:
                raise NotMeasurable(f"no handshake with {ask.version} {ask.cipher}: {exc.reason or exc}") from exc
            came = self._receive()
            if not came:
                raise NotMeasurable(f"no handshake with {ask.version} {ask.cipher}: it hangs up")
            self._incoming.write(came)
        self.sock.sendall(self._outgoing.read())
        self.wire = self._incoming.pending  # what came behind the handshake
        self._tls = tls
        self.version = tls.version() or ""
        cipher = tls.cipher()
        self.cipher = cipher_name(cipher[0] if cipher else "")
        if ask.cipher and self.cipher != ask.cipher:
            raise NotMeasurable(f"it chooses {self.cipher}, asked for was {ask.cipher} ({ask.version})")
        if ask.kind == "h2" and tls.selected_alpn_protocol() != "h2":
            raise NotMeasurable("it doesn't offer HTTP/2")

    def _settle(self) -> None:
        """Exchange SETTINGS; behind the answer to a PING nothing of the server's is under way any more."""
        answer = Http2Answer(self.ask_for.payload, 0, decoder=self._decoder)
        self.send(answers.http2_opening())
        asked = False
        while not answer.settled:
            plain = self.read()
            if not plain:
                raise NotMeasurable("it hangs up on HTTP/2")
            answer.feed(plain)
            if not asked:
                self.send(answers.http2_settled())
                asked = True
        self.wire = self._records = 0

    # --- bytes -----------------------------------------------------------------------------------------------------

    def send(self, plain: bytes) -> None:
        """Encrypt and send."""
        if self._tls is not None:
            self._tls.write(plain)
            plain = self._outgoing.read()
        self.sock.sendall(plain)

    def ask(self) -> None:
        """Send the request. Raises WrongAnswer."""
        try:
            self.send(self._request)
        except OSError as exc:
            raise WrongAnswer(f"it does not take the request: {exc.strerror}") from exc

    def _receive(self, most: int = _RECEIVE) -> bytes:
        try:
            return self.sock.recv(most)
        except BlockingIOError:
            raise WrongAnswer(f"nothing came for {STALL:g} seconds, after {self.wire} bytes") from None
        except OSError as exc:
            raise WrongAnswer(f"the connection was lost after {self.wire} bytes: {exc.strerror}") from exc

    def read(self) -> bytes:
        """Return what came, decrypted; b"" at the end. Raises WrongAnswer."""
        tls = self._tls
        while not self._ended:
            if tls is not None and self._incoming.pending:
                plain = self._decrypted(tls)
                if plain:
                    return plain
                continue
            came = self._receive()
            self.wire += len(came)
            if not came or tls is None:
                return came
            self._incoming.write(came)
        return b""

    def _decrypted(self, tls: ssl.SSLObject) -> bytes:
        """Return the plaintext of all whole records; OpenSSL keeps what is left over."""
        plain = b""
        try:
            while self._incoming.pending:
                piece = tls.read(records.MAX_PLAINTEXT)
                if not piece:
                    self._ended = True
                    break
                self._records += 1  # a call gives one record's at most
                plain = plain + piece if plain else piece
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._ended = True
        except ssl.SSLError as exc:
            raise WrongAnswer(f"a record can't be decrypted: {exc.reason or exc}") from exc
        return plain

    def verify(self) -> Wire:
        """Ask, take the answer apart and compare it. Raises WrongAnswer."""
        self.ask()
        answer = self._answer()
        while not answer.done:
            plain = self.read()
            if not plain:
                break
            answer.feed(plain)
        if self.ask_for.closes and self.ask_for.kind != "h2":
            self._take_end(answer)
        answer.check()
        return self._bounds(answer)

    def _take_end(self, answer: Answer) -> None:
        """Take what comes behind a whole answer, until the server ends the connection; not all do so before we do."""
        self._patience(_END)
        try:
            while plain := self.read():
                answer.feed(plain)
        except WrongAnswer:
            if not answer.done or answer.body != self.ask_for.payload.size:
                raise

    def _answer(self) -> Answer:
        ask = self.ask_for
        if ask.kind == "raw":
            return RawAnswer(ask.payload)
        if ask.kind == "http/1.1":
            return Http1Answer(ask.payload)
        return Http2Answer(ask.payload, ask.streams, decoder=self._decoder)

    def _bounds(self, answer: Answer) -> Wire:
        """Whoever sends this answer sends at least so much: in full records, with tickets and alert as they came here."""
        least = answer.least
        suite = suite_by_name(_openssl_name(self._tls))
        if suite:
            number = uapi.TLS_1_3_VERSION if self.version == "TLSv1.3" else uapi.TLS_1_2_VERSION
            overhead = records.overhead(number, suite.cipher_type)
            besides = self.wire - answer.plain - self._records * overhead
            least += -(-least // records.MAX_PLAINTEXT) * overhead + max(besides, 0)
        slack = min(_SLACK, self.ask_for.payload.size // 16)
        return Wire(self.wire, least - slack, self.wire + self.wire // 16 + 4_096, self.version, self.cipher)

    def discard(self, wire: Wire) -> tuple[float, float]:
        """Take an answer without looking at it. Raises WrongAnswer.

        Return when its last byte came (monotonic), and for how many seconds nothing more was waited for behind it: frames and
        records may come out fewer than in the verified answer, and not every server ends its connection without being told.
        """
        sock, sink, clock = self.sock, _sink, time.monotonic
        taken, last = self.wire, clock()
        waited = False
        while taken < wire.bytes:
            try:
                count = sock.recv_into(sink, _SINK, socket.MSG_TRUNC)
            except BlockingIOError:
                if waited:
                    break
                raise WrongAnswer(f"nothing came for {STALL:g} seconds, after {taken} of {wire.bytes} bytes") from None
            except OSError as exc:
                if taken >= wire.least:
                    break
                raise WrongAnswer(f"the connection was lost after {taken} of {wire.bytes} bytes: {exc.strerror}") from exc
            if not count:
                break
            taken, last = taken + count, clock()
            if not waited and wire.least <= taken < wire.bytes:
                self._patience(_GRACE)
                waited = True
        idle = clock() - last
        taken += self._too_much()
        if taken < wire.least:
            raise WrongAnswer(f"it ends after {taken} bytes of the wire; no encryption of the answer is below {wire.least}")
        if taken > wire.most:
            raise WrongAnswer(f"it sends {taken} bytes of the wire and more, with the same answer it was {wire.bytes} before")
        return last, idle

    def _too_much(self) -> int:
        """Return how many bytes more are here already."""
        try:
            return self.sock.recv_into(_sink, _SINK, socket.MSG_TRUNC | socket.MSG_DONTWAIT)
        except OSError:
            return 0

    def close(self) -> None:
        """Hang up."""
        self.sock.close()


_sink = bytearray(_SINK)


def _openssl_name(tls: ssl.SSLObject | None) -> str:
    cipher = tls.cipher() if tls is not None else None
    return cipher[0] if cipher else ""


def cipher_name(name: str) -> str:
    """Return the cipher in OpenSSL's name of a suite as the kernel's headers call it, "AES-256-GCM"; else the whole name."""
    suite = suite_by_name(name)
    return uapi.CIPHERS[suite.cipher_type].name if suite else name


@functools.cache
def context(kind: Kind, version: str, cipher: str) -> ssl.SSLContext:
    """Return a client's context for exactly this version."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE  # which server it is we know: we have started it
    made.minimum_version = made.maximum_version = VERSIONS[version]
    made.set_ciphers(OPENSSL_CIPHERS[cipher])
    if kind != "raw":
        made.set_alpn_protocols([kind])
    return made
