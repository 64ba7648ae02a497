"""From a secret to keys: HKDF-Expand-Label (RFC 8446 §7.1), traffic keys (§7.3), the TLS 1.2 PRF (RFC 5246 §5)."""

from typing import NamedTuple

from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from ktlsd import uapi
from ktlsd.tls.suites import Suite

_HASHES: dict[str, type[hashes.HashAlgorithm]] = {"sha256": hashes.SHA256, "sha384": hashes.SHA384}


class TrafficKeys(NamedTuple):
    """One direction's record protection: `key` (16 or 32 bytes) and `iv` (12 bytes; TLS 1.2 GCM: the 4 implicit ones)."""

    key: bytes
    iv: bytes

    def __repr__(self) -> str:
        return "TrafficKeys(…)"


def hkdf_expand_label(secret: bytes, label: str, context: bytes, length: int, hash_name: str) -> bytes:
    """Return HKDF-Expand-Label(secret, label, context, length) of RFC 8446 §7.1; `length` is bytes."""
    full = b"tls13 " + label.encode("ascii")
    info = length.to_bytes(2, "big") + bytes([len(full)]) + full + bytes([len(context)]) + context
    return HKDFExpand(_HASHES[hash_name](), length, info).derive(secret)


def tls13_keys(secret: bytes, suite: Suite) -> TrafficKeys:
    """Return the write key and the 12-byte write IV of a traffic secret (RFC 8446 §7.3)."""
    key_length = uapi.CIPHERS[suite.cipher_type].key
    return TrafficKeys(
        hkdf_expand_label(secret, "key", b"", key_length, suite.hash_name),
        hkdf_expand_label(secret, "iv", b"", 12, suite.hash_name),
    )


def next_generation(secret: bytes, suite: Suite) -> bytes:
    """Return application_traffic_secret_N+1 (RFC 8446 §7.2), as long as the one before."""
    return hkdf_expand_label(secret, "traffic upd", b"", len(secret), suite.hash_name)


def tls12_prf(secret: bytes, label: bytes, seed: bytes, length: int, hash_name: str) -> bytes:
    """Return `length` bytes of PRF(secret, label, seed) = P_hash(secret, label ‖ seed) (RFC 5246 §5)."""

    def digest(data: bytes) -> bytes:
        mac = hmac.HMAC(secret, _HASHES[hash_name]())
        mac.update(data)
        return mac.finalize()

    seed = label + seed
    block, out = seed, b""
    while len(out) < length:
        block = digest(block)
        out += digest(block + seed)
    return out[:length]


def tls12_keys(master: bytes, client_random: bytes, server_random: bytes, suite: Suite) -> tuple[TrafficKeys, TrafficKeys]:
    """Return the client's and the server's write keys of a TLS 1.2 AEAD suite (RFC 5246 §6.3).

    `master` is the 48-byte (extended) master secret; the IV is 4 bytes for GCM (RFC 5288 §3), 12 for ChaCha20 (RFC 7905 §2).
    """
    key = uapi.CIPHERS[suite.cipher_type].key
    iv = 12 if suite.cipher_type == uapi.TLS_CIPHER_CHACHA20_POLY1305 else 4
    block = tls12_prf(master, b"key expansion", server_random + client_random, 2 * (key + iv), suite.hash_name)
    at = 2 * key
    return TrafficKeys(block[:key], block[at : at + iv]), TrafficKeys(block[key:at], block[at + iv :])
