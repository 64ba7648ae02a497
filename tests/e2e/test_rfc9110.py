"""RFC 9110, each obligation by name, asked of a running server in every mode."""

import email.utils
import gzip
import os
import random
import re
import time

import pytest

from tests.client import Client
from tests.e2e.modes import MODES, kernel_of
from tests.serving import ThreadServer

CONTENT = random.Random(3).randbytes(100_000)
OLD = 1_700_000_000


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    (folder / "file").write_bytes(CONTENT)
    (folder / "empty").write_bytes(b"")
    (folder / "dir").mkdir()
    (folder / "dir/index.html").write_bytes(b"index")
    (folder / "a b?").mkdir()
    (folder / "page.html").write_bytes(b"<p>page</p>" * 100)
    (folder / "page.html.gz").write_bytes(gzip.compress(b"<p>page</p>" * 100))
    (folder / "page.html.zst").write_bytes(b"zstd of page")
    (folder / "lone.css").write_bytes(b"css")
    (folder / "x.tar").write_bytes(b"tar")
    (folder / "x.tar.gz").write_bytes(b"tar.gz")
    (folder / "stale.txt").write_bytes(b"new")
    (folder / "stale.txt.gz").write_bytes(b"old")
    for name in os.listdir(folder):
        os.utime(folder / name, (OLD, OLD))
    os.utime(folder / "stale.txt", (OLD + 10, OLD + 10))
    return folder


@pytest.fixture(scope="module", params=MODES)
def server(request, root):
    with ThreadServer(root, kernel_of(request.param), handover_bytes=0) as running:
        yield running


@pytest.fixture
def client(server):
    peer = Client(server.port)
    yield peer
    peer.close()


def head(client, target, **fields):
    lines = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in fields.items())
    client.send(f"HEAD {target} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())
    return client.reply(body=False)


@pytest.fixture
def tag(client):
    return client.get("/file").headers["etag"]


DATE = email.utils.formatdate(OLD, usegmt=True)
LATER = email.utils.formatdate(OLD + 100, usegmt=True)
EARLIER = email.utils.formatdate(OLD - 100, usegmt=True)


# --- preconditions (§13) --------------------------------------------------------------------------------------------------


def test_precedence_of_preconditions(client, tag):
    """If-Match > If-Unmodified-Since > If-None-Match > If-Modified-Since > If-Range."""
    assert client.get("/file", If_Match=tag, If_Unmodified_Since=EARLIER).status == 200
    assert client.get("/file", If_Match='"other"', If_None_Match=tag).status == 412
    assert client.get("/file", If_Unmodified_Since=EARLIER, If_None_Match=tag).status == 412
    assert client.get("/file", If_Match=tag, If_None_Match=tag).status == 304
    assert client.get("/file", If_None_Match=tag, Range="bytes=0-1").status == 304
    assert client.get("/file", If_Modified_Since=DATE, Range="bytes=0-1", If_Range='"other"').status == 304


def test_if_none_match_present_means_if_modified_since_is_ignored(client, tag):
    assert client.get("/file", If_None_Match='"other"', If_Modified_Since=LATER).status == 200
    assert client.get("/file", If_None_Match=tag, If_Modified_Since=EARLIER).status == 304


def test_if_none_match_is_weak_and_takes_lists_and_the_star(client, tag):
    for value in (tag, f"W/{tag}", f'"a", {tag}, "b"', f'W/"x",W/{tag}', "*"):
        assert client.get("/file", If_None_Match=value).status == 304, value
    assert client.get("/file", If_None_Match='"a", "b"').status == 200


def test_if_match_is_strong(client, tag):
    for value in (tag, f'"a", {tag}', "*"):
        assert client.get("/file", If_Match=value).status == 200
    for value in (f"W/{tag}", '"other"'):
        assert client.get("/file", If_Match=value).status == 412


def test_if_modified_since_and_if_unmodified_since(client):
    assert client.get("/file", If_Modified_Since=DATE).status == 304
    assert client.get("/file", If_Modified_Since=EARLIER).status == 200
    assert client.get("/file", If_Modified_Since="yesterday").status == 200
    assert client.get("/file", If_Unmodified_Since=DATE).status == 200
    assert client.get("/file", If_Unmodified_Since=EARLIER).status == 412


def test_if_range_is_strong_and_dates_match_exactly(client, tag):
    part = {"Range": "bytes=0-1"}
    for value in (tag, DATE):
        assert client.get("/file", If_Range=value, **part).status == 206
    for value in (f"W/{tag}", '"other"', LATER, EARLIER, "nonsense"):
        assert client.get("/file", If_Range=value, **part).status == 200


def test_a_date_is_no_strong_validator_within_its_second(server, root):
    (root / "fresh").write_bytes(b"fresh")
    now = int(time.time()) + 5
    os.utime(root / "fresh", (now, now))
    peer = Client(server.port)
    reply = peer.get("/fresh")
    assert peer.get("/fresh", Range="bytes=0-1", If_Range=reply.headers["last-modified"]).status == 200
    peer.close()


def test_not_modified_carries_what_the_200_would_and_no_body(client, tag):
    reply = client.get("/file", If_None_Match=tag)
    assert (reply.status, reply.body, "content-length" in reply.headers) == (304, b"", False)
    assert {"date", "etag", "last-modified"} <= reply.headers.keys()
    page = client.get("/page.html", Accept_Encoding="gzip")
    again = client.get("/page.html", Accept_Encoding="gzip", If_None_Match=page.headers["etag"])
    assert (again.status, again.headers["vary"], again.headers["etag"]) == (304, "Accept-Encoding", page.headers["etag"])


# --- ranges (§14) ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=99999-", 99_999, 99_999),
        ("bytes=5-500000", 5, 99_999),
        ("bytes=-1", 99_999, 99_999),
        ("bytes=-500000", 0, 99_999),
        ("Bytes=1-2", 1, 2),
        ("bytes= 1-2", 1, 2),
        ("bytes=,1-2,", 1, 2),
    ],
)
def test_ranges_are_clamped(client, value, first, last):
    reply = client.get("/file", Range=value)
    assert (reply.status, reply.body) == (206, CONTENT[first : last + 1])
    assert reply.headers["content-range"] == f"bytes {first}-{last}/100000"
    assert reply.headers["content-length"] == str(last - first + 1)


@pytest.mark.parametrize("value", ["chapters=1-2", "bytes=x", "bytes=2-1", "bytes", "bytes=", "bytes=1-2;x", "bytes=1 - 2"])
def test_a_range_that_is_not_understood_is_ignored(client, value):
    assert client.get("/file", Range=value).status == 200


def test_a_range_counts_for_get_only(client):
    assert head(client, "/file", Range="bytes=0-1").status == 200


@pytest.mark.parametrize(("target", "value", "size"), [
    ("/file", "bytes=100000-", 100_000), ("/file", "bytes=-0", 100_000), ("/empty", "bytes=0-", 0), ("/empty", "bytes=-5", 0),
])  # fmt: skip
def test_unsatisfiable_ranges(client, target, value, size):
    reply = client.get(target, Range=value)
    assert (reply.status, reply.headers["content-range"]) == (416, f"bytes */{size}")


def parts_of(reply):
    boundary = reply.headers["content-type"].partition("boundary=")[2].encode()
    assert reply.headers["content-type"].startswith("multipart/byteranges; boundary=")
    assert len(reply.body) == int(reply.headers["content-length"])
    pieces = (b"\r\n" + reply.body).split(b"\r\n--" + boundary)
    assert (pieces[0], pieces[-1]) == (b"", b"--\r\n")
    parts = []
    for piece in pieces[1:-1]:
        fields, _, data = piece.partition(b"\r\n\r\n")
        first, last = map(int, re.search(rb"Content-Range: bytes (\d+)-(\d+)/100000", fields).groups())
        parts.append((first, last, data))
    return parts


def test_several_ranges_come_in_parts_of_exact_length(client):
    reply = client.get("/file", Range="bytes=90000-99999, 0-9,-5,20000-50000")
    assert reply.status == 206
    assert "content-range" not in reply.headers
    parts = parts_of(reply)
    assert [(first, last) for first, last, _ in parts] == [(90_000, 99_999), (0, 9), (20_000, 50_000)]
    assert all(data == CONTENT[first : last + 1] for first, last, data in parts)
    again = client.get("/file", Range="bytes=0-0,500-500")
    assert parts_of(again)[0][2] == CONTENT[:1]
    assert again.headers["content-type"] != reply.headers["content-type"], "a boundary that can be guessed can be in a file"


def test_overlapping_ranges_never_make_more_than_the_file(client):
    everything = client.get("/file", Range="bytes=" + ",".join(["0-"] * 16))
    assert (everything.status, everything.body) == (206, CONTENT)
    assert everything.headers["content-range"] == "bytes 0-99999/100000", "one that is left is a plain 206"
    assert client.get("/file", Range="bytes=" + ",".join(f"{n}-{n}" for n in range(0, 34_000, 2000))).status == 200, "17"


# --- methods (§9) ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/file", "/empty", "/dir/", "/dir", "/nothing", "/page.html", "/a%20b%3F/", "/%zz"])
@pytest.mark.parametrize("fields", [{}, {"If_None_Match": "*"}, {"If_Match": '"x"'}, {"Accept_Encoding": "gzip"}])
def test_head_has_gets_header_exactly(client, target, fields):
    got = client.get(target, **fields)
    reply = head(client, target, **fields)
    same = {"date", "content-type"} if "multipart" in got.headers.get("content-type", "") else {"date"}
    assert {k: v for k, v in reply.headers.items() if k not in same} == {k: v for k, v in got.headers.items() if k not in same}
    assert reply.status == got.status
    assert client.get("/dir/").body == b"index", "no body was left on the connection"


def say(client, method, target, extra=""):
    client.send(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n{extra}\r\n".encode())
    return client.reply()


def test_methods(client):
    assert say(client, "OPTIONS", "*").headers["allow"] == "GET, HEAD, OPTIONS"
    assert say(client, "OPTIONS", "/file").status == 204
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "POST"):
        reply = say(client, method, "/file", "Content-Length: 0\r\n")
        assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
    assert say(client, "BREW", "/file").status == 501
    assert say(client, "get", "/file").status == 501, "methods are case-sensitive"


def test_expectations(client):
    client.send(b"POST /file HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    reply = client.reply()
    assert (reply.status, reply.headers["connection"]) == (405, "close"), "whether a body follows nobody can tell"


def test_expectations_without_a_body(client):
    assert client.get("/file", Expect="100-continue").status == 200, "no body, so nothing to wait for"
    assert client.get("/file", Expect="a miracle").status == 417


def test_an_unknown_expectation_of_a_request_with_a_body_is_417_too(client):
    client.send(b"POST /file HTTP/1.1\r\nHost: x\r\nExpect: a miracle\r\nContent-Length: 5\r\n\r\n12345")
    assert client.reply().status == 417


def test_a_get_that_waits_for_100_continue_gets_it(client):
    client.send(b"GET /file HTTP/1.1\r\nHost: x\r\nExpect: 100-Continue\r\nContent-Length: 5\r\n\r\n")
    assert client.head()[0] == 100
    client.send(b"12345")
    assert client.reply().body == CONTENT
    assert client.get("/dir/").body == b"index"


# --- negotiation (§12) ------------------------------------------------------------------------------------------------------


def test_precompressed_siblings_are_negotiated(client):
    plain = client.get("/page.html")
    packed = client.get("/page.html", Accept_Encoding="gzip")
    other = client.get("/page.html", Accept_Encoding="gzip, zstd")
    assert plain.body == gzip.decompress(packed.body) == b"<p>page</p>" * 100
    assert other.body == b"zstd of page"
    assert [r.headers.get("content-encoding") for r in (plain, packed, other)] == [None, "gzip", "zstd"]
    assert {r.headers["vary"] for r in (plain, packed, other)} == {"Accept-Encoding"}
    assert len({r.headers["etag"] for r in (plain, packed, other)}) == 3
    assert {r.headers["content-type"] for r in (plain, packed, other)} == {"text/html; charset=utf-8"}


def test_q_0_and_identity_q_0_are_honoured(client):
    assert "content-encoding" not in client.get("/page.html", Accept_Encoding="gzip;q=0, zstd;q=0").headers
    assert client.get("/page.html", Accept_Encoding="gzip, identity;q=0").headers["content-encoding"] == "gzip"
    assert client.get("/page.html", Accept_Encoding="br, identity;q=0").status == 406
    assert client.get("/lone.css", Accept_Encoding="identity;q=0, gzip").status == 406
    assert "vary" not in client.get("/lone.css", Accept_Encoding="gzip").headers


def test_ranges_apply_to_the_form_that_was_chosen(client):
    packed = client.get("/page.html", Accept_Encoding="gzip")
    part = client.get("/page.html", Accept_Encoding="gzip", Range="bytes=3-9", If_Range=packed.headers["etag"])
    assert (part.status, part.body) == (206, packed.body[3:10])
    plain = client.get("/page.html", Range="bytes=3-9", If_Range=packed.headers["etag"])
    assert (plain.status, len(plain.body)) == (200, 1100), "a part of one form must not be glued to another's"


def test_an_archive_is_never_taken_for_a_coding_of_another_file(client):
    assert client.get("/x.tar", Accept_Encoding="gzip").body == b"tar"
    reply = client.get("/x.tar.gz", Accept_Encoding="gzip")
    assert (reply.body, reply.headers["content-type"]) == (b"tar.gz", "application/gzip")
    assert "content-encoding" not in reply.headers
    assert client.get("/page.html.gz").headers["content-type"] == "application/gzip"


def test_a_sibling_older_than_its_file_is_not_its_form(client):
    assert client.get("/stale.txt", Accept_Encoding="gzip").body == b"new"


# --- fields -----------------------------------------------------------------------------------------------------------------


def test_date_is_always_there_and_last_modified_never_later(server, root):
    (root / "future").write_bytes(b"x")
    os.utime(root / "future", (time.time() + 90_000, time.time() + 90_000))
    peer = Client(server.port)
    for target in ("/future", "/nothing", "/dir", "/file"):
        reply = peer.get(target)
        sent = email.utils.parsedate_to_datetime(reply.headers["date"])
        if "last-modified" in reply.headers:
            assert email.utils.parsedate_to_datetime(reply.headers["last-modified"]) <= sent
    peer.close()


def test_accept_ranges_says_bytes(client):
    assert client.get("/file").headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(("target", "location"), [
    ("/dir", "/dir/"), ("/dir?a=b&c", "/dir/?a=b&c"), ("/%64ir", "/dir/"), ("//dir", "/dir/"), ("/./dir", "/dir/"),
    ("///dir", "/dir/"), ("/a%20b%3f", "/a%20b%3F/"),
])  # fmt: skip
def test_the_redirect_that_adds_a_slash_is_relative_and_normal(client, target, location):
    reply = client.get(target)
    assert (reply.status, reply.headers["location"]) == (301, location)


def test_a_redirect_can_not_lead_to_another_host(client):
    for target in ("//evil.example/%2e%2e", "/\\evil.example", "//evil.example/dir/..", "/%5Cevil.example"):
        reply = client.get(target)
        assert reply.status in (400, 404), target
