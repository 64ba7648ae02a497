"""A request as it was understood, a response before it has a form on the wire; the same for every version of HTTP."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final, Protocol

from ktlsd.errors import RequestError
from ktlsd.slices import FileSlice, Segment

Headers = list[tuple[bytes, bytes]]
Fields = tuple[tuple[bytes, bytes], ...]  # as they came; :method and the like among them
SECRET_FIELDS: Final = frozenset((b"authorization", b"cookie", b"proxy-authorization"))  # a request with one is not remembered


def holds_secret(fields: Iterable[tuple[bytes, bytes]], target: bytes = b"") -> bool:
    """Whether a request with these fields and this target (or :path) must not be remembered: who reads memory could use it."""
    if b"signature=" in target:
        return True
    return any(name in SECRET_FIELDS or (name == b":path" and b"signature=" in value) for name, value in fields)


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `target` is as received (origin-form or "*"), `host` the authority asked for, without userinfo.

    Field names in `headers` are lower case, values without surrounding white space.
    """

    method: str
    target: bytes
    host: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    version: str  # "HTTP/1.1", "HTTP/1.0", "HTTP/2"
    stream_id: int
    fields: Fields | None = field(default=None, compare=False, repr=False)  # of HTTP/2: all it consists of, if it has no body

    def header(self, name: bytes) -> bytes | None:
        """Return the value of a field, its lines joined by ", " (RFC 9110 §5.3); None if it was not sent."""
        values = [value for key, value in self.headers if key == name]
        return b", ".join(values) if values else None


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that can't be passed on: answer `error` in its turn, then close."""

    error: RequestError
    stream_id: int
    request_line: bytes  # as far as it was readable, for the log


class Stream(Protocol):
    """A body that is made piece by piece; whoever drops it, at the end or before, calls `close`."""

    def __next__(self) -> bytes:
        """Return the next piece, b"" for work done without a result. Raises StopIteration at the end."""

    def close(self) -> None:
        """Let go of what it holds."""


@dataclass(slots=True)
class Response:
    """Status, fields and body. `content_length` is the body a GET would get; a HEAD's `body` is empty all the same.

    `body` holds references to files: whoever drops a response unsent calls `close`. `stream` gives what follows `body`
    and whose length isn't known (`content_length` None), piece by piece; an empty piece is work done without a result yet.
    """

    status: int
    headers: Headers
    body: list[Segment] = field(default_factory=list)
    content_length: int | None = 0  # None: the status has no body (304, 204)
    close_connection: bool = False
    stream: Stream | None = None
    reusable: bool = False  # an equal request may have it too, as long as the file is the same

    @property
    def body_bytes(self) -> int:
        """How many bytes will be sent behind the header."""
        return sum(len(segment) for segment in self.body)

    def close(self) -> None:
        """Let go of the files in the body."""
        for segment in self.body:
            if isinstance(segment, FileSlice):
                segment.close()
        self.body = []
        if self.stream is not None:
            self.stream.close()
        self.stream = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A response that has ended: `complete` if the channel has accepted its last byte. `status` is 0 before there was one."""

    stream_id: int
    status: int
    body_bytes: int
    complete: bool


def reason_phrase(status: int) -> str:
    """Return the phrase for a status, "Unknown" if it has none."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
