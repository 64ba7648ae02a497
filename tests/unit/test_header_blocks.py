"""Header blocks are decoded as hpack decodes them, errors and tables included."""

from hpack import Decoder, Encoder
from hpack.exceptions import HPACKError
from hypothesis import given, settings
from hypothesis import strategies as st

from ktlsd.protocol.header_blocks import decode_block

NAMES = st.sampled_from([b":path", b":method", b"accept", b"cookie", b"x-own", b"user-agent"]) | st.binary(
    min_size=1, max_size=20
)
FIELDS = st.lists(st.tuples(NAMES, st.binary(max_size=300) | st.sampled_from([b"GET", b"/", b"a" * 130])), max_size=12)


def both(ours, theirs, block):
    results = []
    for decode in (lambda: decode_block(ours, block), lambda: theirs.decode(block, raw=True)):
        try:
            results.append([(bytes(name), bytes(value)) for name, value in decode()])
        except HPACKError as exc:
            results.append(type(exc).__mro__[-4] if False else HPACKError)
            del exc
    assert results[0] == results[1]
    return results[0]


@settings(max_examples=300, deadline=None)
@given(blocks=st.lists(st.tuples(FIELDS, st.booleans(), st.sampled_from([None, 0, 100, 4096])), max_size=5))
def test_what_an_encoder_makes(blocks):
    encoder, ours, theirs = Encoder(), Decoder(), Decoder()
    for fields, huffman, size in blocks:
        if size is not None:
            encoder.header_table_size = size
        block = encoder.encode(fields, huffman=huffman)
        assert both(ours, theirs, block) == fields
        assert ours.header_table.dynamic_entries == theirs.header_table.dynamic_entries
        assert ours.header_table._current_size == theirs.header_table._current_size


@settings(max_examples=1_000, deadline=None)
@given(blocks=st.lists(st.binary(max_size=60), max_size=4))
def test_what_nobody_makes(blocks):
    ours, theirs = Decoder(), Decoder()
    for block in blocks:
        if both(ours, theirs, block) is HPACKError:
            return  # the connection ends
        assert ours.header_table.dynamic_entries == theirs.header_table.dynamic_entries


def test_a_list_that_inflates_is_stopped():
    ours, theirs = Decoder(), Decoder()
    block = Encoder().encode([(b"x", b"a" * 4_000)]) + b"\xbe" * 100
    assert both(ours, theirs, block) is HPACKError


@settings(max_examples=300, deadline=None)
@given(fields=FIELDS, at=st.integers(0, 400), flip=st.integers(0, 255))
def test_blocks_that_are_cut_or_bent(fields, at, flip):
    block = bytearray(Encoder().encode(fields))
    both(Decoder(), Decoder(), bytes(block[:at]))
    if at < len(block):
        block[at] ^= flip
        both(Decoder(), Decoder(), bytes(block))
