"""Known answers from the RFCs and, for TLS 1.2's PRF, from the vectors posted to the TLS working group's list."""

from ktlsd import uapi
from ktlsd.tls import schedule
from ktlsd.tls.suites import Suite, suite_by_name

AES128 = Suite(uapi.TLS_CIPHER_AES_GCM_128, "sha256")


def test_rfc_8448_server_application_keys():
    """https://www.rfc-editor.org/rfc/rfc8448#section-3, "derive write traffic keys for application data"."""
    secret = bytes.fromhex("a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643")
    key, iv = schedule.tls13_keys(secret, AES128)
    assert key.hex() == "9f02283b6c9c07efc26bb9f2ac92e356"
    assert iv.hex() == "cf782b88dd83549aadf1e984"


def test_tls12_prf_sha256():
    """https://mailarchive.ietf.org/arch/msg/tls/fzVCzk-z3FShgGJ6DOXqM1ydxms/."""
    secret = bytes.fromhex("9bbe436ba940f017b17652849a71db35")
    seed = bytes.fromhex("a0ba9f936cda311827a6f796ffd5198c")
    out = schedule.tls12_prf(secret, b"test label", seed, 100, "sha256")
    assert out.hex().startswith("e3f229ba727be17b8d122620557cd453c2aab21d07c3d495329b52d4e61edb5a")
    assert len(out) == 100


def test_tls12_key_block_is_cut_in_the_order_of_rfc_5246():
    master, client, server = b"m" * 48, b"c" * 32, b"s" * 32
    block = schedule.tls12_prf(master, b"key expansion", server + client, 40, "sha256")
    ours, theirs = schedule.tls12_keys(master, client, server, AES128)
    assert (ours.key, theirs.key, ours.iv, theirs.iv) == (block[:16], block[16:32], block[32:36], block[36:40])


def test_next_generation_is_as_long_and_different():
    for name, size in (("sha256", 32), ("sha384", 48)):
        secret = bytes(size)
        after = schedule.next_generation(secret, Suite(uapi.TLS_CIPHER_AES_GCM_256, name))
        assert len(after) == size
        assert after != secret


def test_keys_do_not_show():
    assert "9f02" not in repr(schedule.tls13_keys(bytes(32), AES128))


def test_suites_by_openssl_name():
    assert suite_by_name("TLS_AES_256_GCM_SHA384") == Suite(uapi.TLS_CIPHER_AES_GCM_256, "sha384")
    assert suite_by_name("ECDHE-RSA-CHACHA20-POLY1305") == Suite(uapi.TLS_CIPHER_CHACHA20_POLY1305, "sha256")
    assert suite_by_name("ECDHE-ECDSA-AES128-GCM-SHA256") == AES128
    assert suite_by_name("ECDHE-RSA-AES128-SHA256") is None
    assert suite_by_name("TLS_AES_128_CCM_SHA256") is None
