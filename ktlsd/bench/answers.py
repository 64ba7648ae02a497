"""What a server answers, taken apart and compared with what it should be. Bytes in, no socket here.

A parser is fed decrypted bytes in any pieces and says when the answer is whole. It believes nothing: status, length and content
are compared, and everything a server may do wrong is `WrongAnswer`.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol

from hpack import Decoder, HPACKError

from ktlsd.errors import KtlsdError

Kind = Literal["raw", "http/1.1", "h2"]
HttpKind = Literal["http/1.1", "h2"]

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WINDOW_MAX: Final = (1 << 31) - 1  # bytes, RFC 9113 §6.9.1
FRAME_MAX: Final = 16_384  # payload of a frame as long as we don't allow more, RFC 9113 §6.5.2
FRAME_HEADER: Final = 9
_HEAD_MAX: Final = 65_536  # bytes of an HTTP/1.1 header

# Frame types and flags, RFC 9113 §6
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_END_STREAM = _ACK = 0x1
_END_HEADERS, _PADDED = 0x4, 0x8


class WrongAnswer(KtlsdError):
    """The server did wrong: other bytes, too few, too many, none in time. Nothing it was measured with counts."""


class NotMeasurable(KtlsdError):
    """It can't be measured here, through nobody's fault: not installed, not spoken, refused by this kernel."""


@dataclass(frozen=True, slots=True)
class Payload:
    """A file to be served. `name` is its path below the root; `digest` its SHA-256."""

    path: Path
    name: str
    size: int
    digest: bytes


class Answer(Protocol):
    """What the three parsers have in common."""

    done: bool  # whole
    plain: int  # bytes fed

    @property
    def body(self) -> int:
        """Bytes of payload."""

    @property
    def least(self) -> int:
        """How few bytes (of `plain`) this answer could have had."""

    def feed(self, data: bytes) -> None:
        """Take what came. Raises WrongAnswer."""

    def check(self) -> None:
        """Compare with the payload. Raises WrongAnswer."""


class RawAnswer:
    """The payload and nothing else."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._hash = hashlib.sha256()
        self.plain = self.body = 0
        self.done = False

    @property
    def least(self) -> int:
        """How few bytes (of `plain`) this answer could have had."""
        return self.plain

    def feed(self, data: bytes) -> None:
        """Take what came. Raises WrongAnswer."""
        self.plain += len(data)
        self.body = self.plain
        _not_longer(self.body, self._payload)
        self._hash.update(data)
        self.done = self.body == self._payload.size

    def check(self) -> None:
        """Compare with the payload. Raises WrongAnswer."""
        _compare(self.body, self._hash.digest(), self._payload)


class Http1Answer:
    """One response with Content-Length."""

    def __init__(self, payload: Payload) -> None:
        self._raw = RawAnswer(payload)
        self._payload = payload
        self._head = b""
        self.plain = 0
        self.done = False

    @property
    def body(self) -> int:
        """Bytes of payload."""
        return self._raw.body

    @property
    def least(self) -> int:
        """How few bytes (of `plain`) this answer could have had."""
        return self.plain

    def feed(self, data: bytes) -> None:
        """Take what came. Raises WrongAnswer."""
        self.plain += len(data)
        if not self._head.endswith(b"\r\n\r\n"):
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                if len(head) > _HEAD_MAX:
                    raise WrongAnswer("it answers with a header that does not end")
                return
            self._head = head + end
            self._check_head(head)
        self._raw.feed(data)
        self.done = self._raw.body == self._payload.size

    def _check_head(self, head: bytes) -> None:
        status, *lines = head.decode("latin-1").split("\r\n")
        if not status.startswith("HTTP/1.1 200"):
            raise WrongAnswer(f"it answers {status[:60]!r}, wanted HTTP/1.1 200")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "transfer-encoding" in fields:
            raise NotMeasurable("it sends the file in chunks (Transfer-Encoding), whose size on the wire says nothing")
        if fields.get("content-length") != str(self._payload.size):
            raise WrongAnswer(f"it says Content-Length {fields.get('content-length')}, the file has {self._payload.size}")

    def check(self) -> None:
        """Compare with the payload. Raises WrongAnswer."""
        self._raw.check()


@dataclass(slots=True)
class _Stream:
    body: int = 0
    ended: bool = False
    hash: "hashlib._Hash" = field(default_factory=hashlib.sha256)


class Http2Answer:
    """Responses on so many streams: 1, 3, 5, … from `first` on. The connection's own frames are counted and passed over."""

    def __init__(self, payload: Payload, streams: int, *, decoder: Decoder, first: int = 1) -> None:
        self._payload = payload
        self._streams = {first + 2 * number: _Stream() for number in range(streams)}
        self._buffer = b""
        self._block = b""
        self._decoder = decoder
        self._waiting = streams
        self._data_headers = 0  # bytes
        self.settled = False  # the server's SETTINGS and its answer to our PING have come
        self._settings = False
        self.plain = self.body = 0
        self.done = False

    @property
    def least(self) -> int:
        """How short this answer could have been: with its DATA frames as large as may be."""
        frames = len(self._streams) * -(-self._payload.size // FRAME_MAX)
        return self.plain - self._data_headers + frames * FRAME_HEADER

    def feed(self, data: bytes) -> None:
        """Take what came. Raises WrongAnswer."""
        self.plain += len(data)
        data = self._buffer + data if self._buffer else data
        at, end = 0, len(data)
        while end - at >= FRAME_HEADER:
            size = int.from_bytes(data[at : at + 3], "big")
            if size > FRAME_MAX:
                raise WrongAnswer(f"it sends a frame of {size} bytes, allowed are {FRAME_MAX}")
            following = at + FRAME_HEADER + size
            if following > end:
                break
            kind, flags = data[at + 3], data[at + 4]
            number = int.from_bytes(data[at + 5 : at + 9], "big") & WINDOW_MAX
            self._frame(kind, flags, number, data[at + FRAME_HEADER : following])
            at = following
        self._buffer = data[at:]

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == _DATA:
            self._data(number, flags, payload)
        elif kind == _HEADERS:
            self._headers(number, flags, payload)
        elif kind == _CONTINUATION:
            self._header_block(number, flags, payload)
        elif kind == _SETTINGS:
            self._settings = self._settings or not flags & _ACK
        elif kind == _PING:
            self.settled = self._settings and bool(flags & _ACK)
        elif kind == _GOAWAY:
            code = int.from_bytes(payload[4:8], "big")
            if code:
                raise WrongAnswer(f"it ends the connection with GOAWAY, error {code} {payload[8:60]!r}")
        elif kind == _RST_STREAM:
            raise WrongAnswer(f"it resets stream {number}, error {int.from_bytes(payload[:4], 'big')}")

    def _stream(self, number: int) -> _Stream:
        stream = self._streams.get(number)
        if stream is None or stream.ended:
            raise WrongAnswer(f"it answers on stream {number}, where nothing was asked or all was answered")
        return stream

    def _data(self, number: int, flags: int, payload: bytes) -> None:
        stream = self._stream(number)
        self._data_headers += FRAME_HEADER
        if flags & _PADDED and payload:
            self._data_headers += 1 + payload[0]
            payload = payload[1 : len(payload) - payload[0]]
        stream.body += len(payload)
        stream.hash.update(payload)
        self.body += len(payload)
        _not_longer(stream.body, self._payload)
        if flags & _END_STREAM:
            self._end(stream)

    def _headers(self, number: int, flags: int, payload: bytes) -> None:
        stream = self._stream(number)
        if flags & _PADDED and payload:
            payload = payload[1 : len(payload) - payload[0]]
        if flags & 0x20:  # PRIORITY
            payload = payload[5:]
        self._header_block(number, flags, payload)
        if flags & _END_STREAM:
            self._end(stream)

    def _header_block(self, number: int, flags: int, payload: bytes) -> None:
        self._block += payload
        if not flags & _END_HEADERS:
            return
        try:
            fields = {_text(name): _text(value) for name, value in self._decoder.decode(self._block)}
        except HPACKError as exc:
            raise WrongAnswer(f"its headers on stream {number} can't be decoded: {exc}") from exc
        self._block = b""
        status = fields.get(":status")
        if status is not None and status != "200":
            raise WrongAnswer(f"it answers {status} on stream {number}, wanted 200")

    def _end(self, stream: _Stream) -> None:
        stream.ended = True
        self._waiting -= 1
        self.done = not self._waiting

    def check(self) -> None:
        """Compare every stream with the payload. Raises WrongAnswer."""
        for stream in self._streams.values():
            _compare(stream.body, stream.hash.digest(), self._payload)


class Http2Counter:
    """The same, light enough to ask for small files again and again: lengths and ends of streams, nothing is decoded."""

    def __init__(self, size: int, streams: int) -> None:
        self._wanted = size * streams
        self._waiting = streams
        self._buffer = b""
        self.body = 0

    def feed(self, data: bytes) -> bool:
        """Take what came; whether all streams have ended. Raises WrongAnswer."""
        if self._buffer:
            data = self._buffer + data
        at, end = 0, len(data)
        while end - at >= FRAME_HEADER:
            size = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
            following = at + FRAME_HEADER + size
            if following > end:
                break
            kind = data[at + 3]
            if kind == _DATA:
                self.body += size
            elif kind in (_RST_STREAM, _GOAWAY):
                raise WrongAnswer(f"it sends {'GOAWAY' if kind == _GOAWAY else 'RST_STREAM'} instead of an answer")
            if kind in (_DATA, _HEADERS) and data[at + 4] & _END_STREAM:
                self._waiting -= 1
            at = following
        self._buffer = data[at:]
        if self._waiting > 0:
            return False
        if self.body < self._wanted:
            raise WrongAnswer(f"it sends {self.body} bytes, wanted are {self._wanted}")
        return True


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def _not_longer(body: int, payload: Payload) -> None:
    if body > payload.size:
        raise WrongAnswer(f"it sends {body} bytes or more, the file has {payload.size}")


def _compare(body: int, digest: bytes, payload: Payload) -> None:
    if body != payload.size:
        raise WrongAnswer(f"it sends {body} bytes, the file has {payload.size}")
    if digest != payload.digest:
        raise WrongAnswer(
            f"its {body} bytes are not the file's: SHA-256 {digest.hex()[:16]}…, wanted {payload.digest.hex()[:16]}…"
        )


# --- what is asked -----------------------------------------------------------------------------------------------------


def http1_request(name: str, *, closes: bool) -> bytes:
    """Return a GET."""
    last = b"Connection: close\r\n" if closes else b""
    return b"GET /%b HTTP/1.1\r\nHost: localhost\r\nUser-Agent: ktlsd-bench\r\n%b\r\n" % (name.encode(), last)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame (RFC 9113 §4.1)."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def http2_opening() -> bytes:
    """Return the preface, with windows so wide that nothing more has to be sent while files come."""
    settings = b"\0\2\0\0\0\0" + b"\0\4" + WINDOW_MAX.to_bytes(4, "big")  # ENABLE_PUSH 0, INITIAL_WINDOW_SIZE
    return PREFACE + frame(_SETTINGS, 0, 0, settings) + frame(_WINDOW_UPDATE, 0, 0, (WINDOW_MAX - 65_535).to_bytes(4, "big"))


def http2_settled() -> bytes:
    """Return the acknowledgement of the server's SETTINGS, and a PING: when that is answered, nothing is under way."""
    return frame(_SETTINGS, _ACK, 0) + frame(_PING, 0, 0, b"settled?")


def http2_requests(name: str, streams: int, first: int = 1) -> bytes:
    """Return GETs on so many streams, headers in full so that they need no state (RFC 7541 §6.2.2)."""
    path = b"/" + name.encode()
    block = b"\x82\x87\x04" + bytes((len(path),)) + path + b"\x01\x09localhost"  # GET, https, :path, :authority
    assert len(path) < 127, "a longer one has another form (RFC 7541 §5.1)"
    return b"".join(frame(_HEADERS, _END_STREAM | _END_HEADERS, first + 2 * number, block) for number in range(streams))
