"""What h2 keeps for a connection, as small as it can be, and no larger because a peer wants it to be.

Of its own making an idle connection's state takes 10 KB: a deque (760 bytes) for each setting and each HPACK table, tables
and an encoder that are the same for all connections, an entry for each stream that ever was; and a setting that nobody has
heard of is kept like every other (65,536 of them: 50 MB). What is here has the same doors. It is held against h2's own in
tests/unit/test_engine.py.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any, Final

from h2.connection import H2Connection
from h2.settings import ChangedSetting, SettingCodes, Settings
from h2.stream import StreamClosedBy

_MAX_RESETS: Final = 256
_MAX_RANGES: Final = 64
_BY_RESET: Final = (StreamClosedBy.SEND_RST_STREAM, StreamClosedBy.RECV_RST_STREAM)


class OurSettings(Settings):
    """What we say of ourselves: the same for all connections, and for good."""

    def __setitem__(self, key: SettingCodes | int, value: int) -> None:
        raise TypeError("these settings are shared, and never change")


class PeerSettings(Settings):
    """What a client says of itself: the settings h2 knows, where they are not the default; all others are ignored
    (RFC 9113 §6.5.2).
    """

    _DEFAULTS: Final = dict(Settings(client=True))
    _NONE: Final[dict[SettingCodes | int, int]] = {}

    def __init__(self) -> None:
        self._client = True
        self._said = self._proposed = self._NONE  # never changed, only replaced

    def __getitem__(self, key: SettingCodes | int) -> int:
        value = self._said.get(key)
        return self._DEFAULTS[key] if value is None else value

    def __setitem__(self, key: SettingCodes | int, value: int) -> None:
        if key in self._DEFAULTS:
            self.validate_received_setting(key, value)
            self._proposed = self._proposed | {key: value}

    def __iter__(self) -> Iterator[SettingCodes | int]:
        return iter(self._DEFAULTS)

    def __len__(self) -> int:
        return len(self._DEFAULTS)

    def acknowledge(self) -> dict[SettingCodes | int, ChangedSetting]:
        """Have what was said since the last time count, and return it."""
        changed = {key: ChangedSetting(key, self[key], value) for key, value in self._proposed.items()}
        said = self._said | self._proposed
        self._said = {key: value for key, value in said.items() if value != self._DEFAULTS[key]}
        self._proposed = self._NONE
        return changed


class ClosedStreams:
    """How streams ended, the latest of them: those that were reset one by one, the others as ranges of odd numbers."""

    __slots__ = ("_ended", "_resets")

    def __init__(self) -> None:
        self._ended: list[int] = []  # first, last, first, last, …
        self._resets: dict[int, StreamClosedBy] | None = None

    def __setitem__(self, stream_id: int, how: StreamClosedBy | None) -> None:
        if how in _BY_RESET:
            self._resets = self._resets or {}
            self._resets[stream_id] = how
            if len(self._resets) > _MAX_RESETS:
                del self._resets[next(iter(self._resets))]
        elif how is not None:
            self.ended(stream_id)

    def ended(self, stream_id: int) -> None:
        """A stream has come to its end."""
        ranges = self._ended
        if ranges and ranges[-1] == stream_id - 2:
            ranges[-1] = stream_id
            return
        at = bisect_left(ranges, stream_id)
        if self._is_in_range(at, stream_id):
            return
        left, right = at > 0 and ranges[at - 1] == stream_id - 2, at < len(ranges) and ranges[at] == stream_id + 2
        if left and right:
            del ranges[at - 1 : at + 1]
        elif left:
            ranges[at - 1] = stream_id
        elif right:
            ranges[at] = stream_id
        else:
            ranges[at:at] = (stream_id, stream_id)
            if len(ranges) > 2 * _MAX_RANGES:
                del ranges[:2]

    def _is_in_range(self, at: int, stream_id: int) -> bool:
        return at % 2 == 1 or (at < len(self._ended) and self._ended[at] == stream_id)

    def get(self, stream_id: int) -> StreamClosedBy | None:
        """Return how a stream ended: for h2 it is the same which side ended it. None if that isn't known."""
        if self._resets and stream_id in self._resets:
            return self._resets[stream_id]
        ended = stream_id % 2 == 1 and self._is_in_range(bisect_left(self._ended, stream_id), stream_id)
        return StreamClosedBy.SEND_END_STREAM if ended else None

    def __contains__(self, stream_id: int) -> bool:
        return self.get(stream_id) is not None

    def __getitem__(self, stream_id: int) -> StreamClosedBy | None:
        return self.get(stream_id)


class Entries(list[tuple[bytes, bytes]]):
    """HPACK's dynamic table: what hpack needs of a deque. It has 128 entries at most."""

    __slots__ = ()

    def appendleft(self, entry: tuple[bytes, bytes]) -> None:
        """Put an entry before all others."""
        self.insert(0, entry)


class NoEncoder:
    """In place of h2's: header blocks are made by `header_blocks`, which uses no table, whatever size the client allows."""

    __slots__ = ()

    @property
    def header_table_size(self) -> int:
        """None is used."""
        return 0

    @header_table_size.setter
    def header_table_size(self, value: int) -> None:
        pass


class Dispatch:
    """What handles which frame, found when there is one; h2 keeps a bound method for each kind."""

    __slots__ = ("_engine",)

    _NAMES: Final = {kind: method.__name__ for kind, method in H2Connection()._frame_dispatch_table.items()}

    def __init__(self, engine: H2Connection) -> None:
        self._engine = engine

    def __getitem__(self, kind: type) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self._engine, self._NAMES[kind])
        return method
