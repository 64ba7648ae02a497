"""Cipher suites by OpenSSL's names, as far as the kernel has their cipher."""

from dataclasses import dataclass
from typing import Final

from ktlsd import uapi


@dataclass(frozen=True, slots=True)
class Suite:
    """What of a cipher suite matters for keys: the kernel's cipher and the hash of HKDF or the PRF."""

    cipher_type: int
    hash_name: str  # "sha256" or "sha384"


# OpenSSL writes TLS 1.3 suites as in RFC 8446 §B.4, TLS 1.2 suites as KEYEXCHANGE-AUTH-CIPHER-HASH; key exchange and
# authentication don't matter here, so the end of the name decides.
_ENDINGS: Final = (
    ("AES_128_GCM_SHA256", Suite(uapi.TLS_CIPHER_AES_GCM_128, "sha256")),
    ("AES_256_GCM_SHA384", Suite(uapi.TLS_CIPHER_AES_GCM_256, "sha384")),
    ("CHACHA20_POLY1305_SHA256", Suite(uapi.TLS_CIPHER_CHACHA20_POLY1305, "sha256")),
    ("AES128-GCM-SHA256", Suite(uapi.TLS_CIPHER_AES_GCM_128, "sha256")),
    ("AES256-GCM-SHA384", Suite(uapi.TLS_CIPHER_AES_GCM_256, "sha384")),
    ("CHACHA20-POLY1305", Suite(uapi.TLS_CIPHER_CHACHA20_POLY1305, "sha256")),
)


def suite_by_name(name: str) -> Suite | None:
    """Return the suite for OpenSSL's name, None if the kernel has no such cipher.

    Names are like "TLS_AES_256_GCM_SHA384" and "ECDHE-RSA-AES128-GCM-SHA256".
    """
    for ending, suite in _ENDINGS:
        if name.endswith(ending):
            return suite
    return None
