"""Asking the kernel how much of a file is in memory: cachestat(2), since 6.5; there is no wrapper for it."""

import ctypes
import errno
import os
from typing import Final

from ktlsd import uapi

PAGE: Final = os.sysconf("SC_PAGE_SIZE")  # bytes
_libc = ctypes.CDLL(None, use_errno=True)
_answer = ctypes.create_string_buffer(uapi.cachestat.size)
_works = True  # until the kernel doesn't know the call, or a filter forbids it


def pages_cached(fd: int, offset: int, length: int) -> int | None:
    """Return how many of the pages with these bytes are in memory, None if the kernel doesn't say. `length` is not 0."""
    global _works
    if not _works:
        return None
    question = uapi.cachestat_range.pack(offset, length)
    if _libc.syscall(uapi.SYS_cachestat, fd, question, _answer, 0) < 0:
        if ctypes.get_errno() == errno.ENOSYS:
            _works = False
        return None  # this file: not ours (EPERM), or of a file system that can't tell (EOPNOTSUPP)
    cached: int = uapi.cachestat.unpack_from(_answer)[0]
    return cached
