"""The one gate to the file system: a root directory, and `open` below it. No path leaves the root.

openat2(RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS) has the kernel refuse every step out, symbolic links and renames during
the walk included. Where the system call is missing (before 5.6) or filtered (old container runtimes), `_walk` takes the
same steps one by one. Opened first, looked at afterwards: the facts are those of the descriptor that is served.
"""

import ctypes
import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from typing import Final

from ktlsd import uapi
from ktlsd.errors import RequestError, SettingsError
from ktlsd.files.listing import Entry
from ktlsd.slices import OpenFile

# O_NONBLOCK: a FIFO in the root must not hang the worker. O_NOCTTY: nor may a terminal become ours.
_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_BENEATH: Final = uapi.RESOLVE_BENEATH | uapi.RESOLVE_NO_MAGICLINKS
_MAX_LINKS: Final = 40  # as the kernel's own limit
_RETRIES: Final = 8  # openat2 says EAGAIN when a rename somewhere raced with it

_NOT_FOUND: Final = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV, errno.EINVAL)
)


class DocumentRoot:
    """A directory that is served. `open` gives regular files, or says that a path is a directory."""

    def __init__(self, path: str, *, use_openat2: bool = True) -> None:
        """Raises SettingsError if `path` is not a directory that can be read."""
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd))
        except OSError as exc:
            remedy = {
                errno.ENOENT: "create it or name another directory",
                errno.ENOTDIR: "it is a file; name the directory it is in",
                errno.EACCES: "give the user ktlsd runs as read and execute permission (chmod o+rx)",
            }.get(exc.errno or 0, "name another directory")
            raise SettingsError(f"root: {path}: {exc.strerror}; {remedy}") from exc
        self.path = path
        self._real = os.path.realpath(path)
        self._openat2 = use_openat2 and _openat2_works(self._fd)

    @property
    def fd(self) -> int:
        """The directory's descriptor."""
        return self._fd

    @property
    def gate(self) -> str:
        """How paths are kept inside: "openat2" or "walk"."""
        return "openat2" if self._openat2 else "walk"

    def open(self, path: bytes) -> OpenFile | None:
        """Open a relative path below the root; None for a directory.

        Raises RequestError: 404 for what is not there, leads out or is no regular file, 403 for what may not be read, 503
        when descriptors run out. Anything else is OSError.
        """
        try:
            fd = self._open(path)
        except OSError as exc:
            raise _refusal(exc) from exc
        facts = os.fstat(fd)
        if stat.S_ISREG(facts.st_mode):
            return OpenFile(fd, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, (facts.st_dev, facts.st_ino))
        os.close(fd)
        if stat.S_ISDIR(facts.st_mode):
            return None
        raise RequestError(404, "There is no such file.")

    def read_small(self, path: bytes, limit: int) -> tuple[OpenFile, bytes] | None:
        """Return the facts and contents of a regular file of at most `limit` bytes, None for anything else; closes it."""
        try:
            file = self.open(path)
        except (RequestError, OSError):
            return None
        if file is None:
            return None
        try:
            return (file, os.pread(file.fd, limit, 0)) if file.size <= limit else None
        except OSError:
            return None
        finally:
            file.release()

    def scan(self, path: bytes) -> Iterator[Entry | None]:
        """Yield what is in a folder and could be served from it, unsorted; None for each name that could not.

        Names with a dot in front are left out, so are links that lead nowhere or out of the root.
        Raises RequestError as `open`.
        """
        try:
            fd = self._open(path)
        except OSError as exc:
            raise _refusal(exc) from exc
        return self._entries(fd, path)

    def _entries(self, fd: int, path: bytes) -> Iterator[Entry | None]:
        try:
            with os.scandir(fd) as found:
                for item in found:
                    yield self._entry(os.fsencode(item.name), item, fd, path)
        except OSError:
            return  # the disk fails in the middle: what was read is shown
        finally:
            os.close(fd)

    def _entry(self, name: bytes, item: "os.DirEntry[str]", fd: int, path: bytes) -> Entry | None:
        if name.startswith(b".") or b"\\" in name:  # which no request can name
            return None
        try:
            if item.is_symlink():  # through the gate, like a request for it
                target = self._open(path + b"/" + name)
                try:
                    facts = os.fstat(target)
                finally:
                    os.close(target)
            else:
                facts = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError:
            return None
        if not stat.S_ISREG(facts.st_mode) and not stat.S_ISDIR(facts.st_mode):
            return None
        is_directory = stat.S_ISDIR(facts.st_mode)
        return Entry(name, is_directory, 0 if is_directory else facts.st_size, int(facts.st_mtime))

    def _open(self, path: bytes) -> int:
        try:
            return self._open_beneath(path, _BENEATH)
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
        # A link with an absolute target, which BENEATH refuses, may still lead back inside. Resolve by name, then open
        # the result without following any link: whatever changes in between, the way can't lead out.
        try:
            real = os.path.realpath(os.path.join(os.fsencode(self._real), path))
        except RecursionError as exc:  # a thousand links in a row
            raise OSError(errno.ELOOP, "too many links") from exc
        inside = os.path.relpath(real, os.fsencode(self._real))
        if inside == b".." or inside.startswith(b"../"):
            raise OSError(errno.EXDEV, "leads out of the root")
        return self._open_beneath(inside, _BENEATH | uapi.RESOLVE_NO_SYMLINKS)

    def _open_beneath(self, path: bytes, resolve: int) -> int:
        if not self._openat2:
            return _walk(self._fd, path, follow=not resolve & uapi.RESOLVE_NO_SYMLINKS)
        for _ in range(_RETRIES):
            try:
                return _call_openat2(self._fd, path, resolve)
            except OSError as exc:
                if exc.errno not in (errno.EAGAIN, errno.EINTR):
                    raise
        raise OSError(errno.EAGAIN, "renames kept racing with openat2")

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._fd)


def _refusal(exc: OSError) -> RequestError:
    if exc.errno in _NOT_FOUND:
        return RequestError(404, "There is no such file.")
    if exc.errno in (errno.EACCES, errno.EPERM):
        return RequestError(403, "This may not be read.")
    if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EBUSY):
        return RequestError(503, "The server is at its limit; try again in a moment.")
    return RequestError(500, "The file can't be read.")  # EIO, ESTALE, EOVERFLOW, and what network file systems come up with


_libc = ctypes.CDLL(None, use_errno=True)


def _call_openat2(dir_fd: int, path: bytes, resolve: int) -> int:
    how = uapi.open_how.pack(_FLAGS, 0, resolve)
    fd: int = _libc.syscall(uapi.SYS_openat2, dir_fd, path, how, len(how))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd


def _openat2_works(dir_fd: int) -> bool:
    try:
        os.close(_call_openat2(dir_fd, b".", _BENEATH))
    except OSError:
        return False  # ENOSYS: an older kernel; EPERM: a seccomp filter that doesn't know the call
    return True


def _walk(root_fd: int, path: bytes, *, follow: bool) -> int:
    """Open `path` below `root_fd` name by name, never following a link but by reading it, never above the root.

    Every directory on the way stays open until the end, so ".." in a link's target leads to where we came from and not
    to where a rename has put it. Raises OSError(EXDEV) for a step out, ELOOP for too many links.
    """
    names = deque(name for name in path.split(b"/") if name not in (b"", b"."))
    parents = [os.dup(root_fd)]
    links = 0
    try:
        while names:
            name = names.popleft()
            if name == b"..":
                if len(parents) == 1:
                    raise OSError(errno.EXDEV, "leads out of the root")
                os.close(parents.pop())
                continue
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parents[-1])
            try:
                mode = os.fstat(fd).st_mode
                if stat.S_ISLNK(mode):
                    links += 1
                    if not follow or links > _MAX_LINKS:
                        raise OSError(errno.ELOOP, "too many links")
                    target = os.readlink(b"", dir_fd=fd)
                    if target.startswith(b"/"):
                        raise OSError(errno.EXDEV, "absolute link")
                    names.extendleft(reversed([part for part in target.split(b"/") if part not in (b"", b".")]))
                    continue
                if stat.S_ISDIR(mode):
                    parents.append(os.dup(fd))
                    continue
            finally:
                os.close(fd)
            if names:
                raise OSError(errno.ENOTDIR, "not a directory")
            return os.open(name, _FLAGS | os.O_NOFOLLOW, dir_fd=parents[-1])
        return os.open(".", _FLAGS | os.O_DIRECTORY, dir_fd=parents[-1])
    finally:
        for fd in parents:
            os.close(fd)
