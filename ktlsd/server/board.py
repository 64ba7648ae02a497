"""What the processes of one server let each other see: shared memory with a place for each worker.

Only its worker writes to a place, so nothing is locked: counters are words that are written whole, and of two reports one is
read while the other is written. What a worker wrote outlives it: next to nothing that was counted is lost with a crash.
"""

import hashlib
import logging
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Final

from ktlsd.errors import StartError

_log = logging.getLogger("ktlsd")
_LAYOUT: Final = 3  # a number for the layout below: another program's board is not read
_HEAD: Final = struct.Struct("=QII16s")  # layout, places that were ever taken, serial, key for hashing clients
_SERIAL_AT: Final = 12
_HEAD_SIZE: Final = 4096
_PLACE: Final = struct.Struct("=IIQII")  # pid, state, last sign of life (monotonic ns), connections, which report is the last
_OPEN_AT: Final = 16
_WHICH_AT: Final = 20
_WORD: Final = struct.Struct("=I")
_COUNT: Final = struct.Struct("=H")
_REPORT_MAX: Final = 32_764  # bytes
_REPORTS_AT: Final = 64  # two, each with its length before it: one is read while the other is written
_COUNTS: Final = 65_536  # in each of two rows; a name is counted once in each, and has the lesser of the two
_COUNTS_AT: Final = 69_632
_PLACE_SIZE: Final = _COUNTS_AT + 2 * _COUNTS * _COUNT.size + 4096
PLACES: Final = 512
_SIZE: Final = _HEAD_SIZE + PLACES * _PLACE_SIZE  # address space: memory is what is written to
_TRIES: Final = 100


class State(IntEnum):
    """What a place's worker does."""

    FREE = 0
    STARTING = 1
    SERVING = 2
    LEAVING = 3  # takes no new connections


class Board:
    """All places. Made by the supervisor before it forks."""

    def __init__(self, fd: int | None = None) -> None:
        """Without `fd` a new one, else that of an earlier program. Raises StartError if it is laid out differently."""
        self.fd = os.memfd_create("ktlsd-board") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, _SIZE)
        elif os.fstat(fd).st_size != _SIZE:
            raise StartError("the earlier program's board has another size")
        self.memory = mmap.mmap(self.fd, _SIZE)
        if fd is None:
            _HEAD.pack_into(self.memory, 0, _LAYOUT, 0, 0, os.urandom(16))
        elif _HEAD.unpack_from(self.memory)[0] != _LAYOUT:
            raise StartError("the earlier program's board has another layout")
        self.key: bytes = _HEAD.unpack_from(self.memory)[3]

    def take(self, pid: int) -> "Place":
        """Give a free place to a worker; the supervisor's to call. Raises StartError if there is none."""
        for number in range(PLACES):
            place = Place(self, number)
            if place.state is State.FREE:
                high: int = _HEAD.unpack_from(self.memory)[1]
                if number < high:
                    place.wipe()
                place.give_to(pid)
                _WORD.pack_into(self.memory, 8, max(high, number + 1))
                return place
        raise StartError(f"{PLACES} workers are running; let older ones end first")

    def places(self) -> Iterator["Place"]:
        """Yield the places that are taken."""
        for number in range(_HEAD.unpack_from(self.memory)[1]):
            place = Place(self, number)
            if place.state is not State.FREE:
                yield place

    @property
    def serial(self) -> int:
        """Odd while counts move from one place to another: they are in both, or in neither."""
        serial: int = _WORD.unpack_from(self.memory, _SERIAL_AT)[0]
        return serial

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Move counts from one place to another; the supervisor's to do. `settled` waits for the end of it."""
        for change in (True, False):
            _WORD.pack_into(self.memory, _SERIAL_AT, (self.serial + 1) & 0xFFFFFFFF)
            if change:
                yield

    def settled(self) -> Iterator[list["Place"]]:
        """Yield the places that are taken until what was read of them belongs together, a hundred times at most."""
        for _ in range(_TRIES):
            before = self.serial
            yield list(self.places())
            if not before & 1 and self.serial == before:
                return

    def close(self) -> None:
        """Let go of the memory."""
        self.memory.close()
        os.close(self.fd)


class Place:
    """One worker's part of the board."""

    __slots__ = ("_at", "_memory", "number")

    def __init__(self, board: Board, number: int) -> None:
        self.number = number
        self._memory = board.memory
        self._at = _HEAD_SIZE + number * _PLACE_SIZE

    def wipe(self) -> None:
        """Forget everything that an earlier worker wrote; the place is free afterwards."""
        self._memory[self._at : self._at + _PLACE_SIZE] = bytes(_PLACE_SIZE)

    def give_to(self, pid: int) -> None:
        """It is this worker's from now on."""
        _PLACE.pack_into(self._memory, self._at, pid, State.STARTING, 0, 0, 0)

    @property
    def pid(self) -> int:
        """Whose it is."""
        pid: int = _WORD.unpack_from(self._memory, self._at)[0]
        return pid

    @property
    def state(self) -> State:
        """What its worker does."""
        number = _WORD.unpack_from(self._memory, self._at + 4)[0]
        return State(number) if number <= State.LEAVING else State.LEAVING

    @state.setter
    def state(self, state: State) -> None:
        _WORD.pack_into(self._memory, self._at + 4, state)

    @property
    def last_beat(self) -> float:
        """Its worker's last sign of life, monotonic seconds; 0 before the first."""
        nanoseconds: int = _PLACE.unpack_from(self._memory, self._at)[2]
        return nanoseconds / 1e9

    def beat(self, now: float) -> None:
        """Show a sign of life."""
        struct.pack_into("=Q", self._memory, self._at + 8, int(now * 1e9))

    @property
    def connections(self) -> int:
        """How many its worker has."""
        count: int = _WORD.unpack_from(self._memory, self._at + _OPEN_AT)[0]
        return count

    @connections.setter
    def connections(self, count: int) -> None:
        _WORD.pack_into(self._memory, self._at + _OPEN_AT, count)

    def publish(self, report: bytes) -> bool:
        """Put up a report; whether there was room for it."""
        if len(report) > _REPORT_MAX:
            return False
        which = 1 - _WORD.unpack_from(self._memory, self._at + _WHICH_AT)[0]
        start = self._report_at(which)
        self._memory[start : start + len(report)] = report
        _WORD.pack_into(self._memory, start - _WORD.size, len(report))
        _WORD.pack_into(self._memory, self._at + _WHICH_AT, which)
        return True

    def report(self) -> bytes:
        """Return the last report, b"" if there is none."""
        which = _WORD.unpack_from(self._memory, self._at + _WHICH_AT)[0]
        start = self._report_at(which)
        length = _WORD.unpack_from(self._memory, start - _WORD.size)[0]
        return self._memory[start : start + min(length, _REPORT_MAX)]

    def _report_at(self, which: int) -> int:
        return self._at + _REPORTS_AT + which * (_WORD.size + _REPORT_MAX) + _WORD.size

    def count(self, row: int, column: int, change: int = 0) -> int:
        """Change a count of clients, if asked to, and return it."""
        at = self._at + _COUNTS_AT + (row * _COUNTS + column) * _COUNT.size
        value: int = _COUNT.unpack_from(self._memory, at)[0]
        if change:
            value = min(max(value + change, 0), 0xFFFF)
            _COUNT.pack_into(self._memory, at, value)
        return value


class Tally:
    """Connections by client, over all workers, in fixed memory.

    A name is hashed with a key nobody knows into two counts, of which the lesser counts. Others may share them: then it is too
    high. With 1,000 names that happens to one in some 4,000, by one or two; with 40,000 to one in five.
    """

    def __init__(self, board: Board, place: Place) -> None:
        self._board = board
        self._place = place

    def add(self, name: bytes) -> int:
        """Count one more; return how many there are now."""
        columns = self._columns(name)
        for row, column in enumerate(columns):
            self._place.count(row, column, +1)
        totals = [0, 0]
        for place in self._board.places():
            for row, column in enumerate(columns):
                totals[row] += place.count(row, column)
        return min(totals)

    def remove(self, name: bytes) -> None:
        """Count one less."""
        for row, column in enumerate(self._columns(name)):
            self._place.count(row, column, -1)

    def _columns(self, name: bytes) -> tuple[int, int]:
        digest = hashlib.blake2b(name, digest_size=8, key=self._board.key).digest()
        return int.from_bytes(digest[:4], "big") % _COUNTS, int.from_bytes(digest[4:], "big") % _COUNTS


def board_of(fd: int | None) -> tuple[Board, bool]:
    """Return the board of the program that was here before, if we can read it, else a new one; and which it is."""
    if fd is not None:
        try:
            return Board(fd), True
        except StartError as error:
            _log.warning("upgrade: %s; what running workers have counted since is lost", error)
    return Board(), False
