"""The fields of HTTP/2: a decoded header list to a Request (RFC 9113 §8.2, §8.3).

What breaks a rule of RFC 9113 is malformed and costs the stream; what only breaks one of HTTP has its status.
"""

import re
from functools import lru_cache
from typing import Final, NamedTuple

from ktlsd.errors import RequestError
from ktlsd.protocol.engine import MAX_HEADER_LIST
from ktlsd.protocol.header_blocks import HeaderList
from ktlsd.protocol.http1_syntax import HOST, MAX_FIELDS
from ktlsd.protocol.messages import SECRET_FIELDS, Request, holds_secret

_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE: Final = re.compile(rb"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?")
_PATH: Final = re.compile(rb"[\x21-\x7e\x80-\xff]+")
_CONNECTION_SPECIFIC: Final = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"))
_PSEUDO: Final = frozenset((b":method", b":scheme", b":authority", b":path"))
_SHORT: Final = 256  # bytes; longer values are not worth remembering
_MAX_TARGET: Final = 8_192  # bytes, as in HTTP/1.1; longer is 414


class MalformedRequest(Exception):
    """A request that RFC 9113 §8.1.1 calls malformed: its stream is reset."""


class _Understood(NamedTuple):
    method: str
    target: bytes
    host: bytes
    fields: tuple[tuple[bytes, bytes], ...]
    length: int | None


_understood: dict[tuple[tuple[bytes, bytes], ...], _Understood] = {}  # header lists come again and again
_REMEMBERED: Final = 1_024
_REMEMBERED_MAX: Final = 1_024  # bytes of a list, with 32 for each field


def request_of(headers: HeaderList, stream_id: int, *, whole: bool = True) -> tuple[Request, int | None]:
    """Return the request and its body's length, None if it isn't said. Raises MalformedRequest, RequestError.

    `whole`: nothing follows the header list; then the request names it, so that an equal one can be recognised.
    """
    key = tuple(headers)
    known = _understood.get(key)
    if known is None:
        known, size = _understand(headers)
        if size <= _REMEMBERED_MAX and not holds_secret(key):
            if len(_understood) >= _REMEMBERED:
                _understood.clear()
            _understood[key] = known
    if whole and known.length:
        raise MalformedRequest("content-length without content")
    fields = key if whole else None
    return Request(known.method, known.target, known.host, known.fields, "HTTP/2", stream_id, fields), known.length


def _understand(headers: HeaderList) -> tuple[_Understood, int]:
    """Return what a header list says, and its size (RFC 9113 §6.5.2)."""
    pseudo: dict[bytes, bytes] = {}
    fields: list[tuple[bytes, bytes]] = []
    size = 0
    for name, value in headers:
        size += len(name) + len(value) + 32
        if name[:1] == b":":
            if fields or name not in _PSEUDO or name in pseudo:
                raise MalformedRequest(f"pseudo-header {name[:40]!r}: unknown, repeated, or behind other fields")
            pseudo[name] = value
        else:
            remembered = len(value) <= _SHORT and name not in SECRET_FIELDS
            wrong = _wrong(name, value) if remembered else _wrong.__wrapped__(name, value)
            if wrong:
                raise MalformedRequest(f"field {name[:40]!r}: {wrong}")
            fields.append((name, value))
    method, target = _start_of(pseudo)
    length = _length_of(fields)
    host = _host_of(pseudo, fields)
    if size > MAX_HEADER_LIST or len(fields) > MAX_FIELDS:
        raise RequestError(431, f"The header is larger than {MAX_HEADER_LIST} bytes or has more than {MAX_FIELDS} fields.")
    if len(target) > _MAX_TARGET:
        raise RequestError(414, f"The path is longer than {_MAX_TARGET} bytes.")
    if not HOST.fullmatch(host):
        raise RequestError(400, "The authority is not a host.")
    for name, value in fields:
        if name == b"expect" and value.lower() != b"100-continue":
            raise RequestError(417, "The only expectation met here is 100-continue.")
    return _Understood(method.decode("ascii"), target, host, tuple(fields), length), size


@lru_cache(maxsize=2_048)
def _wrong(name: bytes, value: bytes) -> str:
    """Return what is wrong with a field, "" if nothing is (RFC 9113 §8.2.1, §8.2.2)."""
    if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
        return "not a lower-case token with a clean value"
    if name in _CONNECTION_SPECIFIC or (name == b"te" and value != b"trailers"):
        return "belongs to a connection of HTTP/1.1"
    return ""


def _start_of(pseudo: dict[bytes, bytes]) -> tuple[bytes, bytes]:
    """Return method and target (RFC 9113 §8.3.1, §8.5)."""
    method = pseudo.get(b":method", b"")
    if not _METHOD.fullmatch(method):
        raise MalformedRequest(":method is missing or not a token")
    if method == b"CONNECT":
        authority = pseudo.get(b":authority")
        if not authority or b":path" in pseudo or b":scheme" in pseudo:
            raise MalformedRequest("CONNECT has an authority, and neither scheme nor path")
        return method, authority
    scheme, path = pseudo.get(b":scheme", b""), pseudo.get(b":path", b"")
    if not _SCHEME.fullmatch(scheme):
        raise MalformedRequest(":scheme is missing or not one")
    if not _PATH.fullmatch(path) or not (path[:1] == b"/" or (path == b"*" and method == b"OPTIONS")):
        raise MalformedRequest(":path is missing or not a path")
    return method, path


_METHOD: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_SCHEME: Final = re.compile(rb"[A-Za-z][A-Za-z0-9+\-.]*")


def _length_of(fields: HeaderList) -> int | None:
    lengths = {value for name, value in fields if name == b"content-length"}
    if not lengths:
        return None
    value = lengths.pop()
    if lengths or not value.isdigit() or len(value) > 19:
        raise MalformedRequest("content-length is not one number")
    return int(value)


def _host_of(pseudo: dict[bytes, bytes], fields: HeaderList) -> bytes:
    """Return the authority; a Host field beside it has to say the same (RFC 9113 §8.3.1)."""
    authority = pseudo.get(b":authority")
    hosts = [value for name, value in fields if name == b"host"]
    if len(hosts) > 1 or (authority is not None and hosts and hosts[0].lower() != authority.lower()):
        raise MalformedRequest("host and :authority differ")
    host = authority if authority is not None else hosts[0] if hosts else None
    if host is None:
        raise RequestError(400, "There must be an authority.")
    if b"@" in host:
        raise MalformedRequest("the authority has userinfo")
    return host


def request_line(headers: HeaderList) -> bytes:
    """Return what the log says of a request that was refused."""
    said = dict(reversed(headers))
    return b"%s %s HTTP/2" % (said.get(b":method", b"-")[:32], said.get(b":path", b"-")[:256])
