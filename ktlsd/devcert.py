"""A development CA and a leaf for localhost, made once and kept; for trying things out, never for the public.

The CA's private key is thrown away as soon as the leaf is signed: trusting the CA gives nobody the power to sign more.
"""

import datetime
import ipaddress
import os
import socket
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ktlsd.errors import StartError

_DAYS: Final = 397  # what browsers accept at most
_RENEW_DAYS: Final = 30


class DevelopmentCertificate(NamedTuple):
    """Paths of three PEM files; `ca` is what clients are told to trust."""

    ca: Path
    cert: Path
    key: Path


def default_directory() -> Path:
    """Return where the development certificate lives: $STATE_DIRECTORY, else $XDG_DATA_HOME/ktlsd."""
    if state := os.environ.get("STATE_DIRECTORY"):
        return Path(state.partition(":")[0])
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "ktlsd"


def ensure(directory: Path) -> DevelopmentCertificate:
    """Return the certificate in `directory`, making it if there is none or it ends within a month. Raises StartError."""
    paths = DevelopmentCertificate(directory / "ca.pem", directory / "localhost.pem", directory / "localhost.key")
    try:
        if not _usable(paths):
            _make(paths)
    except OSError as exc:
        raise StartError(f"no development certificate in {directory}: {exc.strerror}; give --cert and --key") from exc
    return paths


def _usable(paths: DevelopmentCertificate) -> bool:
    if not all(path.exists() for path in paths):
        return False
    try:
        leaf = x509.load_pem_x509_certificate(paths.cert.read_bytes())
        key = serialization.load_pem_private_key(paths.key.read_bytes(), password=None)
        ca = x509.load_pem_x509_certificate(paths.ca.read_bytes())
        leaf.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False  # half made, or somebody else's: make a new one
    if key.public_key() != leaf.public_key():
        return False
    left = leaf.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left > datetime.timedelta(days=_RENEW_DAYS)


def _make(paths: DevelopmentCertificate) -> None:
    ca_key, leaf_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = _name("ktlsd development CA")
    ca = (
        _builder(ca_name, ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    leaf = (
        _builder(_name("localhost"), ca_name, leaf_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(_alternative_names()), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    paths.key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    pem = serialization.Encoding.PEM
    key_pem = leaf_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(paths.key, key_pem, 0o600)
    _write(paths.cert, leaf.public_bytes(pem), 0o644)
    _write(paths.ca, ca.public_bytes(pem), 0o644)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names() -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    host = socket.gethostname()
    if host and host != "localhost" and host.isascii() and all(c.isalnum() or c in "-." for c in host):
        names.append(x509.DNSName(host))
    return [*names, x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.IPAddress(ipaddress.ip_address("::1"))]


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write beside and rename: a reader never sees half a file."""
    beside = path.with_name(path.name + ".new")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, mode)
        file.write(data)
    beside.replace(path)
