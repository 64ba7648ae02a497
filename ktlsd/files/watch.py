"""Noticing that files have changed (inotify(7)), without looking at them again and again.

Folders are watched and not files: who renews a certificate writes a new file and moves it, or the link to it, into place.
"""

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_IN_CLOSE_WRITE: Final = 0x8
_IN_MOVED_TO: Final = 0x80
_IN_CREATE: Final = 0x100
_IN_ATTRIB: Final = 0x4
_WANTED: Final = _IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_CREATE | _IN_ATTRIB
_MAX_LINKS: Final = 40  # as the kernel's own limit
_IN_NONBLOCK_CLOEXEC: Final = os.O_NONBLOCK | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """A source for the poller: readable when something happened in a watched folder. Where that can't be had, it never is."""

    def __init__(self) -> None:
        self._fd: int = _libc.inotify_init1(_IN_NONBLOCK_CLOEXEC)
        self._folders: dict[str, int] = {}
        self.deadline = float("inf")

    @property
    def works(self) -> bool:
        """Whether there is inotify: fs.inotify.max_user_instances, and network file systems, are against it."""
        return self._fd >= 0

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def look_after(self, files: Iterable[str]) -> None:
        """Watch the folders of these files from now on: where they are named, and where links lead; and no others."""
        wanted = {folder for file in files for folder in _folders_of(file)}
        for folder in self._folders.keys() - wanted:
            _libc.inotify_rm_watch(self._fd, self._folders.pop(folder))
        for folder in wanted - self._folders.keys():
            number = _libc.inotify_add_watch(self._fd, os.fsencode(folder), _WANTED)
            if number >= 0:
                self._folders[folder] = number

    def drain(self) -> bool:
        """Whether something has happened since the last time."""
        happened = False
        while True:
            try:
                happened = bool(os.read(self._fd, 65_536)) or happened
            except OSError:
                return happened

    def close(self) -> None:
        """Let go."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _folders_of(file: str) -> set[str]:
    """Return the folders in which something must change for the name to lead to another file: its own, and those of links."""
    folders: set[str] = set()
    path = os.path.abspath(file)
    for _ in range(_MAX_LINKS):
        folders.add(os.path.dirname(path))
        parts = [*map(str, reversed(Path(path).parents)), path]
        link = next((part for part in parts if os.path.islink(part)), None)
        if link is None:
            break
        folders.add(os.path.dirname(link))
        try:
            target = os.readlink(link)
        except OSError:
            break  # just being switched
        path = os.path.normpath(os.path.join(os.path.dirname(link), target) + path[len(link) :])
    return folders
