import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktlsd.protocol.negotiation import choose_encoding, prefers_json, weights

ALL = [b"zstd", b"br", b"gzip"]


@pytest.mark.parametrize(
    ("asked", "available", "chosen"),
    [
        (None, ALL, b""),
        (b"", ALL, b""),
        (b"gzip", ALL, b"gzip"),
        (b"gzip, br, zstd", ALL, b"zstd"),
        (b"gzip;q=1.0, br;q=0.5", ALL, b"gzip"),
        (b"GZip ; q=0.3", ALL, b"gzip"),
        (b"x-gzip", ALL, b"gzip"),
        (b"*", ALL, b"zstd"),
        (b"*;q=0.1, br", ALL, b"br"),
        (b"gzip;q=0", ALL, b""),
        (b"gzip;q=0, *", [b"gzip"], b""),
        (b"gzip;q=0.000", [b"gzip"], b""),
        (b"gzip;q=0.5, identity", ALL, b""),
        (b"gzip;q=0.5, identity;q=0.4", ALL, b"gzip"),
        (b"identity", ALL, b""),
        (b"identity;q=0", ALL, None),
        (b"identity;q=0, gzip", ALL, b"gzip"),
        (b"identity;q=0, gzip", [], None),
        (b"*;q=0", ALL, None),
        (b"*;q=0, identity", ALL, b""),
        (b"*;q=0, gzip", ALL, b"gzip"),
        (b"deflate", ALL, b""),
        (b"gzip;q=2", ALL, b""),
        (b"gzip;q=x, br", ALL, b"br"),
        (b",,gzip,,", ALL, b"gzip"),
    ],
)
def test_accept_encoding(asked, available, chosen):
    assert choose_encoding(asked, available) == chosen


@pytest.mark.parametrize(
    ("accept", "json"),
    [
        (None, False),
        (b"*/*", False),
        (b"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", False),
        (b"application/json", True),
        (b"application/json, */*", True),
        (b"application/json;q=0.5, text/html", False),
        (b"text/html;q=0.5, application/json", True),
        (b"application/json;q=0, */*", False),
        (b"text/html, application/json", False),
    ],
)
def test_json_is_for_those_who_prefer_it(accept, json):
    assert prefers_json(accept) == json


@given(st.binary(max_size=300))
def test_any_bytes_are_an_answer(value):
    assert all(0 <= weight <= 1 for weight in weights(value).values())
    assert choose_encoding(value, ALL) in (None, b"", *ALL)
    prefers_json(value)
