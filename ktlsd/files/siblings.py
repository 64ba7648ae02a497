"""Precompressed forms beside a file: FILE.zst, FILE.br, FILE.gz, made by whoever deploys; opened through the one gate."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from ktlsd.errors import RequestError
from ktlsd.files.root import DocumentRoot
from ktlsd.slices import OpenFile

# Best first: what a client weighs alike is decided by how small it usually gets.
_SUFFIXES: Final = {b"zstd": b".zst", b"br": b".br", b"gzip": b".gz"}
_FRESH: Final = 5.0  # seconds for which the folder is not asked again: three more opens would make a small response dear
_REMEMBERED: Final = 4096


class Siblings:
    """Which forms there are below one root."""

    def __init__(self, root: DocumentRoot) -> None:
        self._root = root
        self._known: OrderedDict[tuple[bytes, int], tuple[float, tuple[bytes, ...]]] = OrderedDict()

    def codings(self, path: bytes, file: OpenFile, now: float) -> Sequence[bytes]:
        """Return the content codings that `path`, open as `file`, also exists in; best first. `now` is monotonic seconds."""
        key = (path, file.mtime_ns)
        known = self._known.get(key)
        if known is not None and now - known[0] < _FRESH:
            return known[1]
        found = []
        for coding in _SUFFIXES:
            sibling = self.open(path, file, coding)
            if sibling is not None:
                sibling.release()
                found.append(coding)
        self._known[key] = (now, tuple(found))
        self._known.move_to_end(key)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return found

    def open(self, path: bytes, file: OpenFile, coding: bytes) -> OpenFile | None:
        """Open one form; None if it is not there, or older than the file and so perhaps another file's."""
        try:
            sibling = self._root.open(path + _SUFFIXES[coding])
        except (RequestError, OSError):
            return None
        if sibling is None:
            return None
        if sibling.mtime_ns // 1_000_000_000 < file.mtime_ns // 1_000_000_000:
            sibling.release()
            return None
        return sibling

    @staticmethod
    def path(path: bytes, coding: bytes) -> bytes:
        """Return where a form lies."""
        return path + _SUFFIXES[coding]
