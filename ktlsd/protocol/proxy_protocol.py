"""The header a proxy puts before a connection to say whose it is: the PROXY protocol, versions 1 and 2. Pure functions.

Sections are those of haproxy's doc/proxy-protocol.txt of 2020/03/05. What can't become a header any more is refused as soon
as that shows (§2.1, "abort as soon as possible"). Who may send one is decided elsewhere, and must be: the sender chooses
the address that everybody believes (§5).
"""

from ipaddress import IPv4Address, IPv6Address
from typing import Final

from ktlsd.errors import ProxyHeaderError

_MAX_LINE: Final = 107  # bytes with CRLF: "PROXY UNKNOWN", two of the longest addresses and ports (§2.1)
_FIXED: Final = 16  # bytes: signature, version and command, family and transport, length (§2.2)
_MAX_BLOCK: Final = 2_048  # bytes of addresses and TLVs; the field could say 65,535, held for every new connection
MAX_HEADER: Final = _FIXED + _MAX_BLOCK

_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_STARTS: Final = (b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN")
_LOCAL: Final = 0x20  # version 2 in the upper half
_PROXY: Final = 0x21
_TCP4: Final = 0x11  # family in the upper half, transport in the lower
_TCP6: Final = 0x21
_ADDRESSES: Final = {_TCP4: 12, 0x12: 12, _TCP6: 36, 0x22: 36, 0x31: 216, 0x32: 216}  # bytes; 2 is UDP, 3 is AF_UNIX
_LAST_FAMILY: Final = 3  # AF_UNIX
_LAST_TRANSPORT: Final = 2  # DGRAM
_CRC32C: Final = 0x03  # PP2_TYPE_CRC32C
_SHOWN: Final = 24  # bytes of the peer's in a message

Client = tuple[str, int]  # host, port


def parse(data: bytes) -> tuple[int, Client | None] | None:
    """Return how many bytes the header takes, and the host and port it names as the client. Raises ProxyHeaderError.

    None instead of a client where it names none that counts (LOCAL, UNKNOWN, AF_UNSPEC, AF_UNIX, UDP): the connection's own
    address does then. None instead of both: not whole yet. `data` starts at the connection's first byte; what follows the
    header is not looked at, and MAX_HEADER bytes are always enough.
    """
    if _SIGNATURE.startswith(data[: len(_SIGNATURE)]):
        return _parse_v2(data)
    if any(start.startswith(data[: len(start)]) for start in _STARTS):
        return _parse_v1(data)
    raise ProxyHeaderError(
        f"{data[:_SHOWN]!r} starts no PROXY header; wanted PROXY TCP4, TCP6, UNKNOWN or version 2's signature"
    )


# --- version 1: a line of text (§2.1) -------------------------------------------------------------------------------


def _parse_v1(data: bytes) -> tuple[int, Client | None] | None:
    end = data.find(b"\r\n", 0, _MAX_LINE)
    if end < 0:
        if len(data) >= _MAX_LINE:
            raise ProxyHeaderError(f"PROXY line {data[:_SHOWN]!r} has no CRLF within {_MAX_LINE} bytes")
        return None
    if data.startswith(b"PROXY UNKNOWN"):
        return end + 2, None  # whatever stands before CRLF must be ignored
    words = data[:end].split(b" ")
    if len(words) != 6:
        raise ProxyHeaderError(f"PROXY line {data[: min(end, _SHOWN)]!r} has {len(words)} words; wanted 6, one space between")
    family = IPv4Address if words[1] == b"TCP4" else IPv6Address
    host, _ = _address(words[2], family), _address(words[3], family)
    port, _ = _port(words[4]), _port(words[5])
    return end + 2, (host, port)


def _address(word: bytes, family: type[IPv4Address] | type[IPv6Address]) -> str:
    try:
        if b"%" not in word:  # ipaddress takes a scope; it means nothing on another machine
            return _host(family(word.decode("ascii")))
    except ValueError:
        pass  # the same answer
    raise ProxyHeaderError(f"PROXY line: address {word[:_SHOWN]!r}; wanted IPv{4 if family is IPv4Address else 6}, no scope")


def _port(word: bytes) -> int:
    if word.isdigit() and (word == b"0" or word[:1] != b"0") and int(word) <= 65_535:  # bytes: ASCII digits only
        return int(word)
    raise ProxyHeaderError(f"PROXY line: port {word[:_SHOWN]!r}; wanted 0 to 65535 without leading zeros")


def _host(address: IPv4Address | IPv6Address) -> str:
    """Return the address as text, an IPv4-mapped one as IPv4: allow lists and logs then know only one form."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


# --- version 2: binary (§2.2) ---------------------------------------------------------------------------------------


def _parse_v2(data: bytes) -> tuple[int, Client | None] | None:
    fixed = data[len(_SIGNATURE) : _FIXED]
    if fixed and fixed[0] not in (_LOCAL, _PROXY):
        raise ProxyHeaderError(f"PROXY header: version and command {fixed[0]:#04x}; wanted 0x20 (LOCAL) or 0x21 (PROXY)")
    local = fixed[:1] == bytes([_LOCAL])  # must be accepted whatever its family and addresses
    if len(fixed) > 1 and not local and (fixed[1] >> 4 > _LAST_FAMILY or fixed[1] & 15 > _LAST_TRANSPORT):
        raise ProxyHeaderError(f"PROXY header: family and transport {fixed[1]:#04x}; wanted 0 to 3 and 0 to 2")
    if len(fixed) < 4:
        return None
    length = int.from_bytes(fixed[2:])
    # None where family or transport is UNSPEC: nobody knows where the addresses end then, so TLVs can't be found.
    addresses = None if local else _ADDRESSES.get(fixed[1])
    if not (addresses or 0) <= length <= _MAX_BLOCK:
        raise ProxyHeaderError(f"PROXY header: length {length}; wanted {addresses or 0} to {_MAX_BLOCK}")
    size = _FIXED + length
    if len(data) < size:
        return None
    if addresses is None:
        return size, None
    header = data[:size]
    _check_tlvs(header, _FIXED + addresses)
    if fixed[1] == _TCP4:
        return size, (_host(IPv4Address(header[16:20])), int.from_bytes(header[24:26]))
    if fixed[1] == _TCP6:
        return size, (_host(IPv6Address(header[16:32])), int.from_bytes(header[48:50]))
    return size, None


def _check_tlvs(header: bytes, at: int) -> None:
    """Walk the type-length-values from offset `at` on: they must fill the header exactly, a checksum must be right (§2.2.3)."""
    checked = False
    while at < len(header):
        value = at + 3
        end = value + int.from_bytes(header[at + 1 : value])
        if end > len(header):  # also if its own three bytes are cut off
            raise ProxyHeaderError(f"PROXY header: TLV {header[at]:#04x} ends at byte {end}; wanted at most {len(header)}")
        if header[at] == _CRC32C:
            if checked or end - value != 4:  # one only: each costs a pass over the header
                raise ProxyHeaderError(f"PROXY header: CRC32C of {end - value} bytes, or a second; wanted one, of 4")
            checked = True
            seen, wanted = int.from_bytes(header[value:end]), _crc32c(header[:value] + bytes(4) + header[end:])
            if seen != wanted:
                raise ProxyHeaderError(f"PROXY header: CRC32C {seen:#010x}; wanted {wanted:#010x}")
        at = end


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F6_3B78 if crc & 1 else 0)  # Castagnoli's polynomial, reflected
        table.append(crc)
    return tuple(table)


_TABLE: Final = _crc32c_table()


def _crc32c(data: bytes) -> int:
    """Return the checksum of RFC 4960, Appendix B; sent in network byte order by haproxy and AWS alike, unlike SCTP's."""
    crc = 0xFFFF_FFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFF_FFFF
