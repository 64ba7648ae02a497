"""What one worker counts, plain numbers by name, and the report of them that the others can read."""

import os
import resource
from bisect import bisect_left
from collections import Counter
from typing import Final

import msgspec

READ_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # seconds
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Memory(msgspec.Struct, frozen=True):
    """What a process occupies, as the kernel counts it. Bytes."""

    resident: int = 0
    resident_at_start: int = 0
    minor_faults: int = 0
    major_faults: int = 0


class Report(msgspec.Struct):
    """One worker's counts so far. `counters` by name, and where it helps by reasons behind colons."""

    generation: int = 0
    counters: dict[str, int] = {}
    reads: list[int] = []  # reads ahead by how long they took: one count for each of READ_BUCKETS, and one for longer ones
    read_seconds: float = 0.0
    memory: Memory = Memory()
    answering: int = 0  # requests that have been understood and whose response has not ended
    certificates: dict[str, float] = {}  # when each ends, seconds since the epoch; only the supervisor's
    rates: dict[str, tuple[float, int]] = {}  # by client: bytes a second, connections (only with limits.bandwidth)
    started: float = 0.0  # when the program was, seconds since the epoch; only the supervisor's


def read_report(text: bytes) -> Report | None:
    """Return a report that was put up; None if it can't be understood: its place was just wiped, or its worker is not ours."""
    try:
        return msgspec.json.decode(text or b"{}", type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class Metrics:
    """What has happened so far. `count` takes a name and, where it helps, a reason behind a colon."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.reads = [0] * (len(READ_BUCKETS) + 1)
        self.read_seconds = 0.0
        self.answering = 0

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter."""
        self.counters[name] += amount

    def read_took(self, seconds: float) -> None:
        """A read ahead is done."""
        self.reads[bisect_left(READ_BUCKETS, seconds)] += 1
        self.read_seconds += seconds

    def summary(self) -> str:
        """Return all counters in one line, sorted by name."""
        return " ".join(f"{name}={value}" for name, value in sorted(self.counters.items()))


class MemoryGauge:
    """Asks the kernel about this process; opened before a sandbox closes /proc."""

    def __init__(self) -> None:
        try:
            self._fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1
        self._at_start = self._resident()

    def _resident(self) -> int:
        return int(os.pread(self._fd, 256, 0).split()[1]) * _PAGE if self._fd >= 0 else 0

    def read(self) -> Memory:
        """Return how things stand."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return Memory(self._resident(), self._at_start, usage.ru_minflt, usage.ru_majflt)

    def close(self) -> None:
        """Let go of the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
