"""Heads of HTTP/1.1: a request's read line by line (RFC 9112 §3, §5), where each rule has its own answer and status, and a
response's written. Pure functions.
"""

import re
from typing import Final, NamedTuple

from ktlsd.errors import RequestError
from ktlsd.protocol.messages import Response, holds_secret, reason_phrase

END: Final = b"Connection: close\r\n"  # of a response's head, behind which the connection ends
MAX_REQUEST_LINE: Final = 8_192  # bytes; longer is 414
MAX_HEAD: Final = 32_768  # bytes of request line and fields; longer is 431
MAX_FIELDS: Final = 100
_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE: Final = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e\x80-\xff]+) HTTP/(\d)\.(\d)")
# No part of it overlaps another: blanks are stripped afterwards, backtracking over them would be cubic.
_FIELD: Final = re.compile(rb"(" + _TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)")
HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9\-._~!$&'()*+,;=%]*)(?::\d{0,5})?")


def parse_request_line(line: bytes) -> tuple[bytes, bytes, bool]:
    """Return method, target and whether it is HTTP/1.0. Raises RequestError: 400 if malformed, 505 for another version."""
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise RequestError(400, "The request line is not METHOD TARGET HTTP/1.1.")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise RequestError(505, "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    return method, target, minor == b"0"


def parse_fields(rest: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """Return the field lines, names in lower case. Raises RequestError: 400 for a malformed one, 431 for too many."""
    if not rest:
        return ()
    lines = rest.split(b"\r\n")
    if len(lines) > MAX_FIELDS:
        raise RequestError(431, f"There are more than {MAX_FIELDS} header fields.")
    headers = []
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            raise RequestError(400, "A header line is malformed.")
        name, value = match.groups()
        headers.append((name.lower(), value.strip(b" \t")))
    return tuple(headers)


def target_and_host(method: bytes, target: bytes, values: dict[bytes, list[bytes]], *, http10: bool) -> tuple[bytes, bytes]:
    """Return the target in origin-form (or "*") and the host it is for (RFC 9112 §3.2). Raises RequestError(400)."""
    hosts = values.get(b"host", [])
    if len(hosts) > 1 or (not hosts and not http10):
        raise RequestError(400, "There must be exactly one Host field.")
    host = hosts[0] if hosts else b""
    if not HOST.fullmatch(host):
        raise RequestError(400, "The Host field is not a host.")
    if target.startswith(b"/"):
        return target, host
    if method == b"CONNECT":  # authority-form, RFC 9112 §3.2.3
        if not HOST.fullmatch(target):
            raise RequestError(400, "The target of CONNECT is not HOST:PORT.")
        return target, target
    if target == b"*":
        if method != b"OPTIONS":
            raise RequestError(400, "The target * is for OPTIONS only.")
        return target, host
    scheme, separator, rest = target.partition(b"://")
    if separator and scheme.lower() in (b"http", b"https"):
        cut = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
        authority, path = rest[:cut], rest[cut:]
        if not authority or not HOST.fullmatch(authority):
            raise RequestError(400, "The target's host is not a host.")
        return path if path.startswith(b"/") else b"/" + path, authority
    raise RequestError(400, "The target is neither a path nor an http(s) URL.")


class Understood(NamedTuple):
    """A head, understood. `values` are the fields by name if the request has, or claims, a body; None if it has none."""

    method: str
    target: bytes
    host: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    http10: bool
    persistent: bool  # the connection goes on afterwards, as far as the client is concerned (RFC 9112 §9.3)
    expectation: list[bytes] | None
    values: dict[bytes, list[bytes]] | None


_understood: dict[bytes, Understood] = {}  # heads come again and again, byte for byte
_REMEMBERED: Final = 1_024
_REMEMBERED_MAX: Final = 1_024  # bytes of a head


def understand(head: bytes) -> Understood:
    """Return what a head without its empty line says. Raises RequestError."""
    known = _understood.get(head)
    if known is not None:
        return known
    line, _, rest = head.partition(b"\r\n")
    if len(line) > MAX_REQUEST_LINE:
        raise RequestError(414, f"The request line is longer than {MAX_REQUEST_LINE} bytes.")
    if len(head) > MAX_HEAD:
        raise RequestError(431, f"The header is larger than {MAX_HEAD} bytes.")
    method, target, http10 = parse_request_line(line)
    headers = parse_fields(rest)
    values: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        values.setdefault(name, []).append(value)
    target, host = target_and_host(method, target, values, http10=http10)
    options = {option.strip().lower() for value in values.get(b"connection", []) for option in value.split(b",")}
    persistent = b"close" not in options and (not http10 or b"keep-alive" in options)
    body = values if b"content-length" in values or b"transfer-encoding" in values else None
    made = Understood(method.decode("ascii"), target, host, headers, http10, persistent, values.get(b"expect"), body)
    if len(head) <= _REMEMBERED_MAX and not holds_secret(headers, target):
        if len(_understood) >= _REMEMBERED:
            _understood.clear()
        _understood[head] = made
    return made


def plain_answer(request: bytes) -> bytes:
    """Return the whole answer, in the clear, to a client that spoke HTTP where TLS is expected: 400 with the right address."""
    line, _, rest = request.partition(b"\r\n")
    where = b"https://"
    try:
        method, target, http10 = parse_request_line(line)
        fields = parse_fields(rest.partition(b"\r\n\r\n")[0])
        values: dict[bytes, list[bytes]] = {}
        for name, value in fields:
            values.setdefault(name, []).append(value)
        target, host = target_and_host(method, target, values, http10=http10)
        if host and target.startswith(b"/"):
            where += host + target
    except RequestError:
        pass  # not even that is right; the advice is
    page = b"This port speaks HTTPS. Use " + where + b"\n"
    return (
        b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\n"
        b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(page), page)
    )


def write_head(response: Response, end: bytes = b"") -> bytes:
    """Return a response's head with the empty line; `end` is fields in the form they have on the wire."""
    lines = [b"HTTP/1.1 %d %s\r\n" % (response.status, reason_phrase(response.status).encode("ascii"))]
    lines += [b"%s: %s\r\n" % header for header in response.headers]
    if response.content_length is not None:
        lines.append(b"Content-Length: %d\r\n" % response.content_length)
    return b"".join((*lines, end, b"\r\n"))
