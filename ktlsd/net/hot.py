"""Frames of files whose pages are mapped: which they are, and how sendmsg and vmsplice want to have them named."""

from array import array
from collections.abc import Iterator, Sequence

from ktlsd.errors import FileCold
from ktlsd.net.gather import warm_count
from ktlsd.net.kernel import IOV_MAX, Buffer
from ktlsd.net.mappings import Mapped, Mappings
from ktlsd.net.pages import address_of_bytes
from ktlsd.slices import Framed, Outgoing

Runs = list[tuple[Framed, Mapped]]


def hot_runs(segments: Sequence[Outgoing], mappings: Mappings, most: int) -> Runs:
    """Return the frames at the front of `segments`, about `most` bytes, as far as their files are mapped and in memory.

    They are valid until the next call.
    """
    mappings.settle()
    runs: Runs = []
    for segment in segments:
        if most <= 0 or not isinstance(segment, Framed):
            break
        most -= len(segment)
        mapped = mappings.of(segment.file)
        front = _front(segment, most)
        if mapped is None or not _is_warm(front):
            break
        runs.append((front, mapped))
    return runs


def _is_warm(run: Framed) -> bool:
    """Whether sending it would not have to wait for the disk; if it would, copying finds out from where on."""
    try:
        return warm_count(run.file, run.offset, run.length, whole=True) == run.length
    except FileCold:
        return False


def _front(run: Framed, over: int) -> Framed:
    """Return the run without the frames that are wholly beyond what is wanted."""
    stride = run.step + len(run.header)
    spare = -over // stride if over < 0 else 0
    if not spare or spare >= run.frames:
        return run
    length = (run.frames - spare) * run.step
    front = Framed(run.file, run.offset, length, step=run.step, header=run.header, last_header=run.header)
    front.gone = run.gone
    return front


def buffers_of(runs: Runs) -> list[Buffer]:
    """Return what sendmsg takes, no more of it than one call does."""
    buffers: list[Buffer] = []
    for run, mapped in runs:
        view = mapped.view
        buffers += (piece if isinstance(piece, bytes) else view[piece[0] : piece[0] + piece[1]] for piece in run.pieces())
    del buffers[IOV_MAX:]
    return buffers


def vectors_of(runs: Runs) -> "array[int]":
    """Return what vmsplice takes: address and length, one after the other (struct iovec)."""
    vectors = array("Q")
    for run, mapped in runs:
        vectors.extend(_frames(run, mapped.address))
    return vectors


def _frames(run: Framed, base: int) -> Iterator[int]:
    header, last = address_of_bytes(run.header), address_of_bytes(run.last_header)
    size = len(run.header)
    at, left, gone, step = base + run.offset, run.length, run.gone, run.step
    while left:
        count = min(step, left)
        left -= count
        if gone < size:
            yield (header if left else last) + gone
            yield size - gone
        skipped = max(gone - size, 0)
        yield at + skipped
        yield count - skipped
        at += count
        gone = 0


def headers_of(runs: Runs) -> Iterator[bytes]:
    """Yield the bytes that `vectors_of` refers to outside of mappings: they must live until they have been sent."""
    for run, _ in runs:
        yield run.header
        yield run.last_header


def leave_out(vectors: "array[int]", count: int) -> None:
    """Take the first `count` bytes off: they are gone."""
    at = 0
    while count:
        size = vectors[at + 1]
        if size > count:
            vectors[at] += count
            vectors[at + 1] -= count
            break
        count -= size
        at += 2
    del vectors[:at]
