"""What a measurement stands on: a folder, files of noise, a page cache that is warm or cold."""

import contextlib
import datetime
import hashlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ktlsd.bench.answers import NotMeasurable, Payload
from ktlsd.net.residency import PAGE

_BLOCK: Final = 1 << 20
_SHM: Final = Path("/dev/shm")  # noqa: S108  # a tmpfs on every Linux
_SPARE: Final = 512 << 20  # bytes of memory that others shall keep
_TRIES, _TICK = 20, 0.05  # seconds; pages that have just been in use stay for a moment
_number: Final = itertools.count()
_ELSEWHERE: Final = "Is it tmpfs? Name another folder"


def now() -> str:
    """Return the time as RFC 3339 has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# --- files -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def folder(wanted: Path | None, needed: int, *, cold: bool) -> Iterator[Path]:
    """Make a temporary folder with room for so many bytes: below `wanted`, else in memory, but on a disk for a cold cache.

    Raises NotMeasurable if there is no room.
    """
    parent = wanted or _parent(needed, cold=cold)
    try:
        with tempfile.TemporaryDirectory(prefix="ktlsd-bench-", dir=parent, ignore_cleanup_errors=True) as name:
            if _free(Path(name)) < needed:
                raise NotMeasurable(f"{parent} has no room for {needed} bytes of files")
            yield Path(name)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as exc:
        raise NotMeasurable(f"no folder can be made in {parent}: {exc.strerror}") from exc


def _parent(needed: int, *, cold: bool) -> Path:
    if not cold and os.access(_SHM, os.W_OK) and _free(_SHM) > needed and _available_memory() > needed + _SPARE:
        return _SHM
    return Path(tempfile.gettempdir())


def _free(path: Path) -> int:
    facts = os.statvfs(path)
    return facts.f_bavail * facts.f_frsize


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def make_payload(root: Path, size: int) -> Payload:
    """Write a file of noise, no two MiB of which are equal: bytes from a wrong place shall show."""
    noise = os.urandom(_BLOCK) * 2
    path = root / f"{size}.bin"
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for number in range(-(-size // _BLOCK)):
            at = number * 4_099 % _BLOCK
            block = memoryview(noise)[at : at + min(_BLOCK, size - number * _BLOCK)]
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())  # only what is on the disk can be dropped from memory
    path.chmod(0o644)
    return Payload(path, path.name, size, digest.digest())


# --- the page cache ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cold(payload: Payload) -> Iterator[Payload]:
    """Make a copy that is not in the page cache: the file itself may be mapped by a server, and then it stays.

    Each copy has another name: servers that keep files open would send the one before. Raises NotMeasurable if a copy
    stays too, as on tmpfs, or if nobody can tell.
    """
    path = payload.path.with_name(f"cold-{next(_number)}-{payload.name}")
    shutil.copyfile(payload.path, path)
    try:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            for _ in range(_TRIES):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if not _in_memory(file.fileno(), payload):
                    break
                time.sleep(_TICK)
            else:
                raise NotMeasurable(f"no cold cache in {payload.path.parent}: a file stays in memory. {_ELSEWHERE}")
        yield Payload(path, path.name, payload.size, payload.digest)
    finally:
        path.unlink()


def _in_memory(fd: int, payload: Payload) -> bool:
    """Whether one of three pages is: the first, the last, one in the middle."""
    probe = memoryview(bytearray(1))
    for offset in {0, payload.size // 2 // PAGE * PAGE, payload.size - 1}:
        try:
            os.preadv(fd, [probe], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except OSError as exc:
            raise NotMeasurable(f"no cold cache in {payload.path.parent}: {exc.strerror}. {_ELSEWHERE}") from exc
        return True
    return False
