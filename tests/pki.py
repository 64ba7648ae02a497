"""Certificates for tests, made in memory: no private key is ever committed."""

import functools
import ssl
from pathlib import Path

import trustme


@functools.cache
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


@functools.cache
def leaf() -> trustme.LeafCert:
    return authority().issue_cert("localhost", "127.0.0.1", "::1", key_type=trustme.KeyType.ECDSA)


def ca_text() -> str:
    return authority().cert_pem.bytes().decode()


def write(directory: Path) -> tuple[Path, Path, Path]:
    """Write ca.pem, cert.pem and key.pem; return their paths."""
    ca, cert, key = directory / "ca.pem", directory / "cert.pem", directory / "key.pem"
    authority().cert_pem.write_to_path(str(ca))
    key.touch(mode=0o600)
    leaf().private_key_pem.write_to_path(str(key))
    cert.write_bytes(b"".join(pem.bytes() for pem in leaf().cert_chain_pems))
    return ca, cert, key


def server_context() -> ssl.SSLContext:
    """A context as `build_context` makes it, with the test certificate."""
    import tempfile

    from ktlsd.server.contexts import build_context
    from ktlsd.settings import Tls

    with tempfile.TemporaryDirectory() as directory:
        _, cert, key = write(Path(directory))
        return build_context(Tls(cert=str(cert), key=str(key)))
