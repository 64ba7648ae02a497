"""The two hello messages, as far as OpenSSL doesn't tell what they said: randoms, and max_fragment_length.

Reads the plaintext records at the start of a connection (RFC 8446 §4.1.2, §4.1.3). It believes nothing: OpenSSL judges
the same bytes; what doesn't parse here is simply not known.
"""

from typing import Final

from ktlsd.tls.records import HANDSHAKE, HEADER_LENGTH

CLIENT_HELLO: Final = 1
SERVER_HELLO: Final = 2
MAX_FRAGMENT_LENGTH: Final = 1  # RFC 6066 §4
_LIMIT: Final = 65_536  # bytes kept while waiting for a whole hello


class Hello:
    """Collects the first handshake message of one direction; `random` is None until it has been seen whole."""

    __slots__ = ("_message", "_pending", "_wanted", "done", "extensions", "random")

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._pending = b""
        self._message = b""
        self.done = False
        self.random: bytes | None = None
        self.extensions: tuple[int, ...] = ()  # their numbers

    def feed(self, wire: bytes) -> None:
        """Account for bytes of this direction, in order and in any pieces; nothing happens once `done`."""
        if self.done:
            return
        data = self._pending + wire
        at = 0
        while len(data) - at >= HEADER_LENGTH and not self.done:
            end = at + HEADER_LENGTH + (data[at + 3] << 8 | data[at + 4])
            if data[at] != HANDSHAKE:
                self.done = True
            elif end > len(data):
                break
            else:
                self._message += data[at + HEADER_LENGTH : end]
                self._try_parse()
                at = end
        self._pending = data[at:]
        if len(self._pending) + len(self._message) > _LIMIT:
            self.done = True
        if self.done:
            self._pending = self._message = b""

    def _try_parse(self) -> None:
        message = self._message
        if len(message) < 4 or len(message) < 4 + int.from_bytes(message[1:4], "big"):
            return
        self.done = True
        if message[0] == self._wanted and len(message) >= 38:
            self.random = message[6:38]
            if self._wanted == CLIENT_HELLO:
                self.extensions = _extension_types(message[38:])


def _extension_types(rest: bytes) -> tuple[int, ...]:
    """Return the extension numbers of a ClientHello from behind its random."""
    try:
        at = 1 + rest[0]  # legacy_session_id
        at += 2 + int.from_bytes(rest[at : at + 2], "big")  # cipher_suites
        at += 1 + rest[at]  # legacy_compression_methods
    except IndexError:
        return ()
    end = at + 2 + int.from_bytes(rest[at : at + 2], "big")
    at += 2
    found = set()
    while at + 4 <= min(end, len(rest)):
        found.add(int.from_bytes(rest[at : at + 2], "big"))
        at += 4 + int.from_bytes(rest[at + 2 : at + 4], "big")
    return tuple(found)
