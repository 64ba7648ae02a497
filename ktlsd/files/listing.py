"""A folder's contents as a page or as JSON: entries in, text out. Pure; who reads the folder is `files.root`.

The page is plain where crawlers look (one link a row, relative, folders with a slash) and sorts by a form, which they do
not submit: links with ?sort= would have wget -r fetch every folder six times.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import jinja2

from ktlsd.errors import SettingsError
from ktlsd.protocol import semantics
from ktlsd.protocol.semantics import Path

SORTS: Final = ("name", "size", "time")
_PIECE: Final = 16_384  # characters of a page that go out together
_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder: `size` is bytes (0 for a folder), `modified` seconds since the epoch."""

    name: bytes
    is_directory: bool
    size: int
    modified: int

    @property
    def text(self) -> str:
        """The name as it is shown: what is not UTF-8 is replaced."""
        return self.name.decode("utf-8", "replace")

    @property
    def href(self) -> str:
        """The relative address, every byte of the name kept. "./" keeps a colon from being taken for a scheme."""
        path = semantics.encode_segment(self.name).decode("ascii") + ("/" if self.is_directory else "")
        return "./" + path if ":" in path else path

    @property
    def size_text(self) -> str:
        """The size for people, "1.5 GiB"; "" for a folder."""
        return "" if self.is_directory else human_size(self.size)

    @property
    def time_text(self) -> str:
        """When it was changed, UTC, "2026-11-21 04:22"."""
        return _utc("%Y-%m-%d %H:%M", self.modified)

    @property
    def time_iso(self) -> str:
        """The same for machines."""
        return _utc("%Y-%m-%dT%H:%M:%SZ", self.modified)


def _utc(form: str, seconds: int) -> str:
    try:
        return time.strftime(form, time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return ""  # a file system's nonsense, beyond the calendar


def human_size(size: int) -> str:
    """Return bytes in the unit that leaves one to four digits."""
    value, unit = float(size), 0
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    if size == 1:
        return "1 byte"
    return f"{size} bytes" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


@dataclass(frozen=True, slots=True)
class Order:
    """How a listing is sorted; folders come first in any case."""

    by: str = "name"
    descending: bool = False

    @classmethod
    def of_query(cls, query: bytes) -> "Order":
        """Read ?sort=name, size or time, with -desc behind it for the other way round; anything else is the default."""
        for part in query.split(b"&")[:16]:
            key, _, value = part.partition(b"=")
            by, _, way = value.decode("latin-1").partition("-")
            if key == b"sort" and by in SORTS:
                return cls(by, way == "desc")
        return cls()

    def sort(self, entries: list[Entry]) -> None:
        """Sort in place."""
        entries.sort(key=lambda entry: entry.name)
        if self.by == "size":
            entries.sort(key=lambda entry: entry.size, reverse=self.descending)
        elif self.by == "time":
            entries.sort(key=lambda entry: entry.modified, reverse=self.descending)
        elif self.descending:
            entries.reverse()
        entries.sort(key=lambda entry: not entry.is_directory)


class Template:
    """A page's form: ours, or an operator's, in Jinja."""

    def __init__(self, source: str, name: str) -> None:
        """Raises SettingsError if `source` is no template; `name` is told then."""
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as exc:
            raise SettingsError(f"listing_template: {name}: line {exc.lineno}: {exc.message}") from exc
        self._name = name

    def check(self) -> None:
        """Render a small folder. Raises SettingsError if the template asks for what there is not."""
        try:
            for _ in self.render(Path((b"folder",), True), [Entry(b"file", False, 1, 0), Entry(b"dir", True, 0, 0)], Order()):
                pass
        except Exception as exc:  # a template can raise anything
            raise SettingsError(f"listing_template: {self._name}: {exc}") from exc

    def render(self, path: Path, entries: Sequence[Entry], order: Order, *, cut: int = 0) -> Iterator[bytes]:
        """Yield the page in pieces. `cut` is the number of entries that are shown if there are more, else 0."""
        names = [segment.decode("utf-8", "replace") for segment in path.segments]
        crumbs = [
            {"text": name, "href": "../" * (len(names) - 1 - at) or "./"}
            for at, name in enumerate(names)
        ]  # fmt: skip
        facts = {
            "path": "/" + "".join(f"{name}/" for name in names),
            "crumbs": crumbs,
            "top": "../" * len(names) or "./",
            "entries": entries,
            "order": order,
            "folders": sum(entry.is_directory for entry in entries),
            "files": sum(not entry.is_directory for entry in entries),
            "total": human_size(sum(entry.size for entry in entries)),
            "cut": cut,
        }
        piece: list[str] = []
        length = 0
        for text in self._template.generate(**facts):
            piece.append(text)
            length += len(text)
            if length >= _PIECE:
                yield "".join(piece).encode("utf-8", "replace")
                piece.clear()
                length = 0
        yield "".join(piece).encode("utf-8", "replace")


def render_json(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Yield a JSON array in pieces, in the form of nginx's autoindex_format json: name, type, mtime, size."""
    piece, length, separator = ["["], 0, "\n"
    for entry in entries:
        row: dict[str, object] = {
            "name": entry.name.decode("utf-8", "replace"),
            "type": "directory" if entry.is_directory else "file",
            "mtime": semantics.http_date(entry.modified).decode("ascii"),
        }
        if not entry.is_directory:
            row["size"] = entry.size
        if b"\xef\xbf\xbd" in entry.name or "\ufffd" in str(row["name"]):
            row["href"] = entry.href  # the name alone would not lead there
        text = separator + json.dumps(row, ensure_ascii=False)
        piece.append(text)
        length += len(text)
        separator = ",\n"
        if length >= _PIECE:
            yield "".join(piece).encode("utf-8")
            piece, length = [], 0
    yield ("".join(piece) + "\n]\n").encode("utf-8")
