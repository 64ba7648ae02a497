"""Who may read: passwords (RFC 7617) and signed addresses that expire."""

import base64
import binascii
import hashlib
import hmac
import logging
import os
import re
import time
from collections import OrderedDict
from typing import Final

import bcrypt

from ktlsd.errors import SettingsError
from ktlsd.protocol.semantics import Path
from ktlsd.server.later import Later

_log = logging.getLogger("ktlsd")
_REMEMBERED: Final = 1024  # verdicts
_LOOK_EVERY: Final = 2.0  # seconds between looks at the file
_YES_FOR: Final = 300.0  # seconds until a right password is verified again
_NO_FOR: Final = 5.0
_SCRYPT: Final = re.compile(r"\$scrypt\$ln=(\d{1,2}),r=(\d{1,2}),p=(\d{1,2})\$([A-Za-z0-9+/.]+)\$([A-Za-z0-9+/.]{43})")
_BCRYPT: Final = re.compile(r"\$2[aby]\$(?:0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")
_LN, _R, _P = 15, 8, 1  # about 0.1 s and 32 MiB for one password
_MAX_MEMORY: Final = 256 << 20  # bytes for one password
_MIN_KEY: Final = 16  # bytes


class Passwords:
    """A password file: user:hash lines, bcrypt as `htpasswd -B` writes it or scrypt as `ktlsd passwd` does."""

    def __init__(self, file: str) -> None:
        """Raises SettingsError with file, line and reason."""
        self._file = file
        self._version = _version(file)
        self._looked = 0.0  # monotonic seconds
        self._hashes = _read_hashes(file)
        self._generation = 0  # of the hashes; a verdict on older ones does not count
        self._key = os.urandom(32)
        # When they end, by a keyed hash, never by the password; apart, so that a flood of wrong ones drives no right one out.
        self._right: OrderedDict[bytes, float] = OrderedDict()
        self._wrong: OrderedDict[bytes, float] = OrderedDict()

    def check(self, authorization: bytes | None, now: float) -> bool | Later:
        """Return whether this Authorization field will do, or what must be computed first. `now` is monotonic seconds."""
        credentials = _credentials(authorization)
        if credentials is None:
            return False
        if now - self._looked >= _LOOK_EVERY:
            self._look_again(now)
        key = hmac.digest(self._key, b"\0".join(credentials), "sha256")
        if now < self._right.get(key, 0.0):
            return True
        if now < self._wrong.get(key, 0.0):
            return False
        return self._verification(key, *credentials)

    def _look_again(self, now: float) -> None:
        """Read the file again if it is another; one that will not do is told once and the old one kept."""
        self._looked = now
        version = _version(self._file)
        if version == self._version:
            return
        self._version = version
        try:
            self._hashes = _read_hashes(self._file)
        except SettingsError as exc:
            _log.warning("%s; the passwords read before stay in use", exc)
        else:
            self._right.clear()
            self._wrong.clear()
            self._generation += 1

    def _somebodys(self, user: bytes) -> str:
        """Return a hash for a user there is not: always the same for the same name, one that somebody has."""
        hashes = list(self._hashes.values())
        return hashes[int.from_bytes(hmac.digest(self._key, user, "sha256")[:8], "big") % len(hashes)] if hashes else ""

    def _verification(self, key: bytes, user: bytes, password: bytes) -> Later:
        """Return the work of comparing one password. The thread only computes; the verdict is kept by whoever asked."""
        stored = self._hashes.get(user.decode("utf-8", "replace"))
        compared = stored or self._somebodys(user)  # an unknown user takes as long as a known one
        generation = self._generation

        def keep(right: bool) -> None:
            if generation != self._generation:
                return
            known = right and stored is not None
            verdicts, lasts = (self._right, _YES_FOR) if known else (self._wrong, _NO_FOR)
            while len(verdicts) >= _REMEMBERED:
                verdicts.popitem(last=False)
            verdicts[key] = time.monotonic() + lasts

        return Later(key, lambda: _matches(compared, password), lambda right: keep(bool(right)))


def _version(file: str) -> tuple[int, int, int] | None:
    """Return what tells one state of a file from another, None if it can't be seen."""
    try:
        facts = os.stat(file)
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino, facts.st_size


def _credentials(authorization: bytes | None) -> tuple[bytes, bytes] | None:
    scheme, _, token = (authorization or b"").partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        user, colon, password = base64.b64decode(token.strip(), validate=True).partition(b":")
    except binascii.Error:
        return None
    return (user, password) if colon else None


def _read_hashes(file: str) -> dict[str, str]:
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            rows = [line.strip() for line in lines]
    except OSError as exc:
        raise SettingsError(f"auth: {file}: cannot be read: {exc.strerror}") from exc
    hashes = {}
    for number, row in enumerate(rows, 1):
        if not row or row.startswith("#"):
            continue
        user, colon, stored = row.partition(":")
        if not colon or not user or not _is_usable(stored):
            raise SettingsError(
                f"auth: {file}: line {number}: not USER:HASH with bcrypt or scrypt; make it with ktlsd passwd, or htpasswd -B"
            )
        hashes[user] = stored
    return hashes


def _is_usable(stored: str) -> bool:
    """Whether a hash can be compared with at all: its cost within what the algorithms, and this machine, take."""
    if match := _SCRYPT.fullmatch(stored):
        ln, r, p = (int(number) for number in match.groups()[:3])
        return 1 <= ln <= 20 and r >= 1 and 1 <= p <= 16 and (128 * r << ln) <= _MAX_MEMORY // 2
    return _BCRYPT.fullmatch(stored) is not None


def hash_password(password: str) -> str:
    """Return the scrypt hash (RFC 7914) of a password, in the form of the crypt family."""
    salt = os.urandom(16)
    return f"$scrypt$ln={_LN},r={_R},p={_P}${_b64(salt)}${_b64(_scrypt(password.encode(), salt, _LN, _R, _P))}"


def _matches(stored: str, password: bytes) -> bool:
    if match := _SCRYPT.fullmatch(stored):
        ln, r, p = (int(number) for number in match.groups()[:3])
        return hmac.compare_digest(_scrypt(password, _unb64(match[4]), ln, r, p), _unb64(match[5]))
    if not stored:
        return False
    return bcrypt.checkpw(password[:72].replace(b"\0", b""), stored.encode("ascii"))  # bcrypt never looked at more


def _scrypt(password: bytes, salt: bytes, ln: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password, salt=salt, n=1 << ln, r=r, p=p, maxmem=_MAX_MEMORY, dklen=32)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii").rstrip("=").replace("+", ".")


def _unb64(text: str) -> bytes:
    return base64.b64decode(text.replace(".", "+") + "=" * (-len(text) % 4))


class Signer:
    """Signs addresses and verifies them: HMAC-SHA256 over the moment of expiry and the decoded path."""

    def __init__(self, file: str) -> None:
        """Raises SettingsError if the key can't be read or is too short."""
        try:
            with open(file, "rb") as source:
                self._key = source.read().strip()
        except OSError as exc:
            raise SettingsError(f"signed: {file}: cannot be read: {exc.strerror}") from exc
        if len(self._key) < _MIN_KEY:
            raise SettingsError(f"signed: {file}: a key has at least {_MIN_KEY} bytes; make one: openssl rand -hex 32 > {file}")

    def query(self, path: Path, expires: int) -> str:
        """Return the query that makes an address good until `expires` (seconds since the epoch)."""
        return f"expires={expires}&signature={self._signature(path, expires)}"

    def verify(self, path: Path, query: bytes, now: float) -> bool | None:
        """Return whether the query's signature is right; None if it was, and has expired."""
        fields = dict(part.partition(b"=")[::2] for part in query.split(b"&")[:32])
        moment = fields.get(b"expires", b"")
        if not moment.isdigit() or len(moment) > 15:
            return False
        expected = self._signature(path, int(moment)).encode("ascii")
        if not hmac.compare_digest(fields.get(b"signature", b""), expected):
            return False
        return True if now <= int(moment) else None

    def _signature(self, path: Path, expires: int) -> str:
        slash = b"/" if path.is_directory and path.segments else b""
        message = b"%d\n/%s%s" % (expires, b"/".join(path.segments), slash)
        return hmac.digest(self._key, message, "sha256").hex()
