"""From segments to one buffer: what is sent by copying is read from files straight to where it goes.

Files are read with pread and not mapped: a mapping that is truncated under us is SIGBUS, and was no faster.
"""

import errno
import os
import time
from collections.abc import Sequence
from copy import copy
from typing import Final

from ktlsd.errors import FileCold, FileTruncated
from ktlsd.net.pages import IOV_MAX
from ktlsd.net.residency import PAGE, pages_cached
from ktlsd.slices import FRAME_HEADER, FileSlice, Framed, OpenFile, Outgoing


def gather(segments: Sequence[Outgoing], view: memoryview, skip: int = 0) -> bytes | memoryview:
    """Return what follows the first `skip` bytes of `segments` as one buffer, at most as long as `view`, which it may fill.

    A frame's header is never the last of it: if its payload can't be read the frame is left out. If that leaves nothing,
    raises FileTruncated, or FileCold for what is not in memory.
    """
    if len(segments) == 1 and isinstance(segments[0], bytes | memoryview):
        return segments[0][skip : skip + len(view)]
    filled = 0
    for segment in segments:
        size = len(segment) - skip
        if size <= 0:
            skip = -size
            continue
        room = view[filled : filled + size]
        if not room:
            break
        try:
            got = _fill(segment, skip, room)
        except (FileTruncated, FileCold):
            if filled:
                break
            raise
        skip = 0
        filled += got
        if got < len(room):
            break
    return view[:filled]


def _fill(segment: Outgoing, skip: int, room: memoryview) -> int:
    """Put what follows the first `skip` bytes of a segment into `room`, which is no longer than that; return how much."""
    if isinstance(segment, bytes | memoryview):
        room[:] = segment[skip : skip + len(room)]
        return len(room)
    if isinstance(segment, FileSlice):
        return _preadv(segment.file, [room], segment.offset + skip, segment.length - skip)
    if skip:
        segment = copy(segment)
        segment.advance(skip)
    return _read_framed(segment, room)


def _preadv(file: OpenFile, rooms: list[memoryview], offset: int, length: int) -> int:
    """Read what is in memory at once. Raises FileCold if nothing is, FileTruncated."""
    asks = not (file.residency.is_warm(offset) or (file.identity is not None and file.identity[0] in _mute_devices))
    try:
        got = os.preadv(file.fd, rooms, offset, os.RWF_NOWAIT if asks else 0)
    except BlockingIOError as exc:
        raise FileCold(file, offset) from exc
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:  # tmpfs, and others that don't know whether they would wait
            file.residency.asks = False
            if file.identity is not None:
                _mute_devices.add(file.identity[0])
            return _preadv(file, rooms, offset, length)
        raise FileTruncated(f"read at {offset}: {exc.strerror}") from exc
    if not got:
        raise FileTruncated(f"the file ends at {offset}, {length} bytes short")
    return got


_mute_devices: set[int] = set()  # file systems that don't know whether reading would wait


_FRESH: Final = 1.0  # seconds that what was found in memory is taken to be there


def warm_count(file: OpenFile, offset: int, count: int, *, whole: bool = False) -> int:
    """Return how many of `count` bytes from `offset` can go at once; raises FileCold if the disk would have to be waited for.

    Where every page was found in memory they are not asked about again for a second: a socket that takes 256 KiB at a time
    would have 2 MiB looked through for each of them. If fewer are of no use (`whole`), what lies behind is asked about at once.

    Where the kernel has cachestat (6.5, and for those who may write the file or own it) it is asked about every page, else
    about the first and the last, with which the others mostly go along. A file that has become shorter is found out by whoever
    sends it.
    """
    residency = file.residency
    end = min(offset + count, file.size)
    if not residency.asks or end <= offset:
        return count
    if residency.is_warm(offset) and (not whole or end <= residency.warm_to):
        return min(count, residency.warm_to - offset)
    cached = pages_cached(file.fd, offset, end - offset)
    pages = -(-end // PAGE) - offset // PAGE
    if cached is not None and cached >= pages:
        residency.found(offset, end, time.monotonic() + _FRESH)
        return count
    try:
        for at in (offset, end - 1):
            _preadv(file, [_probe], at, 1)
    except FileTruncated:
        return count
    except FileCold:
        raise FileCold(file, offset) from None
    if cached is not None and residency.asks:
        raise FileCold(file, offset)
    return count


_probe = memoryview(bytearray(1))


def _read_framed(run: Framed, room: memoryview) -> int:
    """Lay out the front of a run of frames in `room`; return how much of it: whole frames, but for the room's own end."""
    step, stride = run.step, run.step + FRAME_HEADER
    size = min(len(room), (IOV_MAX - 1) * stride)
    if size < len(run):
        size = max((size + run.gone) // stride * stride - run.gone, 0) or size
    frame, at = 0, -run.gone  # where the frame would begin
    rooms = []
    last = run.frames - 1
    wanted = 0
    while at < size and frame <= last:
        header = run.header if frame < last else run.last_header
        start = at + FRAME_HEADER
        if at >= 0:
            room[at:start] = header[: size - at]
        elif start > 0:
            room[:start] = header[-start:][:size]
        payload = room[max(start, 0) : min(start + step, size)]
        if payload:
            rooms.append(payload)
            wanted += len(payload)
        frame += 1
        at += stride
    skipped = max(run.gone - FRAME_HEADER, 0)  # bytes of the first frame's payload that are gone
    if not wanted:
        return size
    got = _preadv(run.file, rooms, run.offset + skipped, run.length - skipped)
    if got == wanted:
        return size
    whole = (got + skipped) // step
    if not whole:
        # Of a frame that has begun everything is to go; of a new one nothing may.
        if run.gone:
            return max(FRAME_HEADER - run.gone, 0) + got
        if not run.file.residency.is_warm(run.offset) and run.offset + got < run.file.size:
            raise FileCold(run.file, run.offset)  # its beginning is in memory; or it became shorter, which reading finds out
        raise FileTruncated(f"the file ends at {run.offset + got}, {run.length - got} bytes short")
    return whole * stride - run.gone
