"""`ktlsd hash DIR`: compute every file's SHA-256 once, beside the server and never in it.

Results are appended to a journal as they come, so that a run that was stopped goes on where it was; at the end journal and old
index become the new index with one rename. The server reads that (files.digests).
"""

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Final

from ktlsd.errors import SettingsError, StartError
from ktlsd.files.digests import INDEX, index_line, parse_index_line

_JOURNAL: Final = INDEX + b".part"
_PIECE: Final = 1 << 20
_CHANGED: Final = "changed while it was read; run it again"
Facts = tuple[int, int]  # size in bytes, mtime in seconds


@dataclass(slots=True)
class Progress:
    """How far it is: files and bytes, those that were known already counted as done."""

    files: int = 0
    files_done: int = 0
    bytes: int = 0
    bytes_done: int = 0
    known: int = 0  # files whose digest is in the index
    bytes_known: int = 0
    problems: list[str] = field(default_factory=list)  # what could not be read, or changed meanwhile: one line each


def hash_tree(directory: str, *, jobs: int, report: Callable[[Progress], None]) -> Progress:
    """Bring the index of `directory` up to date; `report` is called about once a second. Raises SettingsError, StartError."""
    top = os.fsencode(directory)
    if not os.path.isdir(top):
        raise SettingsError(f"{directory}: {'is a file' if os.path.exists(top) else 'no such directory'}; name a directory")
    known = {**_read(os.path.join(top, INDEX)), **_read(os.path.join(top, _JOURNAL))}
    progress = Progress()
    wanted: dict[bytes, Facts] = {}
    for path, facts in _walk(top, progress.problems):
        wanted[path] = facts
        progress.files += 1
        progress.bytes += facts[0]
    todo = []
    for path, facts in wanted.items():
        if path in known and known[path][0] == facts:
            progress.files_done += 1
            progress.bytes_done += facts[0]
        else:
            todo.append(path)
    lines = {path: index_line(path, *known[path][0], known[path][1]) for path in wanted if path in known}
    for path in todo:
        lines.pop(path, None)
    try:
        with open(os.path.join(top, _JOURNAL), "ab", buffering=0) as journal:
            for path, facts, digest in _hash_all(top, todo, jobs, progress, report):
                if isinstance(digest, str):
                    progress.problems.append(f"{os.fsdecode(path)!r}: {digest}")
                else:
                    lines[path] = index_line(path, *facts, digest)
                    journal.write(lines[path])
        _replace(top, lines)
    except OSError as exc:
        raise StartError(f"{directory}: the index can't be written: {exc.strerror}") from exc
    progress.known, progress.bytes_known = len(lines), sum(wanted[path][0] for path in lines)
    report(progress)
    return progress


def _hash_all(
    top: bytes, todo: list[bytes], jobs: int, progress: Progress, report: Callable[[Progress], None]
) -> Iterator[tuple[bytes, Facts, bytes | str]]:
    last = time.monotonic()
    rest = iter(todo)
    running: set[Future[tuple[bytes, Facts, bytes | str]]] = set()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while True:
                while len(running) < 2 * jobs and (path := next(rest, None)) is not None:
                    running.add(pool.submit(_hash_one, top, path, progress))
                if not running:
                    return
                done, running = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    progress.files_done += 1
                    yield future.result()
                if time.monotonic() - last >= 1.0:
                    last = time.monotonic()
                    report(progress)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _hash_one(top: bytes, path: bytes, progress: Progress) -> tuple[bytes, Facts, bytes | str]:
    """Hash one file; return in place of the digest why there is none."""
    try:
        fd = os.open(os.path.join(top, path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        return path, (0, 0), os.strerror(exc.errno or 0)
    try:
        before = os.fstat(fd)
        # A second change within the same second would leave the time we write down: let that second be over first.
        time.sleep(min(max(before.st_mtime_ns // 1_000_000_000 + 1 - time.time(), 0.0), 1.0))
        before = os.fstat(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        digest = hashlib.sha256()
        while data := os.read(fd, _PIECE):
            digest.update(data)  # gives the interpreter to the others meanwhile
            progress.bytes_done += len(data)
        after = os.fstat(fd)
    except OSError as exc:
        return path, (0, 0), os.strerror(exc.errno or 0)
    finally:
        os.close(fd)
    same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    return (
        path,
        (after.st_size, after.st_mtime_ns // 1_000_000_000),
        digest.digest() if same else _CHANGED,
    )


def _walk(top: bytes, problems: list[str]) -> Iterator[tuple[bytes, Facts]]:
    """Yield what a server of `top` would serve: regular files, without hidden ones and links (their targets come anyway)."""
    folders = [b""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(os.path.join(top, folder) if folder else top) as found:
                for item in found:
                    name = item.name
                    if name.startswith(b"."):
                        continue
                    path = folder + b"/" + name if folder else name
                    facts = item.stat(follow_symlinks=False)
                    if stat.S_ISDIR(facts.st_mode):
                        folders.append(path)
                    elif stat.S_ISREG(facts.st_mode):
                        yield path, (facts.st_size, facts.st_mtime_ns // 1_000_000_000)
        except OSError as exc:
            problems.append(f"{os.fsdecode(folder or top)!r}: {exc.strerror}")


def _read(file: bytes) -> dict[bytes, tuple[Facts, bytes]]:
    try:
        with open(file, "rb") as lines:
            parsed = [found for line in lines if line.endswith(b"\n") and (found := parse_index_line(line))]
    except OSError:
        return {}
    return {path: ((size, mtime), digest) for path, size, mtime, digest in parsed}


def _replace(top: bytes, lines: dict[bytes, bytes]) -> None:
    """Write the new index beside the old one, then take its place."""
    fresh = os.path.join(top, INDEX + b".new")
    with open(fresh, "wb") as file:
        file.writelines(sorted(lines.values()))
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, os.path.join(top, INDEX))
    os.unlink(os.path.join(top, _JOURNAL))
