"""Everything that can go wrong, by who is at fault.

Operator -> SettingsError, StartError. Kernel -> HandoverError. Peer -> PeerError. File -> FileTruncated; FileCold is no error
but a condition.
Any other exception is a bug of ours. Messages say what happened, the value seen and the value wanted; they never
hold secrets.
"""

import errno as _errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktlsd.slices import OpenFile


class KtlsdError(Exception):
    """Root of the tree; never raised itself."""


class SettingsError(KtlsdError):
    """The operator asked for something impossible: one line on stderr, exit status 2, no traceback."""


class StartError(KtlsdError):
    """The settings are sound but this machine can't carry them out: one line on stderr, exit status 1."""


class HandoverError(KtlsdError):
    """The kernel refused one step of taking the keys over.

    `step` is the socket option as spelled in the kernel's headers ("TCP_ULP", "TLS_TX"); `errno` is the kernel's.
    Until TLS_TX has succeeded the socket is still plain TCP, so the connection goes on in userspace.
    """

    def __init__(self, step: str, errno: int) -> None:
        super().__init__(f"{step}: {_errno.errorcode.get(errno, errno)}")
        self.step = step
        self.errno = errno

    @property
    def reason(self) -> str:
        """A short, stable key for logs and counters, like "TCP_ULP:ENOENT"."""
        return f"{self.step}:{_errno.errorcode.get(self.errno, self.errno)}"


class PeerError(KtlsdError):
    """The peer broke a rule or went away: it is told once, one INFO line is logged, a counter rises.

    `alert` is the TLS alert to send (RFC 8446 §6), None when there is nothing left to tell. `farewell` holds bytes
    that are already a finished record (or plain text) for the wire, b"" when there are none.
    """

    alert: int | None = None

    def __init__(self, message: str, *, alert: int | None = None, farewell: bytes = b"") -> None:
        super().__init__(message)
        if alert is not None:
            self.alert = alert
        self.farewell = farewell


class ProxyHeaderError(PeerError):
    """A proxy that we trust to say who its client is said something that is no PROXY protocol header."""


class TurnedAway(PeerError):
    """A client has as many connections as it may have."""


class HandshakeFailed(PeerError):
    """No TLS session came about; `farewell` holds OpenSSL's alert record, if it wrote one."""


class PlainHttp(HandshakeFailed):
    """The first bytes were an HTTP request, not a TLS record; `request` holds what came of it."""

    request: bytes = b""


class RecordError(PeerError):
    """A record could not be decrypted or broke a rule of RFC 8446 §5."""

    alert = 20  # bad_record_mac


class UnexpectedMessage(PeerError):
    """A handshake message came that is not allowed now, or too often (KeyUpdate storms)."""

    alert = 10  # unexpected_message


class PeerAlert(PeerError):
    """The peer sent a fatal alert: there is nobody left to tell."""


class PeerTruncated(PeerError):
    """TCP ended without close_notify (RFC 8446 §6.1), or was reset."""


class Overdue(PeerError):
    """A deadline passed: handshake, request header, idle, or no progress."""


class RequestError(PeerError):
    """An HTTP request can't be served as sent; `status` is the answer, `detail` one sentence for the client."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail


class Http2Error(PeerError):
    """A connection error of HTTP/2 (RFC 9113 §5.4.1); `code` is the name of GOAWAY's error code, "ENHANCE_YOUR_CALM"."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(f"HTTP/2 {code}: {why}")
        self.code = code


class FileTruncated(KtlsdError):
    """The file shrank or became unreadable while it was being sent: the connection is aborted so that the client can tell."""


class FileCold(KtlsdError):
    """What is to be sent next is not in memory, and reading it would make everybody wait: read it in a thread first."""

    def __init__(self, file: "OpenFile", offset: int) -> None:
        super().__init__(f"not in memory at {offset}")
        self.file = file
        self.offset = offset
