"""The outside of TLS records (RFC 8446 §5.1, RFC 5246 §6.2): headers, content types, alerts; how many have left.

Whoever hands a session to the kernel must know the number of the next record. OpenSSL doesn't tell; but every record
passes here on its way out, and its header is readable.
"""

from typing import Final

from ktlsd import uapi

CHANGE_CIPHER_SPEC: Final = 20
ALERT: Final = 21
HANDSHAKE: Final = 22
APPLICATION_DATA: Final = 23
_APPLICATION_DATA: Final = b"\x17"

HEADER_LENGTH: Final = 5  # content type, version, length of what follows
MAX_PLAINTEXT: Final = 16_384  # RFC 8446 §5.1
AEAD_TAG: Final = 16

# Alerts, RFC 8446 §6
CLOSE_NOTIFY: Final = 0
UNEXPECTED_MESSAGE: Final = 10
BAD_RECORD_MAC: Final = 20

CLOSE_NOTIFY_ALERT: Final = bytes([1, CLOSE_NOTIFY])  # level warning
KEY_UPDATE_NOT_REQUESTED: Final = bytes([24, 0, 0, 1, 0])  # handshake message KeyUpdate, RFC 8446 §4.6.3


def fatal_alert(description: int) -> bytes:
    """Return the two bytes of a fatal alert."""
    return bytes([2, description])


class OutgoingRecords:
    """Follows the records that leave a server's session, and so knows the number of the next one.

    Feed every byte that leaves, in order and in any pieces. TLS 1.2: numbers start at 0 behind ChangeCipherSpec, every
    content type counts. TLS 1.3: `start` says from when on records are under the application key; only type 23 counts
    (a compatibility ChangeCipherSpec is not encrypted and has no number).
    """

    __slots__ = ("_explicit_nonce", "_partial", "_protected", "count")

    def __init__(self) -> None:
        self.count = 0  # the next record's number
        self._protected = False
        self._partial = b""
        self._explicit_nonce = b""

    @property
    def explicit_nonce(self) -> bytes:
        """The first 8 bytes of the last protected record's payload: in TLS 1.2 GCM its explicit nonce (RFC 5288 §3)."""
        return self._explicit_nonce

    def start(self) -> None:
        """Say that the application key is in use from the next byte on (TLS 1.3), from record 0."""
        self._protected = True
        self.count = 0

    def feed(self, ciphertext: bytes) -> None:
        """Account for bytes that leave."""
        length = len(ciphertext)
        if (  # one record, whole: mostly it is
            self._protected
            and not self._partial
            and ciphertext[:1] == _APPLICATION_DATA
            and length > HEADER_LENGTH
            and HEADER_LENGTH + (ciphertext[3] << 8 | ciphertext[4]) == length
        ):
            self.count += 1
            self._explicit_nonce = ciphertext[5:13]
            return
        data = self._partial + ciphertext if self._partial else ciphertext
        at, end = 0, len(data)
        while end - at >= HEADER_LENGTH:
            body = at + HEADER_LENGTH
            following = body + (data[at + 3] << 8 | data[at + 4])
            if following > end:
                break
            content_type = data[at]
            if content_type == CHANGE_CIPHER_SPEC:
                # TLS 1.3's is for show and sent before `start`; TLS 1.2's starts the protected records.
                self._protected = True
                self.count = 0
            elif self._protected:
                self.count += 1
                self._explicit_nonce = data[body : body + 8]
            at = following
        self._partial = data[at:] if at < end else b""


def number_of(wire: bytes) -> int:
    """Return how many records `wire` holds; they are whole."""
    count = at = 0
    while at < len(wire):
        at += HEADER_LENGTH + (wire[at + 3] << 8 | wire[at + 4])
        count += 1
    return count


def application_bytes(ciphertext: bytes) -> int:
    """Return how many bytes of plaintext these TLS 1.3 records hold if all are application data without padding.

    If one of them is something else for all to see, that is more than there are; -1 if they don't end where a record does.
    """
    at = count = 0
    end = len(ciphertext)
    while end - at >= HEADER_LENGTH:
        length = ciphertext[at + 3] << 8 | ciphertext[at + 4]
        odd = ciphertext[at] != APPLICATION_DATA or length <= AEAD_TAG
        count += end + length if odd else length - 1 - AEAD_TAG
        at += HEADER_LENGTH + length
    return count if at == end else -1


def rec_seq(number: int) -> bytes:
    """Return a record number as the kernel's rec_seq field: 8 bytes, big-endian."""
    return number.to_bytes(8, "big")


def application_limit(cipher_type: int) -> int:
    """Return how many payload bytes one key may protect before it must be renewed (RFC 8446 §5.5).

    AES-GCM: 2^24.5 full records are about 388 GB; a third of that is left as margin. ChaCha20: the record number ends first.
    """
    return 1 << 62 if cipher_type == uapi.TLS_CIPHER_CHACHA20_POLY1305 else 256 << 30


def overhead(version: int, cipher_type: int) -> int:
    """Return how many bytes of the wire one record takes beyond its payload: header, explicit nonce, content type, tag."""
    if version == uapi.TLS_1_3_VERSION:
        return HEADER_LENGTH + 1 + AEAD_TAG
    explicit = 0 if cipher_type == uapi.TLS_CIPHER_CHACHA20_POLY1305 else 8
    return HEADER_LENGTH + explicit + AEAD_TAG
