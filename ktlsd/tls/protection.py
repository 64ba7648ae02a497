"""Record protection with the keys of a CryptoInfo (RFC 8446 §5.2, RFC 5288, RFC 7905): what the kernel does, in Python.

Not on the way of the data: the start-up self-test opens with it what the kernel sealed, and tests put it in the kernel's place.
"""

from collections.abc import Iterator
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from ktlsd import uapi
from ktlsd.errors import RecordError
from ktlsd.tls import records


class Record(NamedTuple):
    """A decrypted record."""

    content_type: int
    payload: bytes


class Protection:
    """One direction under one key, from the CryptoInfo's rec_seq on."""

    def __init__(self, info: uapi.CryptoInfo) -> None:
        chacha = info.cipher_type == uapi.TLS_CIPHER_CHACHA20_POLY1305
        self._aead: AESGCM | ChaCha20Poly1305 = ChaCha20Poly1305(info.key) if chacha else AESGCM(info.key)
        self._tls13 = info.version == uapi.TLS_1_3_VERSION
        self._explicit = not self._tls13 and not chacha
        self._salt = info.salt
        self._iv = info.iv
        self.number = int.from_bytes(info.rec_seq, "big")
        self._next_explicit = int.from_bytes(info.iv, "big")

    def _nonce(self, explicit: bytes) -> bytes:
        if self._explicit:
            return self._salt + explicit
        static = int.from_bytes(self._salt + self._iv, "big")
        return (static ^ self.number).to_bytes(12, "big")

    def _additional_data(self, content_type: int, plain_length: int, cipher_length: int) -> bytes:
        if self._tls13:
            return bytes([records.APPLICATION_DATA, 3, 3]) + cipher_length.to_bytes(2, "big")
        return records.rec_seq(self.number) + bytes([content_type, 3, 3]) + plain_length.to_bytes(2, "big")

    def seal(self, content_type: int, payload: bytes) -> bytes:
        """Return one whole record, header included; `payload` is at most 16,384 bytes."""
        explicit = b""
        if self._explicit:
            explicit = records.rec_seq(self._next_explicit)
            self._next_explicit = (self._next_explicit + 1) % (1 << 64)
        inner = payload + bytes([content_type]) if self._tls13 else payload
        length = len(explicit) + len(inner) + records.AEAD_TAG
        sealed = self._aead.encrypt(self._nonce(explicit), inner, self._additional_data(content_type, len(payload), length))
        outer = records.APPLICATION_DATA if self._tls13 else content_type
        self.number += 1
        return bytes([outer, 3, 3]) + length.to_bytes(2, "big") + explicit + sealed

    def open(self, record: bytes) -> Record:
        """Return what one whole record holds. Raises RecordError if it is not what the peer must have sent next."""
        body = record[records.HEADER_LENGTH :]
        explicit, sealed = (body[:8], body[8:]) if self._explicit else (b"", body)
        plain_length = len(sealed) - records.AEAD_TAG
        try:
            aad = self._additional_data(record[0], plain_length, len(body))
            plain = self._aead.decrypt(self._nonce(explicit), sealed, aad)
        except (InvalidTag, ValueError, OverflowError) as exc:
            raise RecordError(f"record {self.number} does not open") from exc
        self.number += 1
        if not self._tls13:
            return Record(record[0], plain)
        plain = plain.rstrip(b"\0")
        if not plain:
            raise RecordError("record without content type", alert=records.UNEXPECTED_MESSAGE)
        return Record(plain[-1], plain[:-1])


def split(stream: bytes) -> Iterator[bytes]:
    """Yield the whole records at the front of `stream`; what is left over is the last, incomplete piece and not yielded."""
    at = 0
    while len(stream) - at >= records.HEADER_LENGTH:
        end = at + records.HEADER_LENGTH + int.from_bytes(stream[at + 3 : at + 5], "big")
        if end > len(stream):
            return
        yield stream[at:end]
        at = end
