"""SHA-256 digests that somebody has computed before: `ktlsd hash`'s index, FILE.sha256, SHA256SUMS.

The index has a file's size and mtime, so its digest is exact. A sums file has neither: its digest alone makes no tag, and it is
told to clients only if the file's inode was not touched since (a file moved into place with an old mtime has a new ctime). What
was found is remembered for a few seconds, what was not found too: a small response must not cost three opens.
"""

import re
import urllib.parse
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import BinaryIO, Final

from ktlsd.errors import RequestError
from ktlsd.files.plan import Digest
from ktlsd.files.root import DocumentRoot
from ktlsd.slices import OpenFile

INDEX: Final = b".ktlsd-digests"  # in the root; hidden, so never served
_SUMS: Final = b"SHA256SUMS"
_MAX_SUMS: Final = 8 << 20  # bytes of a sums file
_FRESH: Final = 10.0  # seconds for which an answer is not asked again
_REMEMBERED: Final = 4096  # files
_FOLDERS: Final = 16  # parsed sums files
# "digest  name" and "digest *name" as sha256sum writes them; a backslash in front means escapes, which are passed over.
_LINE: Final = re.compile(rb"^([0-9A-Fa-f]{64})(?: [ *](?:\./)?([^\n\r]+))?\r?$", re.MULTILINE)
_MAX_INDEX_LINE: Final = 16_384  # bytes; a path is at most 4,096, every byte of it encoded three


def index_line(path: bytes, size: int, mtime: int, digest: bytes) -> bytes:
    """Return one line of the index: path (percent-encoded), size in bytes, mtime in seconds, SHA-256 in hex; tabs between."""
    return b"%s\t%d\t%d\t%s\n" % (urllib.parse.quote_from_bytes(path, safe="/").encode(), size, mtime, digest.hex().encode())


def parse_index_line(line: bytes) -> tuple[bytes, int, int, bytes] | None:
    """Return (path, size, mtime, digest) of a line, None if it is none."""
    try:
        path, size, mtime, digest = line.rstrip(b"\n").split(b"\t")
        found = urllib.parse.unquote_to_bytes(path), int(size), int(mtime), bytes.fromhex(digest.decode("ascii"))
    except (ValueError, UnicodeDecodeError):
        return None
    return found if len(found[3]) == 32 else None


@dataclass(frozen=True, slots=True)
class _Sums:
    """A folder's SHA256SUMS: when it was read (monotonic seconds), the facts of the file, digests by name."""

    read_at: float
    file: OpenFile | None
    digests: dict[bytes, bytes]


class Digests:
    """What is known of the files below one root."""

    def __init__(self, root: DocumentRoot) -> None:
        self._root = root
        self._known: OrderedDict[tuple[bytes, int, int, int], tuple[float, Digest | None]] = OrderedDict()
        self._sums: OrderedDict[bytes, _Sums] = OrderedDict()

    def lookup(self, path: bytes, file: OpenFile, now: float) -> Digest | None:
        """Return what is known of an open file at `path` below the root, None if nobody has computed it."""
        key = (path, file.size, file.mtime_ns, file.ctime_ns)
        known = self._known.get(key)
        if known is not None and now - known[0] < _FRESH:
            return known[1]
        digest = self._find(path, file, now)
        self._known[key] = (now, digest)
        self._known.move_to_end(key)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return digest

    def _find(self, path: bytes, file: OpenFile, now: float) -> Digest | None:
        indexed = self._in_index(path)
        if indexed is not None and indexed[1:3] == (file.size, file.mtime_ns // 1_000_000_000):
            return Digest(indexed[3], is_exact=True, is_proven=True)
        folder, _, name = path.rpartition(b"/")
        own = self._root.read_small(path + b".sha256", 1024)
        if own is not None and own[0].mtime_ns >= file.mtime_ns:
            match = _LINE.search(own[1])
            if match is not None and match[2] in (None, name):
                return Digest(bytes.fromhex(match[1].decode("ascii")), is_proven=own[0].ctime_ns >= file.ctime_ns)
        sums = self._sums_of(folder, now)
        if sums.file is None or name not in sums.digests or sums.file.mtime_ns < file.mtime_ns:
            return None
        return Digest(sums.digests[name], is_proven=sums.file.ctime_ns >= file.ctime_ns)

    def _sums_of(self, folder: bytes, now: float) -> "_Sums":
        """Return what a folder's SHA256SUMS says."""
        held = self._sums.get(folder)
        if held is not None and now - held.read_at < _FRESH:
            return held
        if held is not None and held.file is not None and self._is_same(folder, held.file):
            self._sums[folder] = held = replace(held, read_at=now)
            return held
        read = self._root.read_small(folder + b"/" + _SUMS if folder else _SUMS, _MAX_SUMS)
        if read is None:
            sums = _Sums(now, None, {})
        else:
            found = {match[2]: bytes.fromhex(match[1].decode("ascii")) for match in _LINE.finditer(read[1]) if match[2]}
            sums = _Sums(now, read[0], found)
        self._sums[folder] = sums
        self._sums.move_to_end(folder)
        if len(self._sums) > _FOLDERS:
            self._sums.popitem(last=False)
        return sums

    def _is_same(self, folder: bytes, before: OpenFile) -> bool:
        """Whether a folder's SHA256SUMS is as it was when it was read: parsing a large one takes a tenth of a second."""
        try:
            file = self._root.open(folder + b"/" + _SUMS if folder else _SUMS)
        except (RequestError, OSError):
            return False
        if file is None:
            return False
        file.release()
        return (file.ctime_ns, file.size, file.mtime_ns) == (before.ctime_ns, before.size, before.mtime_ns)

    def _in_index(self, path: bytes) -> tuple[bytes, int, int, bytes] | None:
        """Find a path's line by halving: the index is sorted and may be larger than memory."""
        wanted = urllib.parse.quote_from_bytes(path, safe="/").encode() + b"\t"
        try:
            index = self._root.open(INDEX)
        except (RequestError, OSError):
            return None
        if index is None:
            return None
        try:
            with open(index.fd, "rb", buffering=1024, closefd=False) as lines:
                return parse_index_line(line) if (line := _find_line(lines, wanted, index.size)) else None
        except OSError:
            return None
        finally:
            index.release()


def _find_line(lines: BinaryIO, wanted: bytes, size: int) -> bytes:
    """Return the line of a sorted file that starts with `wanted`, b"" if none does."""
    low, high = 0, size
    while low < high:  # the first line that is not before `wanted` starts at `low` or behind it, at `high` or before it
        middle = (low + high) // 2
        line = _line_behind(lines, middle)
        if line and line < wanted:
            low = middle + 1
        else:
            high = middle
    line = _line_behind(lines, low)
    return line if line.startswith(wanted) else b""


def _line_behind(lines: BinaryIO, offset: int) -> bytes:
    """Return the first line that starts at `offset` or behind it, b"" at the end."""
    lines.seek(max(offset - 1, 0))
    if offset:
        lines.readline(_MAX_INDEX_LINE)
    return lines.readline(_MAX_INDEX_LINE)
