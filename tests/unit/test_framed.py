"""Runs of frames: laid out, cut anywhere and continued, they are the bytes of the plain frames."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktlsd.errors import FileCold, FileTruncated
from ktlsd.net.gather import gather
from ktlsd.slices import FileSlice, Framed, OpenFile
from tests.h2peer import wire

SIZE = 5_000
CONTENT = os.urandom(SIZE)
HEADER, LAST = b"--head--h", b"==last==l"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("framed") / "file"
    path.write_bytes(CONTENT)
    made = OpenFile(os.open(path, os.O_RDONLY), SIZE, 0)
    made.residency.asks = False  # whatever the page cache does meanwhile
    return made


def plain(offset, length, step):
    out = b""
    for at in range(offset, offset + length, step):
        count = min(step, offset + length - at)
        out += (LAST if at + count == offset + length else HEADER) + CONTENT[at : at + count]
    return out


RUNS = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE), st.integers(1, 2_000)).map(
    lambda run: (run[0], min(run[1], SIZE - run[0]), run[2])
)


def framed(file, run):
    return Framed(file, run[0], run[1], step=run[2], header=HEADER, last_header=LAST)


@settings(max_examples=300, deadline=None)
@given(run=RUNS, cuts=st.lists(st.integers(1, 4_000), min_size=1, max_size=200))
def test_a_run_cut_anywhere_goes_on_where_it_was(file, run, cuts):
    segment, expected, out = framed(file, run), plain(*run), b""
    for cut in cuts:
        assert len(segment) == len(expected) - len(out)
        if not segment:
            break
        assert segment.frames == -(-(len(expected) - len(out) + segment.gone) // (run[2] + 9))
        count = min(cut, len(segment))
        out += wire([segment])[:count]
        segment.advance(count)
    out += wire([segment])
    assert out == expected


@settings(max_examples=300, deadline=None)
@given(run=RUNS, cut=st.integers(1, 9_000))
def test_the_rest_of_a_frame_is_a_run_of_its_own(file, run, cut):
    segment, expected = framed(file, run), plain(*run)
    cut = min(cut, len(segment) - 1)
    segment.advance(cut)
    end = min(-(-cut // (run[2] + 9)) * (run[2] + 9), len(expected))
    if segment.gone:
        assert wire([segment.first_frame()]) == expected[cut:end]


@settings(max_examples=400, deadline=None)
@given(
    parts=st.lists(st.one_of(RUNS, st.binary(max_size=600), st.integers(1, SIZE)), min_size=1, max_size=6),
    room=st.integers(1, 12_000),
    gone=st.integers(0, 2_500),
)
def test_gathering_is_what_the_segments_say(file, parts, room, gone):
    segments = []
    for part in parts:
        if isinstance(part, tuple):
            segments.append(framed(file, part))
        else:
            segments.append(part if isinstance(part, bytes) else FileSlice(file, SIZE - part, part))
    if isinstance(segments[0], Framed):
        segments[0].advance(min(gone, len(segments[0]) - 1))
        segments[0] = segments[0].first_frame() if segments[0].gone else segments[0]
    expected = wire(segments)
    got = bytes(gather(segments, memoryview(bytearray(room))))
    assert expected.startswith(got)
    assert len(got) <= room
    if expected:
        assert got
    if len(expected) <= room and all(not isinstance(each, Framed) or each.frames < 1_024 for each in segments):
        assert got == expected  # more pieces than that don't go into one preadv
    piecewise = got
    room = max(room, 200)
    while piece := bytes(gather(segments, memoryview(bytearray(room)), len(piecewise))):
        piecewise += piece
    assert piecewise == expected, "the segments are as they were"


@pytest.mark.parametrize("gone", [0, 5, 9, 50])
def test_of_a_file_that_became_shorter_no_header_is_sent_without_its_payload(tmp_path, gone):
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:1_250])
    shrunk = OpenFile(os.open(path, os.O_RDONLY), SIZE, 0)
    run = Framed(shrunk, 0, 3_000, step=500, header=HEADER, last_header=LAST)
    run.advance(gone)
    view = memoryview(bytearray(8_000))
    got = bytes(gather([b"first", run], view))
    assert got == b"first" + plain(0, 3_000, 500)[gone : 2 * 509]
    run.advance(2 * 509 - gone)
    if gone == 0:
        assert bytes(gather([b"control", run], view)) == b"control"
        with pytest.raises(FileCold):  # its size says that there is more
            gather([run], view)
        shrunk.residency.asks = False
        with pytest.raises(FileTruncated):
            gather([run], view)
    os.truncate(path, 0)
    with pytest.raises(FileTruncated):
        gather([run], view)


def test_of_a_frame_that_has_begun_everything_there_is_is_sent(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:300])
    shrunk = OpenFile(os.open(path, os.O_RDONLY), SIZE, 0)
    run = Framed(shrunk, 0, 500, step=500, header=HEADER, last_header=LAST)
    run.advance(4)
    assert bytes(gather([run, b"behind"], memoryview(bytearray(800)))) == (LAST + CONTENT[:300])[4:]


@pytest.mark.parametrize("there", [0, 100, 508, 509, 1_100])
def test_a_frame_that_is_partly_in_memory_waits_for_its_rest(tmp_path, monkeypatch, there):
    """A short read of what is in memory is no truncation."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    file = OpenFile(os.open(path, os.O_RDONLY), SIZE, 0)
    real = os.preadv

    def preadv(fd, rooms, offset, flags=0):
        if not flags:
            return real(fd, rooms, offset)
        left, cut = there - offset, []
        if left <= 0:
            raise BlockingIOError
        for room in rooms:
            cut.append(room[:left])
            left -= len(cut[-1])
        return real(fd, cut, offset)

    monkeypatch.setattr("ktlsd.net.gather.os.preadv", preadv)
    run = Framed(file, 0, 3_000, step=500, header=HEADER, last_header=LAST)
    view, out = memoryview(bytearray(8_000)), b""
    while len(run):
        try:
            got = bytes(gather([run], view))
        except FileCold as cold:
            assert cold.offset == run.offset
            file.residency.warm_from, file.residency.warm_to = cold.offset, cold.offset + 1_000
            continue
        out += got
        run.advance(len(got))
    assert out == plain(0, 3_000, 500)
