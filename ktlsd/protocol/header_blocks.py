"""Header blocks (RFC 7541): a client's to a header list, a response to ours.

hpack keeps the table of what clients send and decodes what is rare; the loop for what is frequent is here, as hpack's own
took a quarter of the time of a request. A property holds both against each other (tests/unit/test_header_blocks.py).
"""

from collections import deque
from functools import lru_cache
from typing import Final

from hpack.exceptions import HPACKDecodingError, HPACKError, InvalidTableIndex, OversizedHeaderListError
from hpack.hpack import Decoder, decode_integer
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from ktlsd.protocol.messages import SECRET_FIELDS, Response

HeaderList = list[tuple[bytes, bytes]]
_STATIC_FIELDS: Final = HeaderTable.STATIC_TABLE
_STATIC_SIZE: Final = len(_STATIC_FIELDS)
_SHORT: Final = 256  # bytes; longer strings are not worth remembering


class _Changing(HPACKError):
    """A block that would change the table, where it must not."""


def decode_block(decoder: Decoder, block: bytes) -> HeaderList:
    """Return the header list of a whole block and change the decoder's table as it says. Raises hpack's errors."""
    if block and block[0] & 0xE0 == 0x20:  # a new size for the table
        return [(bytes(name), bytes(value)) for name, value in decoder.decode(block, raw=True)]
    return _decode(decoder, block)


def peek_block(decoder: Decoder, block: bytes) -> HeaderList | None:
    """Return the header list of a whole block that leaves the decoder's table alone; None for any other, or a wrong one."""
    try:
        return _decode(decoder, block, may_change=False)
    except HPACKError:
        return None


def _decode(decoder: Decoder, block: bytes, *, may_change: bool = True) -> HeaderList:
    table = decoder.header_table
    dynamic = table.dynamic_entries
    fields: HeaderList = []
    size = at = 0
    end = len(block)
    try:
        while at < end:
            first = block[at]
            if first & 0x80:  # §6.1
                index, at = (first & 0x7F, at + 1) if first != 0xFF else _integer(block, at, 7)
                name, value = _STATIC_FIELDS[index - 1] if 0 < index <= _STATIC_SIZE else _dynamic(dynamic, index)
            else:  # §6.2
                if first & 0x40 and not may_change:
                    raise _Changing
                if first & 0xE0 == 0x20:
                    raise HPACKDecodingError("Table size update not at the start of the block")
                bits = 6 if first & 0x40 else 4
                index, at = _integer(block, at, bits)
                if index:
                    name = (_STATIC_FIELDS[index - 1] if index <= _STATIC_SIZE else _dynamic(dynamic, index))[0]
                else:
                    name, at = _string(block, at)
                value, at = _string(block, at, secret=name in SECRET_FIELDS)
                if first & 0x40:
                    table.add(name, value)
            size += len(name) + len(value) + 32
            if size > decoder.max_header_list_size:
                raise OversizedHeaderListError(f"more than {decoder.max_header_list_size} bytes")
            fields.append((name, value))
    except IndexError as exc:
        raise HPACKDecodingError("the block is cut short") from exc
    if table.maxsize > decoder.max_allowed_table_size:
        decoder.decode(b"")  # says what is wrong
    return fields


def _dynamic(dynamic: deque[tuple[bytes, bytes]], index: int) -> tuple[bytes, bytes]:
    index -= _STATIC_SIZE + 1
    if not 0 <= index < len(dynamic):
        raise InvalidTableIndex("there is no such entry in the table")
    return dynamic[index]


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """Return an integer (§5.1) and where it ends."""
    value = block[at] & ((1 << bits) - 1)
    if value < (1 << bits) - 1:
        return value, at + 1
    value, consumed = decode_integer(block[at : at + 16], bits)
    return value, at + consumed


def _string(block: bytes, at: int, *, secret: bool = False) -> tuple[bytes, int]:
    """Return a string (§5.2) and where it ends."""
    coded = block[at] & 0x80
    length, at = _integer(block, at, 7)
    end = at + length
    if end > len(block):
        raise HPACKDecodingError("the block is cut short")
    text = block[at:end]
    if coded:
        text = _huffman(text) if length <= _SHORT and not secret else decode_huffman(text)
    return text, end


def _huffman(text: bytes) -> bytes:
    """Return what a string says; it is remembered, but for signatures."""
    said = _decoded.get(text)
    if said is None:
        said = decode_huffman(text)
        if b"signature=" not in said:
            if len(_decoded) >= _REMEMBERED:
                _decoded.clear()
            _decoded[text] = said
    return said


_decoded: dict[bytes, bytes] = {}  # the same names, paths and user agents on all connections
_REMEMBERED: Final = 2_048


# --- responses -----------------------------------------------------------------------------------------------------

# A block that starts by taking the dynamic table away (RFC 7541 §6.3): nothing is ever put in it, so that there is nothing
# to keep for a connection, and what a header costs does not depend on the ones before it. nginx does the same.
FORGET_TABLE: Final = b"\x20"
_STATIC: Final = {name: index for index, (name, _) in reversed(list(enumerate(HeaderTable.STATIC_TABLE, 1)))}
_STATUS: Final = {
    int(value): bytes([0x80 | index]) for index, (name, value) in enumerate(HeaderTable.STATIC_TABLE, 1) if name == b":status"
}


def block_of(response: Response) -> bytes:
    """Return a response's header block: literals without indexing, names from the static table (RFC 7541 §6.2.2)."""
    return _block_of(response.status, response.content_length, tuple(response.headers))


@lru_cache(maxsize=256)  # the same answers go out again and again within a second
def _block_of(code: int, content_length: int | None, headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    status = _STATUS.get(code)
    out = [status if status is not None else _name(b":status") + b"\x03%d" % code]
    for name, value in headers:
        size = len(value)
        out.append(_name(name))
        out.append(size.to_bytes(1, "big") if size < 127 else _encode_integer(size, 7, 0))
        out.append(value)
    if content_length is not None:
        value = b"%d" % content_length
        out += (_CONTENT_LENGTH, len(value).to_bytes(1, "big"), value)
    return b"".join(out)


@lru_cache(maxsize=512)
def _name(name: bytes) -> bytes:
    name = name.lower()
    index = _STATIC.get(name)
    return _encode_integer(index, 4, 0) if index is not None else b"\0" + _encode_integer(len(name), 7, 0) + name


def _encode_integer(value: int, bits: int, pattern: int) -> bytes:
    """Return an integer behind a bit pattern (RFC 7541 §5.1)."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes([pattern | value])
    out = bytearray([pattern | limit])
    value -= limit
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


_CONTENT_LENGTH: Final = _name(b"content-length")
