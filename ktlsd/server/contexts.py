"""ssl.SSLContext from Settings. Built before the workers are forked: session ticket keys must be the same in all of them."""

import ssl

from ktlsd.errors import SettingsError
from ktlsd.settings import Tls

_MINIMUM = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}

# Only suites with forward secrecy and an AEAD, and of those only ciphers the kernel can take over. AES-128 first: it is the
# cheaper one and not the weaker point of anything. TLS 1.3 suites can't be chosen before Python 3.15.
_TLS12_CIPHERS = "ECDHE+AES128+AESGCM:ECDHE+AES256+AESGCM:ECDHE+CHACHA20"


def build_context(tls: Tls) -> ssl.SSLContext:
    """Return a server context for `tls.cert` and `tls.key`. Raises SettingsError naming the file and what is wrong with it."""
    assert tls.cert is not None, "Settings are complete by now"
    assert tls.key is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _MINIMUM[tls.minimum]
    context.set_ciphers(_TLS12_CIPHERS)
    # A renegotiation would change the keys behind the kernel's back; nobody needs it (RFC 9325 §3.5).
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = tls.tickets
    context.set_alpn_protocols(list(tls.alpn))
    _load_pair(context, tls.cert, tls.key)
    return context


def _load_pair(context: ssl.SSLContext, cert: str, key: str) -> None:
    for name, file in (("certificate", cert), ("key", key)):
        try:
            with open(file, "rb"):
                pass
        except OSError as exc:
            raise SettingsError(f"{name} {file}: cannot be read: {exc.strerror}") from exc

    def no_passphrase() -> str:
        raise SettingsError(f"key {key}: is encrypted; store it without a passphrase (openssl pkey -in … -out …)")

    try:
        context.load_cert_chain(cert, key, password=no_passphrase)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise SettingsError(f"key {key}: does not belong to certificate {cert}") from exc
        raise SettingsError(f"certificate {cert} and key {key}: no usable PEM pair ({exc.reason or 'PEM lib'})") from exc
