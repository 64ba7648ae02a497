"""ssl.SSLContext from Settings. Built before the workers are forked: session ticket keys must be the same in all of them."""

import errno
import hashlib
import logging
import os
import re
import ssl
import stat
from typing import NamedTuple

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from ktlsd.errors import SettingsError
from ktlsd.settings import Settings, Tls

_log = logging.getLogger("ktlsd")
_CERTIFICATES = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_PRIVATE_KEY = re.compile(rb"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.+?-----END \1-----", re.DOTALL)
_MAX_PEM = 1 << 20  # bytes
_MINIMUM = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}

# Only suites with forward secrecy and an AEAD, and of those only ciphers the kernel can take over. AES-128 first: it is the
# cheaper one and not the weaker point of anything. TLS 1.3 suites can't be chosen before Python 3.15.
_TLS12_CIPHERS = "ECDHE+AES128+AESGCM:ECDHE+AES256+AESGCM:ECDHE+CHACHA20"


def build_contexts(settings: Settings) -> list[ssl.SSLContext]:
    """Return the contexts of all sites, the default's first: it is the one that connections start with; SNI picks another.

    A site without a certificate of its own and without an ALPN of its own shares the default's. Raises SettingsError.
    """
    default = build_context(settings.tls)
    by_name: dict[str, ssl.SSLContext] = {}
    contexts = [default]
    for site in settings.site:
        if site.cert is None and site.alpn is None:
            continue
        own = {"cert": site.cert, "key": site.key} if site.cert is not None else {}
        alpn = {"alpn": site.alpn} if site.alpn is not None else {}
        context = build_context(msgspec.structs.replace(settings.tls, **own, **alpn))
        contexts.append(context)
        by_name.update((name.lower(), context) for name in site.names)
    if by_name:
        default.sni_callback = _Chooser(by_name)
    return contexts


class _Chooser:
    """Picks a context by the name in the ClientHello: the name itself, then the nearest wildcard; else all stays as it is."""

    def __init__(self, by_name: dict[str, ssl.SSLContext]) -> None:
        self._by_name = by_name

    def __call__(self, connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name is None:
            return
        rest = name.lower().rstrip(".")
        context = self._by_name.get(rest)
        while context is None and "." in rest:
            rest = rest.partition(".")[2]
            context = self._by_name.get("*." + rest)
        if context is not None:
            connection.context = context


def build_context(tls: Tls) -> ssl.SSLContext:
    """Return a server's context for one certificate. Raises SettingsError."""
    assert tls.cert is not None, "devcert fills it in"
    assert tls.key is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _MINIMUM[tls.minimum]
    context.set_ciphers(_TLS12_CIPHERS)
    # A renegotiation would change the keys behind the kernel's back; nobody needs it (RFC 9325 §3.5).
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = tls.tickets
    context.set_alpn_protocols(list(tls.alpn))
    _load_pair(context, tls.cert, tls.key)
    if tls.client_ca is not None:
        _ask_for_certificates(context, tls)
    return context


def _ask_for_certificates(context: ssl.SSLContext, tls: Tls) -> None:
    """Ask clients for a certificate (mutual TLS); revoked ones are refused where a list is given."""
    context.verify_mode = ssl.CERT_OPTIONAL if tls.client_auth == "request" else ssl.CERT_REQUIRED
    for name, file in (("client_ca", tls.client_ca), ("client_crl", tls.client_crl)):
        if file is None:
            continue
        try:
            context.load_verify_locations(cafile=file)
        except ssl.SSLError as exc:
            raise SettingsError(f"tls.{name}: {file}: no usable PEM ({exc.reason or 'PEM lib'})") from exc
        except OSError as exc:
            raise SettingsError(f"tls.{name}: {file}: cannot be read: {exc.strerror}") from exc
    if tls.client_crl is not None:
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _load_pair(context: ssl.SSLContext, cert: str, key: str) -> None:
    for name, file, wanted in (("certificate", cert, b"-BEGIN CERTIFICATE-"), ("key", key, b" PRIVATE KEY-")):
        try:
            found = wanted in _text_of(file)
        except OSError as exc:
            raise SettingsError(f"{name} {file}: cannot be read: {exc.strerror}") from exc
        if not found:
            raise SettingsError(f"{name} {file}: there is no {name} in it (PEM, -----{wanted.decode().strip('- ')}-----)")

    _load(context, cert, key, Pair(cert, key))


def _load(context: ssl.SSLContext, cert: str, key: str, shown: "Pair") -> None:
    def no_passphrase() -> str:
        raise SettingsError(f"key {shown.key}: is encrypted; store it without a passphrase (openssl pkey -in … -out …)")

    try:
        context.load_cert_chain(cert, key, password=no_passphrase)
    except ssl.SSLError as exc:
        if exc.reason in ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED", "KEY_TYPE_MISMATCH"):
            raise SettingsError(f"key {shown.key}: does not belong to certificate {shown.cert}") from exc
        why = exc.reason or "PEM lib"
        raise SettingsError(f"certificate {shown.cert} and key {shown.key}: no usable PEM pair ({why})") from exc
    except OSError as exc:  # moved away between two looks
        raise SettingsError(f"certificate {shown.cert} and key {shown.key}: cannot be read: {exc.strerror}") from exc


def load_pem(context: ssl.SSLContext, fd: int) -> None:
    """Have a context that is in use serve another certificate from the next handshake on; `fd` holds chain and key.

    What has been looked at before is not expected to fail; if it does, the old pair stays. Does not close `fd`.
    """
    try:
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    except (OSError, ssl.SSLError) as exc:
        _log.error("cannot take a renewed certificate: %s", exc.strerror)


class Pair(NamedTuple):
    """The files of a certificate and its key."""

    cert: str
    key: str


def pairs_of(settings: Settings) -> list[Pair]:
    """Return whose certificates the contexts of `build_contexts` serve, in the same order."""
    tls = settings.tls
    assert tls.cert is not None, "devcert fills it in"
    assert tls.key is not None
    own = [site for site in settings.site if site.cert is not None or site.alpn is not None]
    return [Pair(tls.cert, tls.key), *(Pair(site.cert or tls.cert, site.key or tls.key) for site in own)]


def _text_of(file: str) -> bytes:
    """Return what is in a file; a pipe in its place must not be waited for. Raises OSError."""
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return os.pread(fd, _MAX_PEM, 0)
    finally:
        os.close(fd)


def read_pair(pair: Pair) -> bytes:
    """Return chain and key, as `load_pem` wants them, whatever else is in the files. Raises SettingsError if there is none."""
    parts = []
    for name, file, wanted in (("certificate", pair.cert, _CERTIFICATES), ("key", pair.key, _PRIVATE_KEY)):
        try:
            text = _text_of(file)
        except OSError as exc:
            raise SettingsError(f"{name} {file}: cannot be read: {exc.strerror}") from exc
        found = [match[0] for match in wanted.finditer(text)]
        if not found:
            raise SettingsError(f"{name} {file}: there is no whole {name} in it")
        parts += found if name == "certificate" else found[:1]
    return b"\n".join(parts) + b"\n"


def pem_file(pair: Pair, pem: bytes) -> int:
    """Return a descriptor of a file in memory that holds chain and key; no disk ever sees it. Raises SettingsError."""
    try:
        fd = os.memfd_create("ktlsd-certificate")
    except OSError as exc:
        raise SettingsError(f"certificate {pair.cert}: no memory or descriptor to look at it: {exc.strerror}") from exc
    try:
        os.write(fd, pem)
        _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), f"/proc/self/fd/{fd}", f"/proc/self/fd/{fd}", pair)
    except BaseException:
        os.close(fd)
        raise
    return fd


def key_kind(pem: bytes) -> str:
    """Return the kind of a certificate's key: OpenSSL keeps a pair for each, another kind would be beside and not instead."""
    try:
        return type(x509.load_pem_x509_certificates(pem)[0].public_key()).__name__
    except (ValueError, IndexError, UnsupportedAlgorithm):
        return ""


def fingerprint(pair: Pair) -> bytes:
    """Return what tells two contents of a pair apart; a file that isn't there is different from any that is."""
    digest = hashlib.sha256()
    for file in pair:
        try:
            digest.update(_text_of(file))
        except OSError as exc:
            digest.update(os.strerror(exc.errno or 0).encode())
    return digest.digest()


def expiry_of(cert: str) -> float | None:
    """Return when a certificate ends, seconds since the epoch; None if that can't be read."""
    try:
        leaf = x509.load_pem_x509_certificates(_text_of(cert))[0]
    except (OSError, ValueError, IndexError):
        return None
    return leaf.not_valid_after_utc.timestamp()
