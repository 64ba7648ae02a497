from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ktlsd.errors import ProxyHeaderError
from ktlsd.protocol.proxy_protocol import MAX_HEADER, parse

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
PROXY, LOCAL = 0x21, 0x20
TCP4, UDP4, TCP6, UDP6, UNIX, UNIX_DGRAM = 0x11, 0x12, 0x21, 0x22, 0x31, 0x32
ADDRESSES4 = bytes([192, 168, 0, 1, 192, 168, 0, 11]) + bytes.fromhex("dc0401bb")  # 56324 to 443
ADDRESSES6 = IPv6Address("2001:db8::1").packed + IPv6Address("2001:db8::2").packed + bytes.fromhex("dc0401bb")
CLIENT4 = ("192.168.0.1", 56324)
CLIENT6 = ("2001:db8::1", 56324)
CLIENT_HELLO = bytes.fromhex("16030100c8010000c40303")
LONGEST6 = b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"


def v2(command, family, block=b""):
    return SIGNATURE + bytes([command, family]) + len(block).to_bytes(2, "big") + block


def tlv(kind, value=b""):
    return bytes([kind]) + len(value).to_bytes(2, "big") + value


def crc32c(data):
    """Bit by bit, to differ from the table."""
    crc = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            carry = (crc ^ byte >> bit) & 1
            crc = crc >> 1 ^ (0x82F63B78 * carry)
    return crc ^ 0xFFFFFFFF


def checked(family, addresses, before=b"", after=b""):
    """Return a version 2 header whose checksum stands between the TLVs `before` and `after`."""
    zeroed = v2(PROXY, family, addresses + before + tlv(3, bytes(4)) + after)
    at = len(zeroed) - len(after) - 4
    return zeroed[:at] + crc32c(zeroed).to_bytes(4, "big") + zeroed[at + 4 :]


V1 = {
    "the specification's example": (b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n", CLIENT4),
    "the longest TCP4": (
        b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
        ("255.255.255.255", 65535),
    ),
    "the longest TCP6": (
        b"PROXY TCP6 " + LONGEST6 + b" " + LONGEST6 + b" 65535 65535\r\n",
        (LONGEST6.decode(), 65535),
    ),
    "the shortest TCP4": (b"PROXY TCP4 1.2.3.4 5.6.7.8 0 0\r\n", ("1.2.3.4", 0)),
    "the shortest TCP6": (b"PROXY TCP6 :: :: 1 2\r\n", ("::", 1)),
    "upper case and zeros that could be left out": (
        b"PROXY TCP6 2001:0DB8:0:0:0:0:0:1 ::1 5 6\r\n",
        ("2001:db8::1", 5),
    ),
    "IPv4-mapped": (b"PROXY TCP6 ::ffff:192.168.0.1 ::ffff:c0a8:b 56324 443\r\n", CLIENT4),
    "IPv4-mapped in hexadecimal": (b"PROXY TCP6 ::ffff:c0a8:1 ::1 56324 443\r\n", CLIENT4),
    "the short UNKNOWN": (b"PROXY UNKNOWN\r\n", None),
    "the longest UNKNOWN": (b"PROXY UNKNOWN " + LONGEST6 + b" " + LONGEST6 + b" 65535 65535\r\n", None),
    "UNKNOWN and anything": (b"PROXY UNKNOWN\x00 \r \n \xff%s\r\n", None),
}
V2 = {
    "TCP4": (v2(PROXY, TCP4, ADDRESSES4), CLIENT4),
    "TCP6": (v2(PROXY, TCP6, ADDRESSES6), CLIENT6),
    "TCP6 with an IPv4-mapped client": (
        v2(PROXY, TCP6, IPv6Address("::ffff:192.168.0.1").packed + ADDRESSES6[16:]),
        CLIENT4,
    ),
    "TCP4 with TLVs": (v2(PROXY, TCP4, ADDRESSES4 + tlv(1, b"h2") + tlv(2, b"example.org") + tlv(4)), CLIENT4),
    "TCP4 with TLVs nobody knows": (v2(PROXY, TCP4, ADDRESSES4 + tlv(0xEA, b"\1vpce-1") + tlv(0xFF, bytes(300))), CLIENT4),
    "TCP4 with a checksum": (checked(TCP4, ADDRESSES4), CLIENT4),
    "TCP6 with a checksum between TLVs": (checked(TCP6, ADDRESSES6, tlv(1, b"h2"), tlv(4, bytes(9))), CLIENT6),
    "TCP4, as long as it may be": (v2(PROXY, TCP4, ADDRESSES4 + tlv(4, bytes(2_048 - 12 - 3))), CLIENT4),
    "UDP4": (v2(PROXY, UDP4, ADDRESSES4), None),
    "UDP6 with a checksum": (checked(UDP6, ADDRESSES6), None),
    "AF_UNIX": (v2(PROXY, UNIX, bytes(216)), None),
    "AF_UNIX, datagrams, with a TLV": (v2(PROXY, UNIX_DGRAM, bytes(216) + tlv(4, b"x")), None),
    "UNSPEC": (v2(PROXY, 0x00), None),
    "UNSPEC with something to be ignored": (v2(PROXY, 0x00, b"\3\0"), None),
    "UNSPEC transport over IPv4": (v2(PROXY, 0x10, ADDRESSES4[:8]), None),
    "STREAM of an unspecified family": (v2(PROXY, 0x01), None),
    "LOCAL": (v2(LOCAL, 0x00), None),
    "LOCAL with addresses": (v2(LOCAL, TCP4, ADDRESSES4), None),
    "LOCAL with a family that is none and a block that is nothing": (v2(LOCAL, 0xFF, b"\3\0\xff"), None),
}
VALID = {f"v1, {name}": case for name, case in V1.items()} | {f"v2, {name}": case for name, case in V2.items()}
each_valid = pytest.mark.parametrize(("header", "client"), VALID.values(), ids=VALID.keys())


@each_valid
def test_a_whole_header_names_its_client(header, client):
    assert parse(header) == (len(header), client)
    assert len(header) <= MAX_HEADER


@each_valid
def test_a_header_that_comes_byte_by_byte_is_not_whole_before_its_last(header, client):
    assert [parse(header[:size]) for size in range(len(header))] == [None] * len(header)


@each_valid
@pytest.mark.parametrize("rest", [CLIENT_HELLO, b"\r\n", b"\n", b"\0" * 3_000, b"PROXY TCP4 ", SIGNATURE])
def test_what_follows_a_header_is_not_counted(header, client, rest):
    assert parse(header + rest) == (len(header), client)


def test_lines_are_as_long_as_the_specification_says():
    named = ("the longest TCP4", "the longest TCP6", "the short UNKNOWN", "the longest UNKNOWN")
    assert [len(V1[name][0]) for name in named] == [56, 104, 15, 107]


def test_max_header_is_the_longest_header():
    assert MAX_HEADER == len(V2["TCP4, as long as it may be"][0]) == 2_064


# --- what is no header ---


@pytest.mark.parametrize(
    "data",
    [
        CLIENT_HELLO,
        b"GET / HTTP/1.1\r\n",
        b"POST / HTTP/1.1\r\n",
        b"PUT /",
        b"PROPFIND / HTTP/1.1\r\n",
        b"PROXY / HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\nGET / HTTP/1.1\r\n",
        b"\r\n\r\nGET / HTTP/1.1\r\n",
        b"SSH-2.0-OpenSSH",
        b"\0",
        b"\n",
        b" ",
    ],
)
def test_another_protocol_is_refused_at_the_first_byte_that_differs(data):
    differs = next(size for size in range(len(data) + 1) if not any(h.startswith(data[:size]) for h, _ in VALID.values()))
    assert parse(data[: differs - 1]) is None
    for size in range(differs, len(data) + 1):
        with pytest.raises(ProxyHeaderError):
            parse(data[:size])


@pytest.mark.parametrize(
    "line",
    [
        b"PROXY\r\n",
        b"PROXY \r\n",
        b"PROXY  TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY\tTCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"proxy TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY tcp4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP5 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY UNKNOW\r\n",
        b"PROXY TCP4\r\n",
        b"PROXY TCP4 \r\n",
        b"PROXY TCP4  1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3.4  5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 \r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\nx\r\n",
        b"PROXY TCP4 1.2.3.4\t5.6.7.8 1 2\r\n",
    ],
)
def test_a_line_of_another_shape_is_refused(line):
    with pytest.raises(ProxyHeaderError):
        parse(line)


@pytest.mark.parametrize(
    ("protocol", "address"),
    [
        (b"TCP4", b"01.2.3.4"),
        (b"TCP4", b"1.2.3.004"),
        (b"TCP4", b"1.2.3"),
        (b"TCP4", b"1.2.3.4.5"),
        (b"TCP4", b"1.2.3.256"),
        (b"TCP4", b"1.2.3.-4"),
        (b"TCP4", b"0x1.2.3.4"),
        (b"TCP4", b"16909060"),
        (b"TCP4", b"1.2.3.4/32"),
        (b"TCP4", b"abcd"),  # four bytes are an address only to who takes them as binary
        (b"TCP4", b"1.2.3.\xb2"),
        (b"TCP4", "1.2.3.٤".encode()),
        (b"TCP4", b"::1"),
        (b"TCP4", b"::ffff:1.2.3.4"),
        (b"TCP4", b"localhost"),
        (b"TCP6", b"1.2.3.4"),
        (b"TCP6", b"fe80::1%eth0"),
        (b"TCP6", b"fe80::1%"),
        (b"TCP6", b"[::1]"),
        (b"TCP6", b"::1/128"),
        (b"TCP6", b"1::2::3"),
        (b"TCP6", b":::"),
        (b"TCP6", b"1:2:3:4:5:6:7"),
        (b"TCP6", b"1:2:3:4:5:6:7:8:9"),
        (b"TCP6", b"::12345"),
        (b"TCP6", b"::g"),
        (b"TCP6", b"::ffff:1.2.3.04"),
        (b"TCP6", b"0123456789abcdef"),
    ],
)
def test_an_address_that_is_none_of_its_family_is_refused_on_either_side(protocol, address):
    good = b"1.2.3.4" if protocol == b"TCP4" else b"::1"
    for line in (b"PROXY %s %s %s 1 2\r\n" % (protocol, address, good), b"PROXY %s %s %s 1 2\r\n" % (protocol, good, address)):
        with pytest.raises(ProxyHeaderError, match="wanted IPv" + protocol[-1:].decode()):
            parse(line)


@pytest.mark.parametrize(
    "port", [b"", b"65536", b"99999", b"100000", b"00", b"01", b"+1", b"-1", b"1.0", b"1_0", b"0x1", b"\xb2", "٤".encode()]
)
def test_a_port_that_is_none_is_refused_on_either_side(port):
    for ports in (port + b" 443", b"443 " + port):
        with pytest.raises(ProxyHeaderError, match="wanted 0 to 65535"):
            parse(b"PROXY TCP4 1.2.3.4 5.6.7.8 " + ports + b"\r\n")


@pytest.mark.parametrize("start", [b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN"])
@pytest.mark.parametrize("filling", [b"x", b"\r", b"\n", b"1"])
def test_a_line_without_its_end_is_waited_for_until_it_is_too_long(start, filling):
    line = start.ljust(105, filling)
    assert parse(line) is None
    assert parse(line + b"x") is None
    with pytest.raises(ProxyHeaderError, match="no CRLF within 107 bytes"):
        parse(line + b"x\r")
    with pytest.raises(ProxyHeaderError, match="no CRLF within 107 bytes"):
        parse(line + b"x\r\n")


def test_neither_a_lone_cr_nor_a_lone_lf_ends_a_line():
    for end in (b"\n", b"\r", b"\n\r"):
        assert parse(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2" + end) is None


@pytest.mark.parametrize("byte", [b for b in range(256) if b not in (PROXY, LOCAL)])
def test_another_version_or_command_is_refused_as_soon_as_it_is_seen(byte):
    with pytest.raises(ProxyHeaderError, match="version and command"):
        parse(SIGNATURE + bytes([byte]))


@pytest.mark.parametrize("byte", range(256))
def test_of_families_and_transports_only_those_of_the_specification_are_waited_for(byte):
    if byte >> 4 <= 3 and byte & 15 <= 2:
        assert parse(SIGNATURE + bytes([PROXY, byte])) is None
    else:
        with pytest.raises(ProxyHeaderError, match="family and transport"):
            parse(SIGNATURE + bytes([PROXY, byte]))
    assert parse(v2(LOCAL, byte)) == (16, None)


@pytest.mark.parametrize(
    ("family", "least"), [(TCP4, 12), (UDP4, 12), (TCP6, 36), (UDP6, 36), (UNIX, 216), (UNIX_DGRAM, 216), (0x00, 0)]
)
def test_a_length_that_can_not_be_is_refused_before_the_block_is_there(family, least):
    fixed = SIGNATURE + bytes([PROXY, family])
    for length in {least, 2_048}:
        assert parse(fixed + length.to_bytes(2, "big")) == ((16, None) if length == 0 else None)
    for length in {max(least - 1, 0), 0, 2_049, 65_535} - {least}:
        with pytest.raises(ProxyHeaderError, match=f"length {length}; wanted {least} to 2048"):
            parse(fixed + length.to_bytes(2, "big"))


def test_local_is_bounded_too():
    with pytest.raises(ProxyHeaderError, match="length 2049"):
        parse(SIGNATURE + bytes([LOCAL, 0]) + (2_049).to_bytes(2, "big"))


# --- TLVs and the checksum (§2.2, §2.2.3) ---


@pytest.mark.parametrize("rest", [b"\4", b"\4\0", b"\4\0\1", tlv(4) + b"\4", tlv(4, bytes(9))[:-1], b"\4\xff\xff" + bytes(99)])
@pytest.mark.parametrize(("family", "addresses"), [(TCP4, ADDRESSES4), (UDP6, ADDRESSES6), (UNIX, bytes(216))])
def test_tlvs_that_do_not_fill_the_header_exactly_are_refused(rest, family, addresses):
    with pytest.raises(ProxyHeaderError, match="TLV 0x04 ends at byte"):
        parse(v2(PROXY, family, addresses + rest) + bytes(70_000))  # what follows does not count


def test_the_checksum_is_crc32c_in_network_byte_order():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C in every catalogue
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(bytes(range(32))) == 0x46DD794E
    header = bytes.fromhex("0d0a0d0a000d0a515549540a 21 11 0013 c0a80001 c0a8000b dc04 01bb 03 0004")
    header += crc32c(header + bytes(4)).to_bytes(4, "big")
    assert parse(header) == (len(header), CLIENT4)
    with pytest.raises(ProxyHeaderError, match="CRC32C"):
        parse(header[:-4] + header[:-5:-1])


@pytest.mark.parametrize("value", [b"", bytes(3), bytes(5)])
def test_a_checksum_of_another_length_is_refused(value):
    with pytest.raises(ProxyHeaderError, match="wanted one, of 4"):
        parse(v2(PROXY, TCP4, ADDRESSES4 + tlv(3, value)))


def test_a_second_checksum_is_refused_even_if_the_first_is_right():
    with pytest.raises(ProxyHeaderError, match="or a second"):
        parse(checked(TCP4, ADDRESSES4, after=tlv(3, bytes(4))))


def test_a_header_with_a_checksum_never_names_another_client_when_a_bit_is_turned_over():
    header = checked(TCP4, ADDRESSES4, tlv(1, b"h2"))
    for bit in range(len(header) * 8):
        damaged = bytearray(header)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            answer = parse(bytes(damaged))
        except ProxyHeaderError:
            continue
        assert answer is None or answer[1] in (None, CLIENT4)


# --- whatever comes ---

pairs = st.one_of(*(st.tuples(st.ip_addresses(v=v), st.ip_addresses(v=v)) for v in (4, 6)))
ports = st.integers(0, 65_535)
tlvs = st.lists(st.builds(tlv, st.integers(0, 255).filter(lambda kind: kind != 3), st.binary(max_size=60)), max_size=8)


def line_of(source, destination, port, to):
    return f"PROXY TCP{source.version} {source} {destination} {port} {to}\r\n".encode()


def text(address):
    return str(getattr(address, "ipv4_mapped", None) or address)


@given(pairs, ports, ports, st.binary(max_size=40))
@example((IPv6Address("::ffff:1.2.3.4"), IPv6Address("::")), 1, 2, b"")
def test_every_line_is_read_back_and_every_part_of_it_waited_for(pair, port, to, rest):
    line = line_of(*pair, port, to)
    assert parse(line + rest) == (len(line), (text(pair[0]), port))
    assert all(parse(line[:size]) is None for size in range(len(line)))


@given(pairs, ports, ports, tlvs, tlvs, st.booleans(), st.binary(max_size=40))
def test_every_binary_header_is_read_back_and_every_part_of_it_waited_for(pair, port, to, before, after, summed, rest):
    family = TCP4 if isinstance(pair[0], IPv4Address) else TCP6
    addresses = pair[0].packed + pair[1].packed + port.to_bytes(2, "big") + to.to_bytes(2, "big")
    start, end = b"".join(before), b"".join(after)
    header = checked(family, addresses, start, end) if summed else v2(PROXY, family, addresses + start + end)
    assert parse(header + rest) == (len(header), (text(pair[0]), port))
    assert all(parse(header[:size]) is None for size in range(len(header)))


starts = st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ::1 ", b"PROXY UNKNOWN", SIGNATURE, SIGNATURE + b"\x21"])
short = st.builds(v2, st.sampled_from([PROXY, LOCAL]), st.integers(0, 0x33), st.binary(max_size=300))
lines = st.text("PROXYTC46UNKNW 0123456789abf.:%\r\n", max_size=120).map(str.encode)
anything = st.one_of(
    st.builds(bytes.__add__, starts, st.one_of(st.binary(max_size=150), lines)),
    short,
    st.sampled_from([header for header, _ in VALID.values()]),
)


@given(anything, st.integers(0, 400), st.integers(0, 255))
def test_any_bytes_are_a_header_or_a_part_of_one_or_refused_however_they_come(data, at, byte):
    data = data[:at] + bytes([byte]) + data[at + 1 :]
    answers = []
    for size in range(min(len(data), 400) + 1):
        try:
            answers.append(parse(data[:size]))
        except ProxyHeaderError as exc:
            answers.append("refused")
            assert "\n" not in str(exc)
            assert len(str(exc)) < 240
    settled = [answer for answer in answers if answer is not None]
    assert len(set(settled)) <= 1  # more bytes don't change what was said
    assert answers == [None] * (len(answers) - len(settled)) + settled
    if settled and settled[0] != "refused":
        size, client = settled[0]
        assert size == answers.index(settled[0])  # whole with its last byte, not later
        assert client is None or (client[0].isascii() and 0 <= client[1] <= 65_535)


@given(st.binary(max_size=3_000))
def test_any_bytes_raise_nothing_else(data):
    try:
        parse(data)
    except ProxyHeaderError:
        pass
