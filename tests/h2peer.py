"""A client of HTTP/2 that says exactly what a test wants, frame by frame, and takes apart what comes. No h2 is in it."""

import os
from collections.abc import Callable, Sequence

from hpack import Decoder, Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    RstStreamFrame,
    SettingsFrame,
)

from ktlsd.protocol.http2 import Http2Connection
from ktlsd.protocol.messages import Refused, Request, Response
from ktlsd.slices import FileSlice, Framed, Outgoing

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GET = ((":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", "localhost"))


def request(*fields: tuple[str, str], **pseudo: str | None) -> list[tuple[str, str]]:
    """The header list of a GET; `path="/x"` replaces a pseudo-header, None leaves it out."""
    start = {**{name[1:]: value for name, value in GET}, **pseudo}
    return [(f":{name}", value) for name, value in start.items() if value is not None] + list(fields)


def raw(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


def wire(segments: Sequence[Outgoing]) -> bytes:
    """What a channel would put on the wire."""
    out = b""
    for segment in segments:
        if isinstance(segment, Framed):
            for piece in segment.pieces():
                out += piece if isinstance(piece, bytes) else os.pread(segment.file.fd, piece[1], piece[0])
        elif isinstance(segment, FileSlice):
            out += os.pread(segment.file.fd, segment.length, segment.offset)
        else:
            out += bytes(segment)
    return out


class Wire:
    """The client's side of the frames: what it sends encoded, what it gets decoded."""

    def __init__(self) -> None:
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.got: list[Frame] = []
        self._buffer = b""

    def headers(self, stream_id: int, fields=GET, *, end: bool = True, flags: tuple[str, ...] = ("END_HEADERS",)) -> bytes:
        frame = HeadersFrame(stream_id, self.encoder.encode(list(fields)))
        frame.flags |= {*flags, *(("END_STREAM",) if end else ())}
        return frame.serialize()

    def take(self, data: bytes) -> list[Frame]:
        """Return the frames that are whole with `data`."""
        self._buffer += data
        new = []
        while len(self._buffer) >= 9:
            frame, length = Frame.parse_frame_header(memoryview(self._buffer[:9]))
            if len(self._buffer) < 9 + length:
                break
            frame.parse_body(memoryview(self._buffer[9 : 9 + length]))
            frame.body_len = length
            self._buffer = self._buffer[9 + length :]
            new.append(frame)
        self.got += new
        return new

    # --- what came -------------------------------------------------------------------------------------------------

    def of(self, kind: type, stream_id: int | None = None) -> list[Frame]:
        return [frame for frame in self.got if type(frame) is kind and stream_id in (None, frame.stream_id)]

    def body(self, stream_id: int) -> bytes:
        return b"".join(frame.data for frame in self.of(DataFrame, stream_id))

    def ended(self, stream_id: int) -> bool:
        return any("END_STREAM" in frame.flags for frame in self.got if frame.stream_id == stream_id)

    @property
    def goaway(self) -> tuple[int, int] | None:
        """(error code, last stream) of the last GOAWAY."""
        found = self.of(GoAwayFrame)
        return (found[-1].error_code, found[-1].last_stream_id) if found else None

    def reset(self, stream_id: int) -> int | None:
        found = self.of(RstStreamFrame, stream_id)
        return found[-1].error_code if found else None


class RawPeer(Wire):
    """A client in front of an `Http2Connection` that has no socket."""

    def __init__(
        self, answer: Callable[[Request | Refused], Response] | None = None, *, settings: dict[int, int] | None = None,
        begin: bool = True, **options: object,
    ) -> None:  # fmt: skip
        super().__init__()
        self.http = Http2Connection(**options)
        self.answer = answer or (lambda _: Response(200, [(b"Server", b"x")], [b"hello"], 5))
        self.requests: list[Request | Refused] = []
        self.ended_responses = []
        self.now = 1000.0
        self.reading = True
        if begin:
            self.send(PREFACE, SettingsFrame(0, settings or {}).serialize())
            self.send(raw(4, 1, 0))  # acknowledges

    def send(self, *data: bytes | Frame) -> list[Frame]:
        """Send bytes or frames; return the frames that come back."""
        whole = b"".join(item if isinstance(item, bytes) else item.serialize() for item in data)
        for found in self.http.receive(whole, self.now):
            self.requests.append(found)
            answer = self.answer(found)
            if answer is not None:
                self.http.respond(found.stream_id, answer)
        return self.read() if self.reading else []

    def read(self, most: int | None = None, step: int = 1 << 20) -> list[Frame]:
        """Take what the server has to say, at most `step` bytes at a time and `most` in all."""
        new = []
        self.ended_responses += self.http.sent(0)
        while segments := self.http.next_output(1 << 20):
            data = wire(segments)[: min(step, most if most is not None else step)]
            if not data:
                break
            new += self.take(data)
            self.ended_responses += self.http.sent(len(data))
            if most is not None:
                most -= len(data)
        return new

    def get(self, stream_id: int, *fields: tuple[str, str], **pseudo: str | None) -> list[Frame]:
        return self.send(self.headers(stream_id, request(*fields, **pseudo)))

    def status(self, stream_id: int) -> str:
        """The status of a response; headers must be decoded in the order they came, once."""
        if not hasattr(self, "_decoded"):
            self._decoded, self._seen = {}, 0
        found = self.of(HeadersFrame)
        for frame in found[self._seen :]:
            self._decoded[frame.stream_id] = dict(self.decoder.decode(frame.data))
        self._seen = len(found)
        return self._decoded[stream_id][":status"]
