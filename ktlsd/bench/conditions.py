"""What a measurement stands on: files of noise, a page cache that is warm or cold, a network with delay and loss."""

import contextlib
import ctypes
import datetime
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ktlsd.bench.answers import NotMeasurable, Payload
from ktlsd.net.residency import PAGE

_BLOCK: Final = 1 << 20
_SHM: Final = Path("/dev/shm")  # noqa: S108  # a tmpfs on every Linux
_SPARE: Final = 512 << 20  # bytes of memory that others shall keep
_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
_QUEUE: Final = 1_000_000  # packets netem holds; its own limit of 1,000 would drop what is only on its way
_libc: Final = ctypes.CDLL(None, use_errno=True)


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


def evict(payload: Payload) -> None:
    """Take the file out of the page cache. Raises NotMeasurable if it stays there, as on tmpfs, or if nobody can tell."""
    where = payload.path.parent
    with payload.path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        probe = memoryview(bytearray(1))
        for offset in {0, payload.size // 2 // PAGE * PAGE, payload.size - 1}:
            try:
                os.preadv(file.fileno(), [probe], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise NotMeasurable(f"no cold cache in {where}: {exc.strerror}. Is it tmpfs? Name another folder") from exc
            raise NotMeasurable(f"no cold cache in {where}: the file stays in memory. Is it tmpfs? Name another folder")


# --- the network -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def network(delay_ms: float, loss_percent: float) -> Iterator[None]:
    """Be in a network namespace of our own, whose loopback delays (each way) and loses; processes started from here on too.

    Only the calling thread is moved, and moved back at the end. Raises NotMeasurable: not root, no tools, no netem.
    """
    if not delay_ms and not loss_percent:
        yield
        return
    if os.geteuid() != 0:
        raise NotMeasurable("delay and loss need root: a network namespace and netem")
    tools = [shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") for tool in ("ip", "tc")]
    ip, tc = (tool or "" for tool in tools)
    if not ip or not tc:
        raise NotMeasurable("delay and loss need `ip` and `tc`: apt-get install iproute2")
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.unshare(_CLONE_NEWNET):
            raise NotMeasurable(f"no network namespace: {os.strerror(ctypes.get_errno())}")
        try:
            # Packets as they are on a wire: netem loses what it is given whole, which on loopback would be 64 KiB.
            _run(ip, "link", "set", "dev", "lo", "mtu", "1500", "gso_max_segs", "1", "up")
            netem = ["delay", f"{delay_ms}ms"] if delay_ms else []
            netem += ["loss", f"{loss_percent}%"] if loss_percent else []
            _run(tc, "qdisc", "add", "dev", "lo", "root", "netem", "limit", str(_QUEUE), *netem)
            yield
        finally:
            _libc.setns(home, _CLONE_NEWNET)
    finally:
        os.close(home)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # ours
    if done.returncode:
        raise NotMeasurable(f"{' '.join(command[:1] + command[2:4])}: {done.stderr.strip().splitlines()[0]}")
