"""Request bodies, which a file server has no use for: measured (RFC 9112 §6, §7.1), thrown away, never left in the buffer."""

import re
from typing import Final

from ktlsd.errors import RequestError

MAX_BODY: Final = 65_536  # bytes dropped on behalf of one request; a longer body ends the connection with 413
_CHUNK_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")
_MAX_LINE: Final = 1024  # bytes of a chunk-size line or trailer field


class BodyDrain:
    """Eats one request's body from the front of a buffer; `done` once its last byte is gone."""

    def __init__(self, length: int | None) -> None:
        self._chunked = length is None
        self._left = length or 0  # bytes of data still to drop
        self._line_end_due = False  # a chunk's data is through, its CR LF is not
        self._dropped = 0
        self._in_trailer = False
        self.done = False

    @classmethod
    def for_request(cls, values: dict[bytes, list[bytes]], *, http10: bool) -> "BodyDrain | None":
        """Return the drain for a request with these fields, None if it has no body (RFC 9112 §6.3).

        Raises RequestError: 400 where the length is in doubt (other transfer codings included), 413 where it is too long.
        """
        lengths = values.get(b"content-length", [])
        codings = values.get(b"transfer-encoding", [])
        if codings:
            if lengths:
                raise RequestError(400, "Content-Length and Transfer-Encoding exclude each other.")
            if http10:
                raise RequestError(400, "HTTP/1.0 has no Transfer-Encoding.")
            if [value.lower() for value in codings] != [b"chunked"]:
                raise RequestError(400, "The only transfer coding understood here is one chunked.")
            return cls(None)
        if not lengths:
            return None
        if len(set(lengths)) > 1 or not lengths[0].isdigit() or len(lengths[0]) > 19:
            raise RequestError(400, "Content-Length is not one number.")
        length = int(lengths[0])
        if length > MAX_BODY:
            raise RequestError(413, "Request bodies are not taken here.")
        return cls(length) if length else None

    def feed(self, buffer: bytearray) -> None:
        """Cut what belongs to the body off the front of `buffer`. Raises RequestError: 400 malformed, 413 too long."""
        while not self.done:
            if self._left:
                gone = min(self._left, len(buffer))
                del buffer[:gone]
                self._left -= gone
                if self._left:
                    return
            if not self._chunked:
                self.done = True
                return
            if self._line_end_due:
                if len(buffer) < 2:
                    return
                if buffer[:2] != b"\r\n":
                    raise RequestError(400, "A chunk is not as long as its size says.")
                del buffer[:2]
                self._line_end_due = False
            line = self._take_line(buffer)
            if line is None:
                return
            self._chunk_line(line)

    def _take_line(self, buffer: bytearray) -> bytes | None:
        end = buffer.find(b"\r\n", 0, _MAX_LINE + 2)
        if end < 0:
            if len(buffer) > _MAX_LINE:
                raise RequestError(400, "A chunk's size line is too long.")
            return None
        line = bytes(buffer[:end])
        del buffer[: end + 2]
        return line

    def _chunk_line(self, line: bytes) -> None:
        if self._in_trailer:
            self._dropped += len(line)
            if line and not _TRAILER.fullmatch(line):
                raise RequestError(400, "A trailer field is malformed.")
            self.done = not line
        else:
            match = _CHUNK_SIZE.fullmatch(line)
            if match is None:
                raise RequestError(400, "A chunk has no size.")
            size = int(match[1], 16)
            self._dropped += size + len(line)
            self._left = size
            self._line_end_due = size > 0
            self._in_trailer = size == 0
        if self._dropped > MAX_BODY:
            raise RequestError(413, "Request bodies are not taken here.")
