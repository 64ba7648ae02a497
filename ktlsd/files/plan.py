"""From a request and the facts of an open file to a response: pure, and read from top to bottom."""

import html

from ktlsd.errors import RequestError
from ktlsd.protocol import semantics
from ktlsd.protocol.messages import Headers, Request, Response, reason_phrase
from ktlsd.protocol.semantics import ByteRange, Conditions, Path, Validators
from ktlsd.slices import FileSlice, OpenFile


def validators(file: OpenFile, now: int) -> Validators:
    """Return what identifies the file's present content: a strong tag of size and mtime, in whole seconds.

    Seconds, because that is what rsync keeps: a fleet of mirrors agrees on it. Last-Modified is never later than `now`
    (RFC 9110 §8.8.2.1).
    """
    modified = file.mtime_ns // 1_000_000_000
    return Validators(b'"%x-%x"' % (modified, file.size), min(modified, now))


def plan_file(request: Request, file: OpenFile, content_type: bytes, now: int) -> Response:
    """Return the answer to GET or HEAD for an open file: 200, 206, 304, 412 or 416. The body holds a reference to it.

    `now` is seconds since the epoch. HEAD gets GET's header exactly (RFC 9110 §9.3.2).
    """
    valid = validators(file, now)
    headers: Headers = [
        (b"Last-Modified", semantics.http_date(valid.modified)),
        (b"ETag", valid.etag),
        (b"Accept-Ranges", b"bytes"),
    ]
    status = semantics.evaluate(conditions(request), valid)
    if status == 304:
        return Response(304, headers, content_length=None)
    if status is not None:
        return plan_error(status, "The file is not the one the request's condition asks for.")
    wanted = _range(request, file, valid, now)
    if wanted == []:
        response = plan_error(416, "The file is shorter than that.")
        response.headers.append((b"Content-Range", b"bytes */%d" % file.size))
        return response
    headers.insert(0, (b"Content-Type", content_type))
    if wanted:
        (part,) = wanted
        headers.append((b"Content-Range", b"bytes %d-%d/%d" % (part.first, part.last, file.size)))
        return Response(206, headers, [FileSlice(file, part.first, part.length)], part.length)
    body = [FileSlice(file, 0, file.size)] if file.size else []
    return Response(200, headers, [*body], file.size)


def conditions(request: Request) -> Conditions:
    """Return the request's conditional fields."""
    return Conditions(
        request.header(b"if-match"),
        request.header(b"if-unmodified-since"),
        request.header(b"if-none-match"),
        request.header(b"if-modified-since"),
        request.header(b"if-range"),
    )


def _range(request: Request, file: OpenFile, valid: Validators, now: int) -> list[ByteRange] | None:
    """The one range to send; [] for 416; None for the whole file. Several ranges are answered with the whole file."""
    value = request.header(b"range")
    if value is None or request.method != "GET" or not semantics.range_applies(request.header(b"if-range"), valid, now):
        return None
    ranges = semantics.parse_ranges(value, file.size)
    return ranges if ranges is not None and len(ranges) <= 1 else None


def plan_redirect(request: Request, path: Path) -> Response:
    """Return 301 to the same path with a slash behind it; relative, so that no host name can be forged into it."""
    _, mark, query = request.target.partition(b"?")
    location = path.encoded(directory=True) + mark + query
    response = plan_error(301, "This is a directory; its address ends in a slash.")
    response.headers.append((b"Location", location))
    return response


def plan_options() -> Response:
    """Return the answer to OPTIONS: what can be asked."""
    return Response(204, [(b"Allow", semantics.ALLOW)], content_length=None)


def plan_error(status: int, detail: str) -> Response:
    """Return a short page that says what is wrong. `detail` is a sentence of ours; nothing of the request is echoed."""
    title = f"{status} {reason_phrase(status)}"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<h1>{title}</h1><p>{html.escape(detail)}</p></html>\n"
    ).encode()
    response = Response(status, [(b"Content-Type", b"text/html; charset=utf-8")], [page], len(page))
    if status == 405:
        response.headers.append((b"Allow", semantics.ALLOW))
    return response


def plan_refusal(error: RequestError) -> Response:
    """Return the answer to a request that could not be understood; the connection ends behind it."""
    response = plan_error(error.status, error.detail)
    response.close_connection = True
    return response
