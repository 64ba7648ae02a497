"""From a request and the facts of an open file to a response: pure, and read from top to bottom."""

import base64
import html
import json
from dataclasses import dataclass
from typing import Final

from ktlsd.errors import RequestError
from ktlsd.files.multipart import byteranges
from ktlsd.protocol import semantics
from ktlsd.protocol.messages import Headers, Request, Response, reason_phrase
from ktlsd.protocol.negotiation import prefers_json
from ktlsd.protocol.semantics import ByteRange, Conditions, Path, Validators
from ktlsd.slices import FileSlice, OpenFile

_PREFERENCES: Final = frozenset(b"%d" % number for number in range(1, 11))  # of Want-Repr-Digest; 0 is no
_HINTS: Final = {
    400: "The request could not be understood.",
    404: "Look at the address again; names here are case-sensitive.",
    408: "Send the request again.",
    503: "Try again in a moment.",
}


@dataclass(frozen=True, slots=True)
class Digest:
    """A SHA-256 (32 bytes) that somebody has computed before.

    `is_exact`: for a file of exactly this size and time, so that it identifies the content by itself. `is_proven`: nothing
    has touched the file since, so that it may be told as the file's.
    """

    sha256: bytes
    is_exact: bool = False
    is_proven: bool = False


@dataclass(frozen=True, slots=True)
class Representation:
    """What a path stands for, in the form this client gets it."""

    file: OpenFile
    content_type: bytes
    encoding: bytes = b""  # content coding of a precompressed sibling
    varies: bool = False  # other clients may get another form
    digest: Digest | None = None  # where one is known
    offer_digest: bool = False  # send it unasked


def validators(shown: Representation, now: int) -> Validators:
    """Return what identifies the present content: a strong tag, and the time of the last change.

    The tag is the digest where one is known (with size and mtime, if it might be another version's), else size and mtime in
    whole seconds, because that is what rsync keeps: a fleet of mirrors agrees on it. A precompressed form has a tag of its
    own. Last-Modified is never later than `now` (RFC 9110 §8.8.2.1).
    """
    modified = shown.file.mtime_ns // 1_000_000_000
    tag = b"%x-%x" % (modified, shown.file.size)
    if shown.digest is not None:
        known = b"sha256-" + shown.digest.sha256.hex().encode()
        tag = known if shown.digest.is_exact else known + b"-" + tag
    coding = b"-" + shown.encoding if shown.encoding else b""
    return Validators(b'"%s%s"' % (tag, coding), min(modified, now))


def plan_file(request: Request, shown: Representation, now: int, *, boundary: bytes) -> Response:
    """Return the answer to GET or HEAD for an open file: 200, 206, 304, 412 or 416. The body holds references to it.

    `now` is seconds since the epoch; `boundary` is random, for a multipart answer. HEAD gets GET's header exactly (RFC 9110
    §9.3.2), 304 has the validators and Vary (§15.4.5).
    """
    file, valid = shown.file, validators(shown, now)
    headers: Headers = [
        (b"Last-Modified", semantics.http_date(valid.modified)),
        (b"ETag", valid.etag),
        (b"Accept-Ranges", b"bytes"),
    ]
    if shown.varies:
        add_vary(headers, b"Accept-Encoding")
    status = semantics.evaluate(conditions(request), valid)
    if status == 304:
        return Response(304, headers, content_length=None)
    if status is not None:
        return plan_error(status, "The file is not the one the request's condition asks for.", request)
    wanted = _ranges(request, file, valid, now)
    if wanted == []:
        response = plan_error(416, f"The file has {file.size} bytes; the range lies outside.", request)
        response.headers += ((b"Content-Range", b"bytes */%d" % file.size), (b"Accept-Ranges", b"bytes"))
        return response
    content_type = (b"Content-Type", shown.content_type)
    if shown.encoding:
        headers.append((b"Content-Encoding", shown.encoding))
    digest = shown.digest
    if digest is not None and digest.is_proven and (shown.offer_digest or _wants_digest(request)):
        headers.append((b"Repr-Digest", b"sha-256=:%s:" % base64.b64encode(digest.sha256)))
    if wanted is None:
        body = [FileSlice(file, 0, file.size)] if file.size else []
        return Response(200, [content_type, *headers], [*body], file.size)
    if len(wanted) == 1:
        (part,) = wanted
        headers.append((b"Content-Range", b"bytes %d-%d/%d" % (part.first, part.last, file.size)))
        return Response(206, [content_type, *headers], [FileSlice(file, part.first, part.length)], part.length)
    parts, length = byteranges(file, wanted, shown.content_type, boundary)
    content_type = (b"Content-Type", b"multipart/byteranges; boundary=" + boundary)
    return Response(206, [content_type, *headers], parts, length)


_UNCONDITIONAL: Final = Conditions(None, None, None, None, None)


def conditions(request: Request) -> Conditions:
    """Return the request's conditional fields."""
    if not any(name[:3] == b"if-" for name, _ in request.headers):
        return _UNCONDITIONAL
    return Conditions(
        request.header(b"if-match"),
        request.header(b"if-unmodified-since"),
        request.header(b"if-none-match"),
        request.header(b"if-modified-since"),
        request.header(b"if-range"),
    )


def _ranges(request: Request, file: OpenFile, valid: Validators, now: int) -> list[ByteRange] | None:
    """The ranges to send; [] for 416; None for the whole file."""
    value = request.header(b"range")
    if value is None or request.method != "GET" or not semantics.range_applies(request.header(b"if-range"), valid, now):
        return None
    ranges = semantics.parse_ranges(value, file.size)
    return ranges if ranges is None else semantics.coalesce(ranges)


def _wants_digest(request: Request) -> bool:
    """Whether Want-Repr-Digest (RFC 9530 §4) asks for sha-256: a preference from 1 to 10, 0 is no."""
    value = request.header(b"want-repr-digest")
    if value is None:
        return False
    for member in value.split(b","):
        key, equals, preference = member.strip(b" \t").partition(b"=")
        if key == b"sha-256":
            return not equals or preference.strip(b" \t") in _PREFERENCES
    return False


def add_vary(headers: Headers, name: bytes) -> None:
    """Add a field's name to Vary."""
    for at, (key, value) in enumerate(headers):
        if key.lower() == b"vary":
            headers[at] = (key, value + b", " + name)
            return
    headers.append((b"Vary", name))


def plan_redirect_to_directory(request: Request, path: Path) -> Response:
    """Return 301 to the same path with a slash behind it; relative, so that no host name can be forged into it."""
    _, mark, query = request.target.partition(b"?")
    location = path.encoded(directory=True) + mark + query
    return plan_redirect(request, 301, location, "This is a directory; its address ends in a slash.")


def plan_redirect(request: Request, status: int, location: bytes, detail: str) -> Response:
    """Return a redirect; what is no visible ASCII in `location` is percent-encoded."""
    response = plan_error(status, detail, request)
    response.headers.append((b"Location", b"".join(bytes([c]) if 0x21 <= c <= 0x7E else b"%%%02X" % c for c in location)))
    return response


def plan_options() -> Response:
    """Return the answer to OPTIONS: what can be asked."""
    return Response(204, [(b"Allow", semantics.ALLOW)], content_length=None)


def plan_error(status: int, detail: str, request: Request | None = None) -> Response:
    """Return a short page that says what is wrong, as JSON where the request prefers it.

    `detail` is a sentence of ours; nothing of the request is echoed, nothing of the server told.
    """
    phrase = reason_phrase(status)
    if request is not None and prefers_json(request.header(b"accept")):
        page = json.dumps({"status": status, "error": phrase, "detail": detail}).encode() + b"\n"
        content_type = b"application/json"
    else:
        page, content_type = _error_page(status, phrase, detail), b"text/html; charset=utf-8"
    response = Response(status, [(b"Content-Type", content_type)], [page], len(page))
    if request is not None:
        response.headers.append((b"Vary", b"Accept"))
    if status == 405:
        response.headers.append((b"Allow", semantics.ALLOW))
    if status == 503:
        response.headers.append((b"Retry-After", b"2"))
    return response


def _error_page(status: int, phrase: str, detail: str) -> bytes:
    hint = _HINTS.get(status, "")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{status} {phrase}</title><style>:root{{color-scheme:light dark;font:1rem/1.5 system-ui,sans-serif}}"
        "body{max-width:36rem;margin:4rem auto;padding:0 1rem}</style>"
        f"<h1>{status} {phrase}</h1><p>{html.escape(detail)}</p>{f'<p>{hint}</p>' if hint else ''}</html>\n"
    ).encode()


def plan_refusal(error: RequestError) -> Response:
    """Return the answer to a request that could not be understood; the connection ends behind it."""
    response = plan_error(error.status, error.detail)
    response.close_connection = True
    return response
