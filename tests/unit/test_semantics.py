import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktlsd.errors import RequestError
from ktlsd.protocol.semantics import (
    ByteRange,
    Conditions,
    Validators,
    evaluate,
    http_date,
    parse_date,
    parse_path,
    parse_ranges,
    range_applies,
)

NOW = 784_111_777
DATE = b"Sun, 06 Nov 1994 08:49:37 GMT"
V = Validators(b'"abc"', NOW)


def test_dates_in_all_three_forms():
    assert http_date(NOW) == DATE
    for form in (DATE, b"Sunday, 06-Nov-94 08:49:37 GMT", b"Sun Nov  6 08:49:37 1994"):
        assert parse_date(form) == NOW
    assert parse_date(b"yesterday") is None


@given(st.integers(0, 4_000_000_000))
def test_every_date_is_read_back(seconds):
    assert parse_date(http_date(seconds)) == seconds


@given(st.binary(max_size=60))
def test_any_bytes_are_a_date_or_none(value):
    parse_date(value)


# --- preconditions (RFC 9110 §13.2.2) ---


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (Conditions(), None),
        (Conditions(if_match=b"*"), None),
        (Conditions(if_match=b'"x", "abc"'), None),
        (Conditions(if_match=b'"x"'), 412),
        (Conditions(if_match=b'W/"abc"'), 412),  # strong comparison
        (Conditions(if_unmodified_since=DATE), None),
        (Conditions(if_unmodified_since=http_date(NOW - 1)), 412),
        (Conditions(if_match=b'"abc"', if_unmodified_since=http_date(NOW - 1)), None),  # If-Match wins
        (Conditions(if_unmodified_since=b"junk"), None),
        (Conditions(if_none_match=b'"abc"'), 304),
        (Conditions(if_none_match=b'W/"abc"'), 304),  # weak comparison
        (Conditions(if_none_match=b"*"), 304),
        (Conditions(if_none_match=b'"x" , "abc"'), 304),
        (Conditions(if_none_match=b'"x"'), None),
        (Conditions(if_none_match=b'"x"', if_modified_since=DATE), None),  # If-Modified-Since is ignored
        (Conditions(if_modified_since=DATE), 304),
        (Conditions(if_modified_since=http_date(NOW - 1)), None),
        (Conditions(if_match=b'"x"', if_none_match=b'"abc"'), 412),
    ],
)
def test_preconditions_in_their_order(conditions, expected):
    assert evaluate(conditions, V) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, True),
        (b'"abc"', True),
        (b'"x"', False),
        (b'W/"abc"', False),
        (DATE, True),
        (http_date(NOW + 1), False),
        (b"junk", False),
    ],
)
def test_if_range(value, expected):
    assert range_applies(value, V, NOW + 60) == expected


def test_if_range_with_a_weak_weak_tag_never_matches():
    assert not range_applies(b'W/"abc"', Validators(b'W/"abc"', NOW), NOW + 60)


def test_if_range_by_date_needs_a_file_older_than_a_second():
    assert not range_applies(DATE, V, NOW)


# --- ranges (RFC 9110 §14) ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"bytes=0-0", [(0, 0)]),
        (b"bytes=0-", [(0, 99)]),
        (b"bytes=10-2000", [(10, 99)]),
        (b"bytes=-1", [(99, 99)]),
        (b"bytes=-500", [(0, 99)]),
        (b"bytes=-0", []),
        (b"bytes=100-", []),
        (b"BYTES= 1-2 , 4-5", [(1, 2), (4, 5)]),
        (b"bytes=1-2,,4-5,", [(1, 2), (4, 5)]),
        (b"bytes=200-300,1-1", [(1, 1)]),
        (b"bytes=", None),
        (b"bytes=2-1", None),
        (b"bytes=a-b", None),
        (b"bytes=-", None),
        (b"bytes=1-2-3", None),
        (b"bytes 1-2", None),
        (b"items=0-1", None),
        (b"bytes=" + b"0-1," * 17, None),
        (b"bytes=" + b"9" * 30 + b"-", None),
    ],
)
def test_range_field(value, expected):
    assert parse_ranges(value, 100) == (None if expected is None else [ByteRange(*pair) for pair in expected])


def test_no_range_of_an_empty_file_can_be_satisfied():
    for value in (b"bytes=0-", b"bytes=-1", b"bytes=0-0"):
        assert parse_ranges(value, 0) == []


@given(st.binary(max_size=40), st.integers(0, 1000))
def test_any_range_lies_inside_the_file(value, size):
    for byte_range in parse_ranges(b"bytes=" + value, size) or []:
        assert 0 <= byte_range.first <= byte_range.last < size


# --- targets ---


@pytest.mark.parametrize(
    ("target", "segments"),
    [
        (b"/", ()),
        (b"/a/b", (b"a", b"b")),
        (b"//a///b/", (b"a", b"b")),
        (b"/./a/./b", (b"a", b"b")),
        (b"/a%20b?x=/../", (b"a b",)),
        (b"/%E2%82%AC/\xff", (b"\xe2\x82\xac", b"\xff")),
        (b"/%252e%252e", (b"%2e%2e",)),  # decoded once
        (b"/...", (b"...",)),
    ],
)
def test_path_is_decoded_once_and_cut(target, segments):
    assert parse_path(target).segments == segments


@pytest.mark.parametrize(
    "target",
    [b"/..", b"/a/../b", b"/%2e%2e/x", b"/%2E./x", b"/a%2fb", b"/a%5cb", b"/a\\b", b"/a%00", b"/%", b"/%4", b"/%zz", b"/..%2f"],
)
def test_hostile_paths_are_refused(target):
    with pytest.raises(RequestError) as caught:
        parse_path(target)
    assert caught.value.status == 400


def test_hidden_names_but_not_well_known():
    assert parse_path(b"/.git/config").hidden
    assert parse_path(b"/a/.b").hidden
    assert parse_path(b"/a/.well-known/b").hidden
    assert not parse_path(b"/.well-known/acme-challenge/x").hidden
    assert parse_path(b"/.well-known/.secret").hidden


@given(st.binary(max_size=80))
def test_any_target_gives_segments_without_a_way_out(target):
    try:
        path = parse_path(b"/" + target)
    except RequestError:
        return
    for segment in path.segments:
        assert segment not in (b"", b".", b"..")
        assert not set(segment) & set(b"/\\\0")
    again = path.encoded(directory=True)
    assert again.startswith(b"/")
    assert not again.startswith((b"//", b"/\\"))
    assert parse_path(again).segments == path.segments
