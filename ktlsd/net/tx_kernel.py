"""Sending in kernel mode: segments straight into a socket whose keys the kernel has.

The traps (ktls.md §3): what a call accepted is the kernel's, even if TCP has not taken it; a record may stay open in the
kernel, and no control record may go out behind an open one; shutdown loses what TCP has not taken.
"""

import enum
import errno
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

from ktlsd import uapi
from ktlsd.errors import FileCold, FileTruncated, HandoverError, PeerError, PeerTruncated
from ktlsd.net.gather import gather, warm_count
from ktlsd.net.hot import Runs, buffers_of, headers_of, hot_runs, leave_out, vectors_of
from ktlsd.net.kernel import IOV_MAX, Buffer, Kernel
from ktlsd.net.tx_plain import SENDFILE_MAX, PlainTx
from ktlsd.net.tx_userspace import Scratch
from ktlsd.slices import FileSlice, Framed, OpenFile, Outgoing
from ktlsd.tls import records
from ktlsd.tls.session import Session

# Rekey in the middle of a body: a short sendfile that is taken whole closes the record, so that a KeyUpdate may follow.
_CLOSING_PIECE: Final = 4_096
_SEGMENT_MAX: Final = 65_536  # bytes; the largest a TCP segment can be
_BURST_MIN: Final = 65_536  # bytes offered to the socket at a time: as it takes them
_HOT_MIN: Final = 1 << 20  # the same for what needs no copy
_BURST_MAX: Final = 8 << 20
_PINNED: Final = 1_024  # headers that stay alive behind the last one that was accepted


class Framing(enum.Enum):
    """How frames of HTTP/2 go into a socket whose keys the kernel has."""

    COPY = "copy"  # read into a buffer with holes for headers, one send: one copy more
    SENDFILE = "sendfile"  # a send and a sendfile for each frame
    MAPPED = "mapped"  # one sendmsg over headers and pages that stay mapped; files that aren't are copied
    SPLICED = "spliced"  # the same pages by vmsplice and splice


class KernelTx(PlainTx):
    """The sending half of a channel once TLS_TX has succeeded; there is no way back."""

    __slots__ = (
        "_burst",
        "_cipher_type",
        "_framing",
        "_notified",
        "_overhead",
        "_owes_key_update",
        "_payload",
        "_pinned",
        "_record_open",
        "_records_before",
        "_scratch",
        "_session",
        "_taken_before",
    )

    def __init__(
        self,
        sock: socket.socket,
        session: Session,
        kernel: Kernel,
        scratch: Scratch,
        framing: Framing,
        *,
        info: uapi.CryptoInfo,
        taken_before: int,
    ) -> None:
        """`info` is what was installed, `taken_before` what TCP had taken by then (bytes of the wire)."""
        super().__init__(sock, kernel)
        self._scratch = scratch
        self._framing = framing
        self._burst = _BURST_MIN
        self._pinned: deque[bytes] = deque(maxlen=_PINNED)
        self._session = session
        self._cipher_type = info.cipher_type
        self._overhead = records.overhead(info.version, info.cipher_type)
        self._record_open = False  # the last call may have left a record unfinished in the kernel
        self._owes_key_update = False  # our next record must be a KeyUpdate
        self._notified = False
        self._taken_before = taken_before
        self._payload = 0  # bytes given to the kernel, control records included
        self._records_before = -int.from_bytes(info.rec_seq, "big")  # records under earlier keys, less the first's number

    def send(self, segments: Sequence[Outgoing]) -> int | None:
        """Send from the front of `segments`; return how many bytes were accepted, None if none. Raises FileTruncated."""
        if self._owes_key_update and not self._record_open and not self._send_key_update():
            return None
        framed = any(isinstance(segment, Framed) for segment in segments)
        accepted = self._send_frames(segments) if framed else super().send(segments)
        self._payload += accepted or 0
        return accepted

    # --- frames of HTTP/2 (ktls.md §5) -----------------------------------------------------------------------------

    def _send_frames(self, segments: Sequence[Outgoing]) -> int | None:
        """Send headers and the pieces of files between them, in the way this machine does best (docs/performance.md)."""
        framing = self._framing
        if framing is Framing.SENDFILE:
            return self._frames_by_sendfile(segments)
        if framing is not Framing.COPY and not self._owes_key_update:
            lead = _leading_bytes(segments)
            runs = hot_runs(segments[len(lead) :], self._scratch.mappings, max(self._burst, _HOT_MIN))
            if runs and lead:
                return self._offer(lead[:IOV_MAX])  # these are copied, and the frames come with the next call
            if runs:
                try:
                    return self._frames_by_splice(runs) if framing is Framing.SPLICED else self._offer(buffers_of(runs))
                except FileTruncated:
                    self._framing = Framing.MAPPED  # vmsplice is forbidden; or it became shorter, which copying finds out
                except OSError as exc:
                    if exc.errno != errno.EFAULT:
                        raise
        data = gather(segments, self._scratch.view[: _CLOSING_PIECE if self._owes_key_update else self._burst])
        return self._offer([data])

    def _frames_by_splice(self, runs: Runs) -> int | None:
        """Refer to headers and mapped pages in a pipe, and have them go from there."""
        vectors = vectors_of(runs)
        accepted = 0
        while vectors:
            try:
                offered, sent = self._kernel.send_pages(self._sock, vectors, more=False)
            except FileTruncated:
                if accepted:
                    break
                raise
            accepted += sent or 0
            if sent is None:
                self._unstick()
            else:
                self._record_open = sent < offered
            if sent is None or sent < offered:
                self._burst = max(accepted, _BURST_MIN)
                break
            leave_out(vectors, sent)
        else:
            self._burst = min(self._burst * 2, _BURST_MAX)
        if accepted:
            # Headers are read when their record is encrypted, which may be after this call: with the next one, or by hardware.
            self._pinned.extend(headers_of(runs))
        return accepted or None

    def _offer(self, buffers: list[Buffer]) -> int | None:
        """Send; offer twice as much the next time if all was taken, else about as much as was."""
        offered = sum(map(len, buffers))
        sent = self._send_bytes(buffers, offered, more=False)
        if sent == offered:
            self._burst = min(self._burst * 2, _BURST_MAX)
        elif sent is not None:
            self._burst = max(sent, _BURST_MIN)
        return sent

    def _frames_by_sendfile(self, segments: Sequence[Outgoing]) -> int | None:
        """Each header in a record that stays open for its payload."""
        accepted = 0
        for piece, file in _pieces(segments):
            if isinstance(piece, bytes | memoryview):
                offered = len(piece)
                sent = self._send_bytes([piece], offered, more=file is not None)
            else:
                assert file is not None
                offset, offered = piece
                sent = self._payload_by_sendfile(file, offset, offered, begun=accepted > 0)
            accepted += sent or 0
            if sent is None or sent < offered or (self._owes_key_update and not self._record_open):
                break
        return accepted or None

    def _payload_by_sendfile(self, file: OpenFile, offset: int, count: int, *, begun: bool) -> int | None:
        try:
            count = warm_count(file, offset, count)
            sent = self._kernel.sendfile(self._sock, file.fd, offset, count)
            if sent == 0:
                raise FileTruncated(f"the file ends at {offset}, {count} bytes short")
        except (FileTruncated, FileCold):
            if begun:
                return None  # the caller has to know first that its header is gone
            raise
        if sent is None:
            self._unstick()
        else:
            self._record_open = sent < count
        return sent

    def _send_bytes(self, run: list[Buffer], offered: int, *, more: bool) -> int | None:
        """Headers in front of a body (`more`) stay in an open record that the body's first bytes join: one record, not two."""
        more = more and not self._owes_key_update
        sent = self._kernel.send(self._sock, run, more=more)
        if sent:
            self._record_open = more or sent < offered
        elif sent is None:
            self._unstick()
        return sent

    def _send_slice(self, segment: FileSlice, before: int) -> int | None:
        """One sendfile call; `before` is how many bytes of this record are in the kernel already."""
        # A multiple of 16,384 with the headers before it: every record but the last is full (RFC 8446 §5.1).
        count = min(segment.length, SENDFILE_MAX - before % records.MAX_PLAINTEXT)
        if self._owes_key_update:
            count = min(segment.length, _CLOSING_PIECE)
        count = warm_count(segment.file, segment.offset, count)
        sent = self._kernel.sendfile(self._sock, segment.file.fd, segment.offset, count)
        if sent == 0:
            raise FileTruncated(f"the file ends at {segment.offset}, {segment.length} bytes short")
        if sent is None:
            self._unstick()
        else:
            self._record_open = sent < count  # a sendfile taken whole has closed its record
        return sent

    def _unstick(self) -> None:
        """It would block: make sure that something is on its way whose arrival makes room again.

        The kernel pushes records with MSG_MORE, and TCP holds back what fills no segment (64 KiB on loopback). If that is
        all a small send buffer takes, nothing ever moves: seen on 6.1 with SO_SNDBUF 4096.
        """
        if 0 < self._kernel.unacknowledged(self._sock) < _SEGMENT_MAX:
            self._kernel.push(self._sock)

    def renew_keys(self) -> None:
        """Go to the next generation of keys before the next application data.

        One KeyUpdate answers any number of the peer's that came since our last record (RFC 8446 §4.6.3).
        """
        self._owes_key_update = True

    def _send_key_update(self) -> bool:
        """Send KeyUpdate under the old key and give the kernel the new one; False if the first would block."""
        number = self._kernel.next_tx_record(self._sock, self._cipher_type)
        if not self._kernel.send_control(self._sock, records.HANDSHAKE, records.KEY_UPDATE_NOT_REQUESTED):
            return False
        self._records_before += (number or 0) + 1
        self._payload += len(records.KEY_UPDATE_NOT_REQUESTED)
        self._owes_key_update = False
        self._session.advance_tx()
        try:
            self._kernel.set_tx(self._sock, self._session.export_tx())
        except HandoverError as exc:
            # The peer expects the new key from here on and the kernel has the old one: nothing right can be sent any more.
            raise PeerTruncated(f"rekey failed: {exc.reason}") from exc
        return True

    def notify_close(self) -> bool:
        """Send close_notify; True once the kernel has it."""
        if self._record_open:  # HTTP/2: the stream whose frames were to follow has been reset
            raise PeerTruncated("the connection ended in the middle of a record")
        if not self._notified:
            if not self._kernel.send_control(self._sock, records.ALERT, records.CLOSE_NOTIFY_ALERT):
                return False
            self._payload += len(records.CLOSE_NOTIFY_ALERT)
            self._notified = True
        return True

    def all_taken(self) -> bool:
        """Whether TCP has every record: the kernel's TLS keeps those it could not push, and a FIN would lose them.

        Bytes of the wire = payload + records * overhead, and TCP tells how many it has taken.
        """
        number = self._kernel.next_tx_record(self._sock, self._cipher_type)
        if number is None:
            return self._kernel.unacknowledged(self._sock) == 0
        wire = self._payload + (self._records_before + number) * self._overhead
        return self._kernel.taken_by_tcp(self._sock) - self._taken_before >= wire

    def say_goodbye(self, error: PeerError) -> bool:
        """Send a fatal alert about `error`, if no record is open; whether it was accepted. OpenSSL's own has a stale number."""
        if error.alert is None or self._record_open:
            return False
        alert = records.fatal_alert(error.alert)
        told = bool(self._kernel.send_control(self._sock, records.ALERT, alert))
        self._payload += len(alert) if told else 0
        return told


def _leading_bytes(segments: Sequence[Outgoing]) -> list[Buffer]:
    lead: list[Buffer] = []
    for segment in segments:
        if not isinstance(segment, bytes | memoryview):
            break
        lead.append(segment)
    return lead


def _pieces(segments: Sequence[Outgoing]) -> Iterator[tuple[bytes | memoryview | tuple[int, int], OpenFile | None]]:
    """Yield bytes, with the file whose payload follows them if any, and (offset, length) with the file they are in."""
    for segment in segments:
        if isinstance(segment, Framed):
            for piece in segment.pieces():
                yield piece, segment.file
        elif isinstance(segment, FileSlice):
            yield (segment.offset, segment.length), segment.file
        elif len(segment):
            yield segment, None
