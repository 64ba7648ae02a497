"""One encrypted connection: starts in userspace, may hand its sending side to the kernel, same contract throughout.

The only file that knows which of the two it is. The contract, in either mode:

- A call returns at once: `None` means would block, nothing was accepted.
- What `try_send` accepted is gone and never sent again; what it did not accept is still the caller's.
- `try_receive` returns b"" once the peer has closed its direction; ours stays open (half-close).
- `try_close` loses nothing that was accepted and ends in close_notify; `abort` makes the peer see that something is missing.
"""

import enum
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from ktlsd import uapi
from ktlsd.errors import FileTruncated, HandoverError, PeerAlert, PeerError, PeerTruncated
from ktlsd.net import handover
from ktlsd.net.handover import KernelFacts
from ktlsd.net.kernel import Buffer, Kernel
from ktlsd.net.keylog_pipe import KeyLogPipe
from ktlsd.slices import FileSlice, Segment
from ktlsd.tls import records
from ktlsd.tls.session import Session

# More than a request needs; OpenSSL's memory BIO keeps the largest size it ever had, for every idle connection.
_RECEIVE: Final = 16_384
# Userspace: plaintext encrypted ahead of the socket. Large for the calls it saves, small for a peer that reads slowly.
_BURST_MIN: Final = 4 * records.MAX_PLAINTEXT
_BURST_MAX: Final = 16 * records.MAX_PLAINTEXT
# Kernel: one sendfile call. Longer ones save little and keep the other connections waiting.
_SENDFILE_MAX: Final = 128 * records.MAX_PLAINTEXT
# Rekey in the middle of a body: a short sendfile that is taken whole closes the record, so that a control record may follow.
_CLOSING_PIECE: Final = 4_096


class Mode(enum.Enum):
    """Who encrypts what we send."""

    HANDSHAKE = "handshake"
    USERSPACE = "userspace"
    KERNEL = "kernel"


class _Closing(enum.IntEnum):
    """How far `try_close` is."""

    NO = 0
    NOTIFY = 1
    TAKEN = 2  # close_notify accepted; waiting until TCP has all
    FIN = 3  # our direction ended; waiting for the peer's end


@dataclass(frozen=True, slots=True)
class HandoverPolicy:
    """When a connection's keys go to the kernel.

    `handover_bytes`: a response body at least this long hands over, 0 at once. `rekey_bytes`: payload after which a key is
    renewed, None for the cipher's own limit (RFC 8446 §5.5). `off` is the reason no connection may, "" if they may.
    """

    facts: KernelFacts = field(default_factory=KernelFacts)
    handover_bytes: int = 65_536
    rekey_bytes: int | None = None
    off: str = ""


class Scratch:
    """A buffer for plaintext on its way into OpenSSL; one per worker, empty between calls."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_BURST_MAX))


class Channel:
    """One accepted TCP connection and its TLS session. The caller owns time, order and HTTP."""

    __slots__ = (
        "_burst",
        "_closing",
        "_kernel",
        "_keylog",
        "_owes_key_update",
        "_payload_limit",
        "_payload_sent",
        "_policy",
        "_record_open",
        "_record_overhead",
        "_records_before",
        "_scratch",
        "_session",
        "_sock",
        "_taken_at_install",
        "_unsent",
        "_wire_sent",
        "expiring",
        "mode",
        "readable",
        "why_userspace",
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
        self._sock = sock
        self._session = session
        self._kernel = kernel
        self._policy = policy
        self._keylog = keylog
        self._scratch = scratch
        self._unsent: list[Buffer] = []  # ciphertext that OpenSSL has written and TCP has not taken
        self._burst = _BURST_MIN
        self._closing = _Closing.NO
        self._record_open = False  # kernel mode: the last send may have left a record unfinished in the kernel
        self._owes_key_update = False  # kernel mode: our next record must be a KeyUpdate
        self._payload_sent = 0  # bytes under the present key, for its limit
        self._payload_limit = 1 << 62
        self._taken_at_install = 0
        self._wire_sent = 0  # kernel mode: payload given to the kernel, plus what only control records hold
        self._records_before = 0  # kernel mode: records under earlier keys, less the number the first one started at
        self._record_overhead = 0
        self.mode = Mode.HANDSHAKE
        self.readable = True  # the socket may hold input; the poller sets it, would-block clears it
        self.why_userspace = policy.off
        self.expiring = False  # the keys can't be renewed: finish the response, then close

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """The TLS session, for its facts (version, suite, names); its data belongs to the channel."""
        return self._session

    @property
    def key_updates(self) -> int:
        """How many KeyUpdates the peer has sent."""
        return self._session.key_updates

    @property
    def idle(self) -> bool:
        """Whether everything accepted has reached TCP, as far as the channel holds it back."""
        return not self._unsent

    def fileno(self) -> int:
        """The socket's descriptor, -1 once closed."""
        return self._sock.fileno()

    # --- handshake -------------------------------------------------------------------------------------------------

    def try_handshake(self) -> bool | None:
        """Go on with the handshake: True once done. Raises HandshakeFailed, PlainHttp, PeerAlert, PeerTruncated."""
        while not self._session.established:
            if not self._flush():
                return None
            ciphertext = self._receive()
            if ciphertext is None:
                return None
            if not ciphertext:
                raise PeerTruncated("the client left during the handshake")
            try:
                out = self._session.handshake(ciphertext)
            except PeerError as exc:
                self._learn()
                self._say_goodbye(exc)
                raise
            self._learn()
            if out:
                self._unsent.append(out)
        self.mode = Mode.USERSPACE
        if not self.why_userspace:
            self.why_userspace = self._reason_against()
        if self._session.suite is not None:
            self._payload_limit = self._policy.rekey_bytes or records.application_limit(self._session.suite.cipher_type)
        self._flush()
        return True

    def _learn(self) -> None:
        if self._keylog is not None:
            self._session.learn(self._keylog.drain())

    def _reason_against(self) -> str:
        """Why this session can't ever go to the kernel, "" if it can."""
        session = self._session
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
        session = self._session
        while not session.peer_closed:
            ciphertext = self._receive()
            if ciphertext is None and session.eventless:
                return None
            if ciphertext == b"":
                raise PeerTruncated("TCP ended without close_notify")
            # Not eventless: bytes behind the client's Finished may wait inside since the handshake.
            plain = self._decrypt(ciphertext or b"")
            if plain:
                return plain
        return b""

    def _receive(self) -> bytes | None:
        if not self.readable:
            return None
        data = self._kernel.receive(self._sock, _RECEIVE)
        # A short read has emptied the socket; whatever comes later is a new edge for the poller.
        if data is None or 0 < len(data) < _RECEIVE:
            self.readable = False
        return data

    def _decrypt(self, ciphertext: bytes) -> bytes:
        try:
            plain = self._session.decrypt(ciphertext)
        except PeerError as exc:
            self._say_goodbye(exc)
            raise
        if not self._session.eventless:
            before = self._session.key_updates
            self._learn()
            if self._session.key_updates != before:
                self._answer_key_update()
            self._session.eventless = True
        return plain

    def _answer_key_update(self) -> None:
        """Act on the peer's KeyUpdate; if it asked for ours, that goes before anything else we send (RFC 8446 §4.6.3)."""
        answer = self._session.answer_key_update()
        if not answer:
            return
        if self.mode is not Mode.KERNEL:
            self._unsent.append(answer)
            self._session.advance_tx()
            self._payload_sent = 0
        else:
            self._renew_keys()  # OpenSSL's record has a stale number and is thrown away; the kernel sends ours

    # --- sending ---------------------------------------------------------------------------------------------------

    def try_send(self, segments: Sequence[Segment], *, body_bytes: int = 0) -> int | None:
        """Send from the front of `segments`; return how many bytes were accepted, None if none could be.

        `body_bytes` is the length of the response body they belong to: it decides about the hand-over. File slices are
        only read from; the caller advances them by the count. Raises PeerTruncated, FileTruncated.
        """
        if self.mode is Mode.USERSPACE and not self.why_userspace and body_bytes >= self._policy.handover_bytes:
            if not self._flush():
                return None
            self._install()
        if self.mode is Mode.KERNEL:
            return self._send_kernel(segments)
        return self._send_userspace(segments)

    def _send_userspace(self, segments: Sequence[Segment]) -> int | None:
        if not self._flush():
            return None
        plain = _gather(segments, self._scratch.view[: self._burst])
        if not plain:
            return 0
        self._unsent = list(self._session.encrypt(plain))
        self._count_payload(len(plain))
        whole = self._flush()
        self._burst = min(self._burst * 2, _BURST_MAX) if whole else _BURST_MIN
        return len(plain)

    def _flush(self) -> bool:
        """Send ciphertext that is left over; whether none is."""
        unsent = self._unsent
        while unsent:
            sent = self._kernel.send(self._sock, unsent, more=False)
            if sent is None:
                return False
            done = 0
            while done < len(unsent) and sent >= len(unsent[done]):
                sent -= len(unsent[done])
                done += 1
            del unsent[:done]
            if sent:
                unsent[0] = memoryview(unsent[0])[sent:]
        return True

    def _count_payload(self, count: int) -> None:
        self._payload_sent += count
        if self._payload_sent >= self._payload_limit:
            self._renew_keys()

    def _renew_keys(self) -> None:
        """The present key may not be used much longer: go to the next one, or to an end if the kernel takes no other."""
        tls13 = self._session.version == uapi.TLS_1_3_VERSION
        if self.mode is Mode.KERNEL and tls13 and self._policy.facts.rekey:
            # One KeyUpdate answers any number of the peer's that came since our last record.
            self._owes_key_update = True
        else:
            self.expiring = True

    # --- kernel mode -----------------------------------------------------------------------------------------------

    def _install(self) -> None:
        """Give the kernel the keys; if it refuses, stay in userspace for good and remember why."""
        assert not self._unsent, "ciphertext in hand would be encrypted twice"
        taken = self._kernel.taken_by_tcp(self._sock)
        info = self._session.export_tx()
        try:
            handover.install(self._kernel, self._sock, info)
        except HandoverError as exc:
            self.why_userspace = exc.reason
            return
        self.mode = Mode.KERNEL
        self._taken_at_install = taken
        self._records_before = -int.from_bytes(info.rec_seq, "big")
        self._record_overhead = records.overhead(info.version, info.cipher_type)

    def _send_kernel(self, segments: Sequence[Segment]) -> int | None:
        if self._owes_key_update and not self._record_open and not self._send_key_update():
            return None
        accepted, at = 0, 0
        while at < len(segments):
            segment = segments[at]
            if isinstance(segment, FileSlice):
                sent = self._send_slice(segment, accepted) if segment.length else 0
                at += 1
                offered = segment.length
            else:
                run = _bytes_run(segments, at)
                at += len(run)
                offered = sum(map(len, run))
                # Headers stay in an open record that the body's first bytes join: one record, not two.
                more = at < len(segments) and not self._owes_key_update
                sent = self._kernel.send(self._sock, run, more=more) if offered else 0
                if sent:
                    self._record_open = more or sent < offered
            if sent is None:
                break
            accepted += sent
            if sent < offered:
                break
        self._wire_sent += accepted
        self._count_payload(accepted)
        return accepted or None

    def _send_slice(self, segment: FileSlice, before: int) -> int | None:
        """One sendfile call; `before` is how many bytes of this record are in the kernel already."""
        # A multiple of 16,384 with the headers before it: every record but the last is full (RFC 8446 §5.1).
        count = min(segment.length, _SENDFILE_MAX - before % records.MAX_PLAINTEXT)
        if self._owes_key_update:
            count = min(segment.length, _CLOSING_PIECE)
        sent = self._kernel.sendfile(self._sock, segment.file.fd, segment.offset, count)
        if sent == 0:
            raise FileTruncated(f"the file ends at {segment.offset}, {segment.length} bytes short")
        if sent is not None:
            self._record_open = sent < count  # a sendfile taken whole has closed its record
        return sent

    def _send_key_update(self) -> bool:
        """Send KeyUpdate under the old key and give the kernel the new one; False if the first would block."""
        number = self._next_tx_record()
        if not self._kernel.send_control(self._sock, records.HANDSHAKE, records.KEY_UPDATE_NOT_REQUESTED):
            return False
        self._records_before += (number or 0) + 1
        self._wire_sent += len(records.KEY_UPDATE_NOT_REQUESTED)
        self._owes_key_update = False
        self._payload_sent = 0
        self._session.advance_tx()
        try:
            self._kernel.set_tx(self._sock, self._session.export_tx())
        except HandoverError as exc:
            # The peer expects the new key from here on and the kernel has the old one: nothing right can be sent any more.
            raise PeerTruncated(f"rekey failed: {exc.reason}") from exc
        return True

    def _all_taken(self) -> bool:
        """Whether TCP has every record: the kernel's TLS keeps those it could not push, and shutdown would lose them."""
        number = self._next_tx_record()
        if number is None:
            return self._kernel.unacknowledged(self._sock) == 0
        wire = self._wire_sent + (self._records_before + number) * self._record_overhead
        return self._kernel.taken_by_tcp(self._sock) - self._taken_at_install >= wire

    def _next_tx_record(self) -> int | None:
        assert self._session.suite is not None
        return self._kernel.next_tx_record(self._sock, self._session.suite.cipher_type)

    # --- ending ----------------------------------------------------------------------------------------------------

    def try_close(self) -> bool | None:
        """Go on with closing: True when the socket can be dropped. None: call again when the socket or the clock says so.

        Order (ktls.md §3.6): the last record closed, close_notify, everything in TCP, FIN, then input is read and thrown
        away until the peer's end, because unread input at close would make TCP send RST and destroy the tail.
        """
        if self._closing is _Closing.NO:
            if self.mode is Mode.USERSPACE:
                notify = self._session.close_notify()
                if notify:
                    self._unsent.append(notify)
            self._closing = _Closing.NOTIFY
        if self._closing is _Closing.NOTIFY:
            if self.mode is Mode.KERNEL:
                assert not self._record_open, "a response must be complete, or the connection aborted"
                if not self._kernel.send_control(self._sock, records.ALERT, records.CLOSE_NOTIFY_ALERT):
                    return None
                self._wire_sent += len(records.CLOSE_NOTIFY_ALERT)
            elif not self._flush():
                return None
            self._closing = _Closing.TAKEN
        if self._closing is _Closing.TAKEN:
            if self.mode is Mode.KERNEL and not self._all_taken():
                return None
            self._kernel.shutdown(self._sock)
            self._closing = _Closing.FIN
        while True:
            data = self._receive()
            if data is None:
                return None
            if not data:
                return True

    def unacknowledged(self) -> int:
        """Return how many bytes TCP still has to bring to the peer."""
        return self._kernel.unacknowledged(self._sock)

    def _say_goodbye(self, error: PeerError) -> None:
        """Tell the peer what is wrong, if that can be done at once and in order; it gets no second try."""
        if self._closing is not _Closing.NO or isinstance(error, PeerAlert):
            return
        if self.mode is not Mode.KERNEL:
            if error.farewell:
                self._unsent.append(error.farewell)
            self._flush()
        elif error.alert is not None and not self._record_open:
            self._kernel.send_control(self._sock, records.ALERT, records.fatal_alert(error.alert))

    def send_plain(self, data: bytes) -> None:
        """Send bytes in the clear to a client that never spoke TLS; what doesn't go at once is dropped."""
        assert self.mode is Mode.HANDSHAKE
        self._kernel.send(self._sock, [data], more=False)

    def abort(self) -> None:
        """Close at once with RST, without close_notify: the peer can tell that something is missing."""
        self._unsent.clear()
        if self._sock.fileno() >= 0:
            self._kernel.reset(self._sock)

    def drop(self) -> None:
        """Close the socket; what TCP has taken is still delivered."""
        self._unsent.clear()
        self._sock.close()


def _bytes_run(segments: Sequence[Segment], at: int) -> list[Buffer]:
    """Return the buffers from `at` up to the next file slice."""
    run: list[Buffer] = []
    for segment in segments[at:]:
        if isinstance(segment, FileSlice):
            break
        run.append(segment)
    return run


def _gather(segments: Sequence[Segment], view: memoryview) -> bytes | memoryview:
    """Return the front of `segments` as one buffer, at most as long as `view`, which it may fill.

    Files are read with pread and not mapped: a mapping that is truncated under us is SIGBUS, and was no faster (measured,
    docs/performance.md). Raises FileTruncated.
    """
    if len(segments) == 1 and isinstance(segments[0], bytes | memoryview):
        return segments[0][: len(view)]
    filled = 0
    for segment in segments:
        room = view[filled:]
        if not room:
            break
        if isinstance(segment, FileSlice):
            room = room[: segment.length]
            got = _read(segment, room)
            filled += got
            if got < len(room):
                break
        else:
            take = min(len(segment), len(room))
            view[filled : filled + take] = segment[:take]
            filled += take
    return view[:filled]


def _read(segment: FileSlice, room: memoryview) -> int:
    try:
        got = os.preadv(segment.file.fd, [room], segment.offset) if room else 0
    except OSError as exc:
        raise FileTruncated(f"read at {segment.offset}: {exc.strerror}") from exc
    if room and not got:
        raise FileTruncated(f"the file ends at {segment.offset}, {segment.length} bytes short")
    return got
