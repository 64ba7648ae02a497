import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktlsd import uapi
from ktlsd.errors import RecordError
from ktlsd.tls import keylog, protection, records
from ktlsd.tls.hello import CLIENT_HELLO, Hello
from ktlsd.tls.records import OutgoingRecords


def record(content_type, body):
    return bytes([content_type, 3, 3]) + len(body).to_bytes(2, "big") + body


STREAM_12 = (
    record(22, bytes(90)) + record(20, b"\1") + record(22, b"explicit" + bytes(32)) + record(23, b"nonce  2" + bytes(20))
)


def test_tls12_counts_every_record_behind_change_cipher_spec():
    outgoing = OutgoingRecords()
    outgoing.feed(STREAM_12)
    assert (outgoing.count, outgoing.explicit_nonce) == (2, b"nonce  2")


def test_tls13_counts_from_start_on():
    outgoing = OutgoingRecords()
    outgoing.feed(record(22, bytes(90)) + record(20, b"\1") + record(23, bytes(500)))
    outgoing.start()
    outgoing.feed(record(23, bytes(200)) * 2)
    assert outgoing.count == 2


@given(st.lists(st.integers(1, 20)))
def test_any_split_counts_the_same(cuts):
    outgoing, at = OutgoingRecords(), 0
    for cut in [*cuts, len(STREAM_12)]:
        outgoing.feed(STREAM_12[at : at + cut])
        at += cut
    outgoing.feed(STREAM_12[at:])
    assert (outgoing.count, outgoing.explicit_nonce) == (2, b"nonce  2")


@given(st.binary(max_size=300))
def test_any_bytes_are_a_hello_or_nothing(data):
    whole, bytewise = Hello(CLIENT_HELLO), Hello(CLIENT_HELLO)
    whole.feed(data)
    for byte in data:
        bytewise.feed(bytes([byte]))
    assert (whole.random, whole.extensions, whole.done) == (bytewise.random, bytewise.extensions, bytewise.done)


@given(st.binary(max_size=300))
def test_a_hello_of_any_bytes_does_not_raise(data):
    message = b"\1" + (len(data) + 34).to_bytes(3, "big") + b"\3\3" + bytes(32) + data
    hello = Hello(CLIENT_HELLO)
    hello.feed(record(22, message))
    assert hello.random == bytes(32)


def test_a_hello_over_many_records_does_not_grow_without_bound():
    hello = Hello(CLIENT_HELLO)
    for _ in range(100):
        hello.feed(record(22, b"\1\xff\xff\xff" + bytes(4000)))
    assert hello.done
    assert hello.random is None


def test_key_log_lines():
    random, secret = "ab" * 32, "cd" * 48
    labels = (
        "SERVER_HANDSHAKE_TRAFFIC_SECRET",
        "SERVER_TRAFFIC_SECRET_0",
        "CLIENT_TRAFFIC_SECRET_N",
        "SERVER_TRAFFIC_SECRET_3",
    )
    lines = "# comment\n" + "".join(f"{label} {random} {secret}\n" for label in labels) + f"CLIENT_RANDOM {random} zz\n"
    found = list(keylog.parse(lines.encode()))
    assert [line.label for line in found] == [keylog.SERVER_TRAFFIC, keylog.CLIENT_UPDATED, keylog.SERVER_UPDATED]
    assert found[0].secret == bytes.fromhex(secret)
    assert secret[:8] not in repr(found)


@given(st.binary(max_size=200))
def test_any_key_log_is_read_without_raising(lines):
    list(keylog.parse(lines))


@pytest.mark.parametrize("version", uapi.VERSIONS)
@pytest.mark.parametrize("cipher", [51, 52, 54])
def test_protection_opens_what_it_sealed_and_nothing_else(version, cipher):
    layout = uapi.CIPHERS[cipher]
    info = uapi.CryptoInfo(version, cipher, b"i" * layout.iv, b"k" * layout.key, b"s" * layout.salt, records.rec_seq(7))
    sealer, opener = protection.Protection(info), protection.Protection(info)
    sealed = [sealer.seal(23, b"one"), sealer.seal(21, b"\1\0"), sealer.seal(23, b"x" * 16_384)]
    assert [opener.open(r) for r in protection.split(b"".join(sealed))] == [(23, b"one"), (21, b"\1\0"), (23, b"x" * 16_384)]
    assert all(
        len(r) == len(p) + records.overhead(version, cipher)
        for r, p in zip(sealed, (b"one", b"\1\0", b"x" * 16_384), strict=True)
    )
    with pytest.raises(RecordError):
        protection.Protection(info).open(sealed[1])  # not the first


def test_plaintext_can_be_told_from_the_outside_if_it_is_all():
    app = record(23, bytes(100 + 17))
    assert records.application_bytes(b"") == 0
    assert records.application_bytes(app) == 100
    assert records.application_bytes(app + record(23, bytes(17)) + app) == 200
    for cut in (1, 4, 5, 60, len(app) + 1):
        assert records.application_bytes((app + app)[:cut]) == -1


@given(st.lists(st.tuples(st.sampled_from([20, 21, 22, 23, 24, 0]), st.integers(0, 60)), max_size=6))
def test_what_is_not_application_data_makes_more_than_there_is(sizes):
    """A KeyUpdate must not hide behind a record that makes up for it: what is odd counts for more than all there can be."""
    wire = b"".join(record(kind, bytes(size)) for kind, size in sizes)
    counted = records.application_bytes(wire)
    if all(kind == 23 and size > 16 for kind, size in sizes):
        assert counted == sum(size - 17 for _, size in sizes)
    else:
        assert counted >= len(wire) > 0
