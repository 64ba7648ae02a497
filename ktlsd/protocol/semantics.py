"""What HTTP means, whatever its version: dates, validators, preconditions (RFC 9110 §13), ranges (§14), targets.

Pure functions over bytes and numbers; the rules stand in the order in which the RFC applies them.
"""

import calendar
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from ktlsd.errors import RequestError

METHODS: Final = ("GET", "HEAD", "OPTIONS")
ALLOW: Final = b"GET, HEAD, OPTIONS"

_LAST_DATE: Final = 253_402_300_799  # the end of the year 9999: the form has four digits
_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DATE_FORMATS: Final = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")


# --- dates (RFC 9110 §5.6.7) ---------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def http_date(seconds: int) -> bytes:
    """Return seconds since the epoch as IMF-fixdate, "Sun, 06 Nov 1994 08:49:37 GMT"."""
    t = time.gmtime(min(max(seconds, 0), _LAST_DATE))
    date = f"{_DAYS[t.tm_wday]}, {t.tm_mday:02} {_MONTHS[t.tm_mon - 1]} {t.tm_year:04}"
    return f"{date} {t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} GMT".encode("ascii")


def parse_date(value: bytes) -> int | None:
    """Return seconds since the epoch for any of the three forms a recipient must accept; None if it is none of them."""
    text = value.decode("latin-1")
    for form in _DATE_FORMATS:
        try:
            return calendar.timegm(time.strptime(text, form))
        except (ValueError, OverflowError):
            continue
    return None


# --- validators and preconditions (RFC 9110 §8.8, §13) --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Validators:
    """What identifies a representation: `etag` as sent (quotes, W/ and all), `modified` seconds since the epoch."""

    etag: bytes
    modified: int


_ETAG: Final = re.compile(rb'\s*(?:,\s*)*((?:W/)?"[\x21\x23-\x7e\x80-\xff]*")\s*(?:,|$)')


def _etags(value: bytes) -> list[bytes]:
    """Return the entity tags of a list; what follows the first malformed one is left out."""
    found, at = [], 0
    while match := _ETAG.match(value, at):
        found.append(match[1])
        at = match.end()
    return found


def _weak_match(a: bytes, b: bytes) -> bool:
    return a.removeprefix(b"W/") == b.removeprefix(b"W/")


def _strong_match(a: bytes, b: bytes) -> bool:
    return a == b and not a.startswith(b"W/")


def _modified_since(value: bytes | None, modified: int) -> bool | None:
    """Whether the file changed after the date in `value`; None if that is no date."""
    date = parse_date(value) if value is not None else None
    return None if date is None else modified > date


class Conditions(NamedTuple):
    """The conditional fields of a request, None where absent."""

    if_match: bytes | None = None
    if_unmodified_since: bytes | None = None
    if_none_match: bytes | None = None
    if_modified_since: bytes | None = None
    if_range: bytes | None = None


def evaluate(conditions: Conditions, validators: Validators) -> int | None:
    """Return 412 or 304 if a precondition of a GET or HEAD says so, None to go on (RFC 9110 §13.2.2)."""
    if conditions.if_match is not None:
        if conditions.if_match.strip() != b"*" and not any(
            _strong_match(tag, validators.etag) for tag in _etags(conditions.if_match)
        ):
            return 412
    elif _modified_since(conditions.if_unmodified_since, validators.modified):
        return 412
    if conditions.if_none_match is not None:
        if conditions.if_none_match.strip() == b"*" or any(
            _weak_match(tag, validators.etag) for tag in _etags(conditions.if_none_match)
        ):
            return 304
    elif _modified_since(conditions.if_modified_since, validators.modified) is False:
        return 304
    return None


def range_applies(if_range: bytes | None, validators: Validators, now: int) -> bool:
    """Whether If-Range lets the Range field count (RFC 9110 §13.1.5): a strong tag that matches, or the exact date.

    A date is strong only once its second is over (§8.8.2.2).
    """
    if if_range is None:
        return True
    if_range = if_range.strip()
    if if_range.startswith((b'"', b"W/")):
        return _strong_match(if_range, validators.etag)
    return parse_date(if_range) == validators.modified and validators.modified < now


# --- ranges (RFC 9110 §14) ------------------------------------------------------------------------------------------


class ByteRange(NamedTuple):
    """First and last position, both inclusive, both inside the representation."""

    first: int
    last: int

    @property
    def length(self) -> int:
        """How many bytes that is."""
        return self.last - self.first + 1


_RANGE_SPEC: Final = re.compile(rb"[ \t]*(?:(\d{1,19})-(\d{0,19})|-(\d{1,19}))[ \t]*")
MAX_RANGES: Final = 16
_NEAR: Final = 80  # bytes


def parse_ranges(value: bytes, size: int) -> list[ByteRange] | None:
    """Return the satisfiable ranges of a Range field, clamped, in the order asked for; `size` is bytes.

    [] means none can be satisfied (416); None means that the field is to be ignored: another unit, bad syntax, too many.
    """
    unit, equals, specs = value.partition(b"=")
    if not equals or unit.strip().lower() != b"bytes":
        return None
    ranges = []
    parts = [part for part in specs.split(b",") if part.strip(b" \t")]  # empty elements are legal (§5.6.1)
    if not parts or len(parts) > MAX_RANGES:
        return None
    for part in parts:
        match = _RANGE_SPEC.fullmatch(part)
        if match is None:
            return None
        first, last, suffix = match.groups()
        if suffix is not None:
            length = min(int(suffix), size)
            if length:
                ranges.append(ByteRange(size - length, size - 1))
            continue
        if last and int(last) < int(first):
            return None
        if int(first) < size:
            ranges.append(ByteRange(int(first), min(int(last), size - 1) if last else size - 1))
    return ranges


def coalesce(ranges: list[ByteRange]) -> list[ByteRange]:
    """Return the ranges with overlapping and near ones made one (RFC 9110 §14.2), in the order in which they were asked for.

    Near means that a part's header would cost as much as the bytes between. What is left never overlaps, so it is never
    more than the file.
    """
    merged: list[tuple[int, ByteRange]] = []  # position of the first that asked for it, and the range
    for position, part in sorted(enumerate(ranges), key=lambda item: item[1]):
        if merged and part.first <= merged[-1][1].last + 1 + _NEAR:
            first, before = merged[-1]
            merged[-1] = (min(first, position), ByteRange(before.first, max(before.last, part.last)))
        else:
            merged.append((position, part))
    return [part for _, part in sorted(merged)]


# --- targets (RFC 9112 §3.2, RFC 3986) ------------------------------------------------------------------------------

_PERCENT: Final = re.compile(rb"%([0-9A-Fa-f]{2})?")
_SAFE: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+,;=:@")


@dataclass(frozen=True, slots=True)
class Path:
    """A target's path: decoded segments, none of them empty, ".", ".." or with a slash, backslash or NUL in it."""

    segments: tuple[bytes, ...]
    is_directory: bool  # ended in a slash

    @property
    def hidden(self) -> bool:
        """Whether a segment starts with a dot; /.well-known (RFC 8615) does not count."""
        rest = self.segments[1:] if self.segments[:1] == (b".well-known",) else self.segments
        return any(segment.startswith(b".") for segment in rest)

    @property
    def relative(self) -> bytes:
        """The path below the root as the file system takes it, b"." for the root itself."""
        return b"/".join(self.segments) or b"."

    def encoded(self, *, directory: bool) -> bytes:
        """Return the path in percent-encoding; starts with one slash only, whatever was asked for."""
        parts = [encode_segment(segment) for segment in self.segments]
        return b"/" + b"/".join(parts) + (b"/" if directory and parts else b"")


def encode_segment(segment: bytes) -> bytes:
    """Return one name in percent-encoding (RFC 3986 §2.1)."""
    return b"".join(bytes([c]) if c in _SAFE else b"%%%02X" % c for c in segment)


def parse_path(target: bytes) -> Path:
    """Return the path of an origin-form target, percent-decoded exactly once. Raises RequestError(400).

    Empty segments and "." are dropped as RFC 3986 §6.2.2 and every server do; ".." never leads up: it is refused, as are
    NUL, backslash, and slashes that were encoded.
    """
    path = target.partition(b"?")[0]
    return _parse_path(path) if len(path) <= _SHORT_PATH else _parse_path.__wrapped__(path)


_SHORT_PATH: Final = 512  # bytes; longer ones are not worth remembering


@lru_cache(maxsize=2_048)
def _parse_path(path: bytes) -> Path:
    segments = []
    for raw in path.split(b"/"):
        segment = _PERCENT.sub(_decode, raw) if b"%" in raw else raw
        if segment == b"..":
            raise RequestError(400, "The path has a .. in it.")
        if b"/" in segment or b"\0" in segment or b"\\" in segment:
            raise RequestError(400, "The path has an encoded slash, a backslash or a NUL in it.")
        if segment not in (b"", b"."):
            segments.append(segment)
    if sum(map(len, segments)) + len(segments) >= 4096 or any(len(segment) > 255 for segment in segments):
        raise RequestError(404, "No file has so long a name.")
    return Path(tuple(segments), path.endswith((b"/", b"/.")))


def _decode(match: "re.Match[bytes]") -> bytes:
    digits = match[1]
    if digits is None:
        raise RequestError(400, "The path has a % that no two hexadecimal digits follow.")
    return bytes([int(digits, 16)])
