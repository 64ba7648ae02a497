"""What processes cost: CPU seconds, context switches, page faults, memory, system calls; and whether the kernel encrypted."""

import contextlib
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

TLS_STAT: Final = Path("/proc/net/tls_stat")
_CPUCLOCK_SCHED: Final = 2  # linux/posix-timers.h: a process's CPU clock, in nanoseconds where the kernel counts them
_RESET_PEAK: Final = "5"  # proc(5), clear_refs: since 4.0
_CALL: Final = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", re.MULTILINE)
_ATTACH: Final = 10.0  # seconds


class Usage(msgspec.Struct, frozen=True):
    """CPU in seconds, faults and switches as numbers, `peak` bytes of resident memory (of processes together: the sum)."""

    user: float = 0.0
    system: float = 0.0
    switches: int = 0
    minor_faults: int = 0
    major_faults: int = 0
    peak: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(a + b for a, b in zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)))

    def since(self, before: "Usage") -> "Usage":
        """Return what came in between; `peak` stays what it is.

        CPU time is exact as a sum; how much of it was the user's may be off by a clock tick.
        """
        seconds = max((self.user + self.system) - (before.user + before.system), 0.0)
        user = min(max(self.user - before.user, 0.0), seconds)
        return Usage(
            user,
            seconds - user,
            max(self.switches - before.switches, 0),
            max(self.minor_faults - before.minor_faults, 0),
            max(self.major_faults - before.major_faults, 0),
            self.peak,
        )


# --- this process ------------------------------------------------------------------------------------------------------


def own() -> Usage:
    """Return what this process has used."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    switches = spent.ru_nvcsw + spent.ru_nivcsw
    return Usage(spent.ru_utime, spent.ru_stime, switches, spent.ru_minflt, spent.ru_majflt, _peak(Path("/proc/self")))


def reset_peak(pids: Iterable[int | str]) -> None:
    """Have the peak of these processes begin anew, where that is allowed."""
    for pid in pids:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK)


# --- others ------------------------------------------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """Return a process and all its descendants that live."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))) and fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, new = [], [pid]
    while new:
        found += new
        new = [child for parent in new for child in children.get(parent, ())]
    return found


def of(pids: Iterable[int]) -> Usage:
    """Return what processes, all their threads, have used; those that are gone count nothing."""
    return sum((_of_one(pid) for pid in pids), Usage())


def _of_one(pid: int) -> Usage:
    fields = _stat(pid)
    if not fields:
        return Usage()
    user, system = int(fields[11]), int(fields[12])  # clock ticks, 10 ms: good for the ratio, not for the sum
    try:
        seconds = time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)
    except OSError:
        return Usage()
    share = user / (user + system) if user + system else 0.0
    process = Path(f"/proc/{pid}")
    switches = sum(_switches(status) for status in process.glob("task/*/status"))
    return Usage(seconds * share, seconds * (1 - share), switches, int(fields[7]), int(fields[9]), _peak(process))


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third (state) on; none if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _switches(status: Path) -> int:
    try:
        return sum(int(count) for count in re.findall(r"ctxt_switches:\s+(\d+)", status.read_text()))
    except OSError:
        return 0


def _peak(process: Path) -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


# --- system calls ------------------------------------------------------------------------------------------------------


class CallCounter:
    """strace on processes that run. `total` has the number of system calls when it has ended."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.calls: dict[str, int] = {}


@contextlib.contextmanager
def calls_of(pids: Iterable[int]) -> Iterator[CallCounter]:
    """Count the calls of these processes and their threads; not at all without strace, or where it may not look."""
    counter = CallCounter()
    strace = shutil.which("strace")
    wanted = [part for pid in pids for part in ("-p", str(pid))]
    if strace is None or not wanted:
        yield counter
        return
    with tempfile.NamedTemporaryFile() as report:
        with subprocess.Popen(  # noqa: S603  # nobody else's words are in it
            [strace, "-f", "-c", "-o", report.name, *wanted], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as tracer:
            try:
                assert tracer.stderr is not None
                attached = all("attached" in tracer.stderr.readline() for _ in range(len(wanted) // 2))
                yield counter
            finally:
                tracer.send_signal(signal.SIGINT)
                try:
                    tracer.wait(_ATTACH)
                except subprocess.TimeoutExpired:
                    tracer.kill()
                    attached = False
        if attached:
            text = Path(report.name).read_text()
            counter.calls = {name: int(count) for count, name in _CALL.findall(text) if name != "total"}
            counter.total = sum(counter.calls.values())


# --- who encrypted -----------------------------------------------------------------------------------------------------


def handed_over(tls_stat: Path = TLS_STAT) -> int | None:
    """Return how many connections the kernel has ever taken to encrypt for (TlsTxSw, TlsTxDevice); None if it doesn't tell.

    All of this network namespace count, those of other programs too.
    """
    try:
        rows = dict(line.split() for line in tls_stat.read_text().splitlines())
        return int(rows["TlsTxSw"]) + int(rows.get("TlsTxDevice", 0))
    except (OSError, KeyError, ValueError):
        return None


def cpu_step() -> float:
    """Return by how much CPU clocks go on at a time, in seconds: 10 ms where the kernel counts ticks only."""
    before, end = time.process_time(), time.monotonic() + 0.1
    while (now := time.process_time()) == before and time.monotonic() < end:
        pass
    return now - before
