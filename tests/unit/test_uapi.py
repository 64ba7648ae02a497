import pytest

from ktlsd import uapi
from ktlsd.uapi import CryptoInfo


def test_aes_128_gcm_is_forty_bytes_in_the_order_of_the_header():
    info = CryptoInfo(0x0304, 51, iv=b"IIIIIIII", key=b"K" * 16, salt=b"SSSS", rec_seq=b"\0\0\0\0\0\0\0\5")
    assert info.pack() == b"\x04\x03\x33\x00" + b"IIIIIIII" + b"K" * 16 + b"SSSS" + b"\0\0\0\0\0\0\0\5"
    assert len(info.pack()) == 40


def test_aes_256_gcm_is_fifty_six_bytes():
    info = CryptoInfo(0x0303, 52, iv=b"IIIIIIII", key=b"K" * 32, salt=b"SSSS", rec_seq=bytes(8))
    assert info.pack() == b"\x03\x03\x34\x00" + b"IIIIIIII" + b"K" * 32 + b"SSSS" + bytes(8)
    assert len(info.pack()) == 56


def test_chacha_has_twelve_bytes_of_iv_and_no_salt():
    info = CryptoInfo(0x0304, 54, iv=b"I" * 12, key=b"K" * 32, salt=b"", rec_seq=bytes(8))
    assert info.pack() == b"\x04\x03\x36\x00" + b"I" * 12 + b"K" * 32 + bytes(8)
    assert len(info.pack()) == 56


@pytest.mark.parametrize("cipher", uapi.CIPHERS)
def test_unpack_reads_what_pack_wrote(cipher):
    layout = uapi.CIPHERS[cipher]
    info = CryptoInfo(0x0303, cipher, iv=b"i" * layout.iv, key=b"k" * layout.key, salt=b"s" * layout.salt, rec_seq=b"12345678")
    assert len(info.pack()) == layout.size
    assert CryptoInfo.unpack(info.pack()) == info


@pytest.mark.parametrize("payload", [b"", b"\x04\x03", b"\x04\x03\x33\x00" + bytes(35), b"\x04\x03\x63\x00" + bytes(36)])
def test_unpack_refuses_what_is_no_such_struct(payload):
    with pytest.raises(ValueError, match="bytes"):
        CryptoInfo.unpack(payload)


@pytest.mark.parametrize("field", ["iv", "key", "salt", "rec_seq"])
def test_a_field_of_the_wrong_length_is_refused(field):
    fields = {"iv": bytes(8), "key": bytes(16), "salt": bytes(4), "rec_seq": bytes(8)}
    fields[field] += b"\0"
    with pytest.raises(ValueError, match=field):
        CryptoInfo(0x0304, 51, **fields)


def test_a_version_the_kernel_does_not_know_is_refused():
    with pytest.raises(ValueError, match="0x0302"):
        CryptoInfo(0x0302, 51, iv=bytes(8), key=bytes(16), salt=bytes(4), rec_seq=bytes(8))
