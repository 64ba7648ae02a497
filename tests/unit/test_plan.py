import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktlsd.files import mime, plan
from ktlsd.protocol.messages import Request
from ktlsd.protocol.semantics import http_date, parse_path
from ktlsd.slices import FileSlice, OpenFile

MTIME, NOW = 1_700_000_000, 1_800_000_000
ETAG = b'"6553f100-64"'


def request(method="GET", **fields):
    headers = tuple((name.replace("_", "-").encode(), value) for name, value in fields.items())
    return Request(method, b"/f", b"x", headers, "HTTP/1.1", 1)


def planned(size=100, now=NOW, shown=None, **kwargs):
    file = OpenFile(3, size, MTIME * 10**9 + 5, close_fd=lambda fd: None)
    shown = plan.Representation(file, b"text/plain", **(shown or {}))
    return plan.plan_file(request(**kwargs), shown, now, boundary=b"BOUNDARY")


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
     {"range": b",".join([b"bytes=0-1"] + [b"5-6"] * 16)}, {"range": b"bytes=0-1", "method": "HEAD"}],
)  # fmt: skip
def test_ranges_that_are_ignored(fields):
    assert planned(**fields).status == 200


def test_several_ranges_are_parts_of_exact_length():
    response = planned(size=1000, range=b"bytes=900-909, 0-9,-5")
    assert header(response, b"Content-Type") == b"multipart/byteranges; boundary=BOUNDARY"
    assert header(response, b"Content-Range") is None
    heads = [part for part in response.body if isinstance(part, bytes)]
    slices = [(part.offset, part.length) for part in response.body if isinstance(part, FileSlice)]
    assert slices == [(900, 10), (0, 10), (995, 5)], "in the order in which they were asked for"
    assert heads[0] == b"--BOUNDARY\r\nContent-Type: text/plain\r\nContent-Range: bytes 900-909/1000\r\n\r\n"
    assert heads[-1] == b"\r\n--BOUNDARY--\r\n"
    assert response.content_length == sum(map(len, response.body))


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        (b"bytes=0-9,5-14", [(0, 15)]),
        (b"bytes=0-0,1-1,2-2", [(0, 3)]),
        (b"bytes=0-9,50-59", [(0, 60)]),
        (b"bytes=500-509,0-9,505-600", [(500, 101), (0, 10)]),
        (b"bytes=0-,0-,0-,0-", [(0, 1000)]),
        (b"bytes=5000-,0-0", [(0, 1)]),
    ],
)
def test_overlapping_and_near_ranges_become_one(asked, got):
    response = planned(size=1000, range=asked)
    assert [(part.offset, part.length) for part in response.body if isinstance(part, FileSlice)] == got
    assert (header(response, b"Content-Range") is not None) == (len(got) == 1)


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60)), min_size=1, max_size=16))
def test_ranges_never_add_up_to_more_than_the_file(pairs):
    size = 300
    asked = [(first, first + more) for first, more in pairs]
    response = planned(size=size, range=b"bytes=" + b",".join(b"%d-%d" % pair for pair in asked))
    wanted = {position for first, last in asked for position in range(first, min(last, size - 1) + 1)}
    if not wanted:
        assert response.status == 416
        return
    slices = [(part.offset, part.length) for part in response.body if isinstance(part, FileSlice)]
    sent = [position for offset, length in slices for position in range(offset, offset + length)]
    assert len(sent) == len(set(sent)) <= size
    assert wanted <= set(sent)


def test_a_digest_is_the_tag_and_is_told_to_those_who_ask():
    shown = {"digest": plan.Digest(bytes(range(32)), is_exact=True, is_proven=True)}
    tag = b'"sha256-%s"' % bytes(range(32)).hex().encode()
    response = planned(shown=shown)
    assert header(response, b"ETag") == tag
    assert header(response, b"Repr-Digest") is None
    digest = b"sha-256=:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=:"
    for wanted in (b"sha-256=10", b"sha-512=3, sha-256=1", b"sha-256"):
        assert header(planned(shown=shown, want_repr_digest=wanted), b"Repr-Digest") == digest
        assert header(planned(shown=shown, want_repr_digest=wanted, range=b"bytes=0-1"), b"Repr-Digest") == digest
    assert header(planned(shown={**shown, "offer_digest": True}), b"Repr-Digest") == digest
    for unwanted in (b"sha-256=0", b"sha-512=10", b"", b"unixsum=3"):
        assert header(planned(shown=shown, want_repr_digest=unwanted), b"Repr-Digest") is None
    assert planned(shown=shown, if_none_match=tag).status == 304


def test_another_coding_has_another_tag_and_vary():
    response = planned(shown={"encoding": b"gzip", "varies": True})
    assert header(response, b"ETag") == ETAG[:-1] + b'-gzip"'
    assert header(response, b"Content-Encoding") == b"gzip"
    assert header(response, b"Vary") == b"Accept-Encoding"
    assert header(planned(shown={"varies": True}, if_none_match=ETAG), b"Vary") == b"Accept-Encoding"
    assert planned(shown={"encoding": b"gzip"}, range=b"bytes=0-1", if_range=ETAG).status == 200, "of the other form"


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
    response = plan.plan_redirect_to_directory(wanted, parse_path(wanted.target))
    assert header(response, b"Location") == b"/evil.example/%20dir/?q=1"


def test_errors_are_json_for_those_who_prefer_it():
    response = plan.plan_error(404, "It's gone", request(accept=b"application/json"))
    assert header(response, b"Content-Type") == b"application/json"
    assert json.loads(response.body[0]) == {"status": 404, "error": "Not Found", "detail": "It's gone"}
    assert header(plan.plan_error(404, "x", request(accept=b"*/*")), b"Content-Type").startswith(b"text/html")


def test_error_pages_echo_nothing():
    assert b"&lt;" in plan.plan_error(400, "<b>").body[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [(b"a.HTML", b"text/html; charset=utf-8"), (b"x.tar.gz", b"application/gzip"), (b"model.safetensors", mime.DEFAULT),
     (b"README", mime.DEFAULT), (b".", mime.DEFAULT), (b"a.mp4", b"video/mp4")],
)  # fmt: skip
def test_content_types(name, expected):
    assert mime.content_type(name) == expected
