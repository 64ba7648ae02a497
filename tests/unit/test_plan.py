import pytest

from ktlsd.files import mime, plan
from ktlsd.protocol.messages import Request
from ktlsd.protocol.semantics import http_date, parse_path
from ktlsd.slices import FileSlice, OpenFile

MTIME, NOW = 1_700_000_000, 1_800_000_000
ETAG = b'"6553f100-64"'


def request(method="GET", **fields):
    headers = tuple((name.replace("_", "-").encode(), value) for name, value in fields.items())
    return Request(method, b"/f", b"x", headers, "HTTP/1.1", 1)


def planned(size=100, now=NOW, **kwargs):
    file = OpenFile(3, size, MTIME * 10**9 + 5, close_fd=lambda fd: None)
    return plan.plan_file(request(**kwargs), file, b"text/plain", now)


def header(response, name):
    values = [value for key, value in response.headers if key == name]
    assert len(values) <= 1
    return values[0] if values else None


def test_whole_file():
    response = planned()
    (body,) = response.body
    assert (response.status, response.content_length, body.offset, body.length) == (200, 100, 0, 100)
    assert header(response, b"ETag") == ETAG
    assert header(response, b"Last-Modified") == http_date(MTIME)
    assert header(response, b"Accept-Ranges") == b"bytes"


def test_single_range():
    response = planned(range=b"bytes=10-19")
    (body,) = response.body
    assert isinstance(body, FileSlice)
    assert (response.status, response.content_length, body.offset, body.length) == (206, 10, 10, 10)
    assert header(response, b"Content-Range") == b"bytes 10-19/100"


def test_unsatisfiable_range():
    response = planned(range=b"bytes=100-")
    assert (response.status, header(response, b"Content-Range")) == (416, b"bytes */100")


@pytest.mark.parametrize(
    "fields",
    [{"range": b"bytes=1-2", "if_range": b'"other"'}, {"range": b"chapters=1-2"}, {"range": b"bytes=x"},
     {"range": b"bytes=0-1,5-6"}, {"range": b"bytes=0-1", "method": "HEAD"}],
)  # fmt: skip
def test_ranges_that_are_ignored(fields):
    assert planned(**fields).status == 200


def test_not_modified_has_validators_and_no_body():
    response = planned(if_none_match=ETAG, range=b"bytes=0-1")
    assert (response.status, response.body, response.content_length) == (304, [], None)
    assert header(response, b"ETag") == ETAG


def test_precondition_failed():
    assert planned(if_match=b'"other"').status == 412


def test_empty_file():
    response = planned(size=0)
    assert (response.status, response.body, response.content_length) == (200, [], 0)
    assert planned(size=0, range=b"bytes=0-").status == 416


def test_last_modified_is_never_in_the_future():
    assert header(planned(now=MTIME - 1000), b"Last-Modified") == http_date(MTIME - 1000)


def test_redirect_is_relative_and_keeps_the_query():
    wanted = Request("GET", b"//evil.example/%20dir?q=1", b"x", (), "HTTP/1.1", 1)
    response = plan.plan_redirect(wanted, parse_path(wanted.target))
    assert header(response, b"Location") == b"/evil.example/%20dir/?q=1"


def test_error_pages_echo_nothing():
    assert b"&lt;" in plan.plan_error(400, "<b>").body[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [(b"a.HTML", b"text/html; charset=utf-8"), (b"x.tar.gz", b"application/gzip"), (b"model.safetensors", mime.DEFAULT),
     (b"README", mime.DEFAULT), (b".", mime.DEFAULT), (b"a.mp4", b"video/mp4")],
)  # fmt: skip
def test_content_types(name, expected):
    assert mime.content_type(name) == expected
