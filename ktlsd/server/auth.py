"""Who may read: passwords (RFC 7617) and signed addresses that expire."""

import base64
import binascii
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import bcrypt

from ktlsd.errors import SettingsError
from ktlsd.protocol.semantics import Path

_log = logging.getLogger("ktlsd")
_REMEMBERED: Final = 1024  # verdicts
_LOOK_EVERY: Final = 2.0  # seconds between looks at the file
_YES_FOR: Final = 300.0  # seconds until a right password is verified again
_NO_FOR: Final = 5.0
_SCRYPT: Final = re.compile(r"\$scrypt\$ln=(\d{1,2}),r=(\d{1,2}),p=(\d{1,2})\$([A-Za-z0-9+/.]+)\$([A-Za-z0-9+/.]{43})")
_BCRYPT: Final = re.compile(r"\$2[aby]\$\d\d\$[./A-Za-z0-9]{53}")
_LN, _R, _P = 15, 8, 1  # about 0.1 s and 32 MiB for one password
_MIN_KEY: Final = 16  # bytes


@dataclass(frozen=True, slots=True)
class Later:
    """The answer takes work that must not stop the worker: run `job` in a thread, then ask again."""

    job: Callable[[], None]


class Passwords:
    """A password file: user:hash lines, bcrypt as `htpasswd -B` writes it or scrypt as `ktlsd passwd` does."""

    def __init__(self, file: str) -> None:
        """Raises SettingsError with file, line and reason."""
        self._file = file
        self._version = _version(file)
        self._looked = 0.0  # monotonic seconds
        self._hashes = _read_hashes(file)
        self._nobody = hash_password(secrets.token_hex(8))  # what unknown users are compared with: as slow as the others
        self._key = os.urandom(32)
        self._verdicts: OrderedDict[bytes, tuple[float, bool]] = OrderedDict()  # by a keyed hash, never by the password

    def check(self, authorization: bytes | None, now: float) -> bool | Later:
        """Return whether this Authorization field will do, or what must be computed first. `now` is monotonic seconds."""
        credentials = _credentials(authorization)
        if credentials is None:
            return False
        if now - self._looked >= _LOOK_EVERY:
            self._look_again(now)
        key = hmac.digest(self._key, b"\0".join(credentials), "sha256")
        verdict = self._verdicts.get(key)
        if verdict is not None and now < verdict[0]:
            return verdict[1]
        return Later(lambda: self._verify(key, *credentials))

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
            self._verdicts.clear()

    def _verify(self, key: bytes, user: bytes, password: bytes) -> None:
        """Compute the verdict; in a thread (one assignment to the dictionary, which is atomic)."""
        stored = self._hashes.get(user.decode("utf-8", "replace"))
        right = _matches(stored or self._nobody, password) and stored is not None
        while len(self._verdicts) >= _REMEMBERED:
            self._verdicts.popitem(last=False)
        self._verdicts[key] = (time.monotonic() + (_YES_FOR if right else _NO_FOR), right)


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
        if not colon or not user or not (_SCRYPT.fullmatch(stored) or _BCRYPT.fullmatch(stored)):
            raise SettingsError(
                f"auth: {file}: line {number}: not USER:HASH with bcrypt or scrypt; make it with ktlsd passwd, or htpasswd -B"
            )
        hashes[user] = stored
    return hashes


def hash_password(password: str) -> str:
    """Return the scrypt hash (RFC 7914) of a password, in the form of the crypt family."""
    salt = os.urandom(16)
    return f"$scrypt$ln={_LN},r={_R},p={_P}${_b64(salt)}${_b64(_scrypt(password.encode(), salt, _LN, _R, _P))}"


def _matches(stored: str, password: bytes) -> bool:
    if match := _SCRYPT.fullmatch(stored):
        ln, r, p = (int(number) for number in match.groups()[:3])
        try:
            return hmac.compare_digest(_scrypt(password, _unb64(match[4]), ln, r, p), _unb64(match[5]))
        except (ValueError, MemoryError):
            return False  # parameters beyond what this machine can do
    return bcrypt.checkpw(password[:72], stored.encode("ascii"))  # bcrypt never looked at more


def _scrypt(password: bytes, salt: bytes, ln: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password, salt=salt, n=1 << ln, r=r, p=p, maxmem=256 << 20, dklen=32)


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
