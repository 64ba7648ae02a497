"""Mappings of the files that are asked for again and again, kept from one download to the next.

Mapped pages go into kernel TLS without a copy, but a fresh mapping costs a page fault for every few of them, which was as
dear as copying (docs/performance.md). So a file is mapped when it is opened for the second time, and stays mapped while it
is in use. Nothing here ever reads a mapped page: that would be SIGBUS if the file became shorter. The kernel, reading for
sendmsg, answers EFAULT.
"""

import mmap
from collections import OrderedDict
from typing import Final

from ktlsd.net.pages import address_of
from ktlsd.slices import OpenFile

MAPPED_MIN: Final = 262_144  # bytes; smaller files are not worth a mapping
MAPPED_MAX: Final = 16 << 30  # bytes mapped at a time: address space, and 2 MiB of page tables per GiB in use
_FILES_MAX: Final = 256  # each holds a descriptor
_IDLE: Final = 30.0  # seconds; a mapping holds the disk space of a file that has been deleted
_REMEMBERED: Final = 1_024  # files seen once


class Mapped:
    """A file's pages from its first byte: `address` for the kernel, `view` for sendmsg."""

    __slots__ = ("address", "mapping", "size", "used", "view")

    def __init__(self, file: OpenFile) -> None:
        """Raises OSError, ValueError if it can't be mapped."""
        self.size = file.size
        self.mapping = mmap.mmap(file.fd, file.size, prot=mmap.PROT_READ)
        self.address = address_of(self.mapping)
        self.view = memoryview(self.mapping)
        self.used = True

    def close(self) -> None:
        """Unmap it, or have it unmapped with the last part of it that somebody holds: an error's traceback may."""
        self.view.release()
        try:
            self.mapping.close()
        except BufferError:
            pass


class Mappings:
    """One worker's. What `of` returns is valid until the next `settle`, `sweep` or `close`."""

    def __init__(self) -> None:
        self._mapped: OrderedDict[tuple[int, int], Mapped] = OrderedDict()
        self._seen: OrderedDict[tuple[int, int], int] = OrderedDict()  # identity -> size
        self._dropped: list[Mapped] = []  # to be unmapped when nobody can be using them
        self._bytes = 0
        self._swept = 0.0
        self.hits = 0  # questions about files that were mapped
        self.misses = 0  # and about others that are large enough

    def __len__(self) -> int:
        return len(self._mapped)

    def of(self, file: OpenFile) -> Mapped | None:
        """Return the file's mapping from its first byte, None if it has none: then its bytes are to be copied."""
        key = file.identity
        if key is None or file.size < MAPPED_MIN:
            return None
        mapped = self._mapped.get(key)
        if mapped is not None:
            if mapped.size == file.size:
                mapped.used = True
                self._mapped.move_to_end(key)
                self.hits += 1
                return mapped
            self._drop(key)
        self.misses += 1
        if file.sent_before:
            return None
        file.sent_before = True
        if self._seen.get(key) == file.size:
            return self._map(file, key)
        self._seen[key] = file.size
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return None

    def _map(self, file: OpenFile, key: tuple[int, int]) -> Mapped | None:
        if file.size > MAPPED_MAX:
            return None
        try:
            mapped = Mapped(file)
        except (OSError, ValueError):
            return None  # shorter by now, or no memory: this download copies
        self._mapped[key] = mapped
        self._bytes += mapped.size
        while self._bytes > MAPPED_MAX or len(self._mapped) > _FILES_MAX:
            self._drop(next(iter(self._mapped)))
        return mapped

    def _drop(self, key: tuple[int, int]) -> None:
        mapped = self._mapped.pop(key)
        self._bytes -= mapped.size
        self._dropped.append(mapped)

    def settle(self) -> None:
        """Unmap what has been dropped."""
        while self._dropped:
            self._dropped.pop().close()

    def sweep(self, now: float) -> float | None:
        """Drop what has not been used for a while; return when to come again (monotonic seconds), None if nothing is left."""
        self.settle()
        if not self._mapped:
            return None
        if now >= self._swept + _IDLE:
            self._swept = now
            for key, mapped in list(self._mapped.items()):
                if mapped.used:
                    mapped.used = False
                else:
                    self._drop(key)
            self.settle()
        return self._swept + _IDLE if self._mapped else None

    def close(self) -> None:
        """Drop all."""
        for key in list(self._mapped):
            self._drop(key)
        self.settle()
