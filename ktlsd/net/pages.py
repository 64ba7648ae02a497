"""Pages of memory into a socket without a copy: vmsplice into a pipe, splice from there (vmsplice(2), splice(2)).

What is in the pipe and was not taken by the socket is thrown away again: it was only referred to.
"""

import ctypes
import errno
import fcntl
import mmap
import os
from array import array
from typing import Final

from ktlsd.slices import FRAME_HEADER

_PIPE_SIZES: Final = 4 << 20, 1 << 20  # bytes: what root may ask for, and anybody (fs.pipe-max-size)
IOV_MAX: Final = 1_024  # vectors one call takes
_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Buffer(ctypes.Structure):
    """Py_buffer, as far as it matters (Python/C API, buffer protocol)."""

    _fields_ = (("address", ctypes.c_void_p), ("rest", ctypes.c_byte * 128))


def address_of(mapping: mmap.mmap) -> int:
    """Return where a mapping begins; it stays there until it is closed."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(buffer), 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return int(buffer.address)


def address_of_bytes(data: bytes) -> int:
    """Return where a bytes object has its bytes; it stays there as long as the object lives."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


class PagePipe:
    """The pipe of one process; empty between calls."""

    def __init__(self) -> None:
        """Raises OSError: no descriptors. A smaller pipe (fs.pipe-user-pages-soft) only takes more calls."""
        self._out, self._in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        for size in _PIPE_SIZES:
            try:
                fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, size)
                break
            except PermissionError:
                continue

    def send(self, fd: int, vectors: "array[int]", *, more: bool) -> tuple[int, int | None]:
        """Send pages, given as address and length one after the other; return how many bytes were offered and accepted.

        Offers what the pipe can refer to, of frames only whole ones: a header is a vector of 9 bytes. Accepted None: would
        block. Raises OSError of vmsplice (EFAULT: not all of the first frame is there) or splice; nothing is left in the pipe.
        """
        vector_count = min(len(vectors) // 2, IOV_MAX)
        there: int = _libc.vmsplice(self._in, ctypes.c_void_p(vectors.buffer_info()[0]), vector_count, os.SPLICE_F_NONBLOCK)
        if there < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        left, accepted = there, None
        try:
            offered = _whole_frames(vectors[: 2 * vector_count], there)
            accepted = os.splice(self._out, fd, offered, flags=os.SPLICE_F_NONBLOCK | (os.SPLICE_F_MORE if more else 0))
            left -= accepted
        except BlockingIOError:
            pass
        finally:
            while left:
                left -= os.splice(self._out, self._null, left)
        return offered, accepted

    def close(self) -> None:
        """Close it."""
        for fd in (self._out, self._in, self._null):
            os.close(fd)


def _whole_frames(vectors: "array[int]", there: int) -> int:
    """Return how many of `there` bytes are whole frames, or the rest of one that has begun. Raises OSError(EFAULT)."""
    lengths = vectors[1::2]
    total = begun = 0  # `begun` is where the last frame does
    is_header = False
    for length in lengths:
        is_header = length == FRAME_HEADER and not is_header  # a payload may have 9 bytes too
        if is_header:
            begun = total
        if total + length > there:
            break
        total += length
    else:
        return total
    if begun or lengths[0] != FRAME_HEADER:
        return begun or there
    raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def open_pipe() -> PagePipe | None:
    """Return a pipe, None where there can be none: a filter (seccomp) forbids it, or the user has too many."""
    try:
        pipe = PagePipe()
    except OSError:
        return None
    try:
        _, taken = pipe.send(pipe._null, array("Q", (address_of_bytes(b"probe"), 5)), more=False)
    except (OSError, AttributeError):
        taken = None
    if taken == 5:
        return pipe
    pipe.close()
    return None


LOST: Final = frozenset((errno.EFAULT, errno.ENOMEM))  # what vmsplice says when pages can't be had
