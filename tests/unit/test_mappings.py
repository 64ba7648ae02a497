"""Which files are mapped, for how long, and that pages of them go through a pipe unchanged."""

import os
import random
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktlsd import uapi
from ktlsd.net import mappings as module
from ktlsd.net.hot import buffers_of, headers_of, hot_runs, leave_out, vectors_of
from ktlsd.net.mappings import MAPPED_MIN, Mappings
from ktlsd.net.pages import PagePipe, address_of_bytes, open_pipe
from ktlsd.net.tx_kernel import Framing, KernelTx
from ktlsd.net.tx_userspace import Scratch
from ktlsd.slices import Framed, OpenFile
from tests.h2peer import wire

CONTENT = random.Random(3).randbytes(MAPPED_MIN + 5_000)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path / "file"


def opened(path):
    fd = os.open(path, os.O_RDONLY)
    facts = os.fstat(fd)
    return OpenFile(fd, facts.st_size, 0, identity=(facts.st_dev, facts.st_ino))


def test_a_file_is_mapped_when_it_is_opened_again(path):
    mappings, first = Mappings(), opened(path)
    assert [mappings.of(first) for _ in range(3)] == [None] * 3
    second = opened(path)
    mapped = mappings.of(second)
    assert mapped.size == len(CONTENT)
    assert mappings.of(first) is mapped
    assert mappings.of(opened(path)) is mapped
    mappings.close()


def test_what_is_dropped_stays_until_nobody_can_be_using_it(path, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAPPED_MAX", len(CONTENT) + 1)
    mappings = Mappings()
    (tmp_path / "other").write_bytes(CONTENT)
    for each in (path, tmp_path / "other"):
        mappings.of(opened(each))
    first, second = opened(path), opened(tmp_path / "other")
    runs = hot_runs(
        [Framed(file, 0, 9_000, step=5_000, header=b"h" * 9, last_header=b"l" * 9) for file in (first, second)],
        mappings,
        1 << 20,
    )
    assert len(runs) == 2
    assert len(mappings) == 1
    assert b"".join(buffers_of(runs)).count(CONTENT[:5_000]) == 2
    runs.clear()
    mappings.settle()
    mappings.close()


def test_a_mapping_of_which_somebody_holds_a_part_goes_with_that_part(path):
    mappings = Mappings()
    files = [opened(path) for _ in range(2)]
    found = [mappings.of(file) for file in files]
    part = found[1].view[:10]
    first = part[0]
    del found
    mappings.close()
    assert part[0] == first
    assert str(path) in Path("/proc/self/maps").read_text()
    del part
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_what_is_small_or_unknown_is_not(tmp_path, path):
    mappings = Mappings()
    (tmp_path / "small").write_bytes(b"x" * (MAPPED_MIN - 1))
    assert [mappings.of(opened(tmp_path / "small")) for _ in range(3)] == [None] * 3
    assert [mappings.of(OpenFile(os.open(path, os.O_RDONLY), len(CONTENT), 0)) for _ in range(3)] == [None] * 3


def test_a_file_that_changes_its_length_is_mapped_anew(path):
    mappings = Mappings()
    mappings.of(opened(path))
    assert mappings.of(opened(path)).size == len(CONTENT)
    path.write_bytes(CONTENT * 2)
    assert mappings.of(opened(path)) is None
    assert mappings.of(opened(path)).size == 2 * len(CONTENT)
    assert len(mappings) == 1


def test_what_became_shorter_before_it_could_be_mapped_is_copied(path):
    mappings = Mappings()
    mappings.of(opened(path))
    late = opened(path)
    os.truncate(path, 0)
    assert mappings.of(late) is None


def test_mappings_are_bounded_and_the_longest_unused_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAPPED_MAX", 3 * len(CONTENT))
    mappings = Mappings()
    paths = [tmp_path / str(number) for number in range(5)]
    for each in paths:
        each.write_bytes(CONTENT)
        mappings.of(opened(each))
        assert mappings.of(opened(each)) is not None
        mappings.of(opened(paths[0]))
    assert len(mappings) == 3
    assert [mappings._mapped.get(opened(each).identity) is not None for each in paths] == [True, False, False, True, True]


def test_what_is_not_used_for_a_while_is_let_go_of(path):
    """A mapping holds the space of a file that has been deleted."""
    mappings = Mappings()
    assert mappings.sweep(1_000.0) is None
    mappings.of(opened(path))
    mappings.of(opened(path))
    assert mappings.sweep(1_000.0) == 1_030.0
    assert mappings.sweep(1_029.0) == 1_030.0
    mappings.of(opened(path))
    assert mappings.sweep(1_031.0) == 1_061.0
    assert mappings.sweep(1_062.0) is None
    assert len(mappings) == 0


def test_what_was_dropped_is_unmapped_though_nothing_else_is_mapped(path):
    mappings = Mappings()
    mappings.of(opened(path))
    old = mappings.of(opened(path))
    path.write_bytes(CONTENT * 2)
    mappings.of(opened(path))
    assert len(mappings) == 0
    assert not old.mapping.closed
    assert mappings.sweep(1_000.0) is None
    assert old.mapping.closed


class Refusing:
    """A kernel whose socket has no room."""

    accepts = 0

    def send_pages(self, sock, vectors, *, more):
        return sum(vectors[1::2]), self.accepts or None

    def unacknowledged(self, sock):
        return 0


def test_headers_that_were_lent_live_on_whatever_is_refused_afterwards(path):
    """A record that is open refers to them until the next call that is accepted."""
    scratch, kernel = Scratch(), Refusing()
    info = uapi.CryptoInfo(
        uapi.TLS_1_3_VERSION, uapi.TLS_CIPHER_AES_GCM_128, iv=bytes(8), key=bytes(16), salt=bytes(4), rec_seq=bytes(8)
    )
    tx = KernelTx(None, None, kernel, scratch, Framing.SPLICED, info=info, taken_before=0)
    scratch.mappings.of(opened(path))
    file = opened(path)
    assert scratch.mappings.of(file)

    def run(number):
        header = number.to_bytes(9, "big")
        return Framed(file, 0, 40_000, step=16_384, header=header, last_header=header)

    kernel.accepts = 10_000
    tx.send([run(1)])
    kernel.accepts = 0
    for number in range(2, 3_000):
        assert tx.send([run(number)]) is None
    assert set(tx._pinned) == {(1).to_bytes(9, "big")}
    scratch.mappings.close()


def through(pipe, vectors):
    """What comes out at the other end of a socket pair."""
    import socket

    ours, theirs = socket.socketpair()
    out = b""
    with ours, theirs:
        ours.setblocking(False)
        while vectors:
            _, accepted = pipe.send(ours.fileno(), vectors, more=False)
            leave_out(vectors, accepted or 0)
            theirs.setblocking(False)
            try:
                while True:
                    out += theirs.recv(1 << 20)
            except BlockingIOError:
                pass
    return out


@settings(max_examples=60, deadline=None)
@given(
    offset=st.integers(0, 200_000), length=st.integers(1, 60_000), step=st.integers(300, 20_000), gone=st.integers(0, 30_000),
    before=st.binary(max_size=30), most=st.integers(31, 100_000),
)  # fmt: skip
def test_pages_and_headers_go_as_they_are(tmp_path_factory, offset, length, step, gone, before, most):
    path = tmp_path_factory.getbasetemp() / "pages"
    if not path.exists():
        path.write_bytes(CONTENT)
    mappings = Mappings()
    mappings.of(opened(path))
    run = Framed(opened(path), offset, length, step=step, header=b"h" * 9, last_header=b"l" * 9)
    run.advance(min(gone, len(run) - 1))
    expected = wire([run])
    assert hot_runs([before, run], mappings, most) == []
    runs = hot_runs([run, before], mappings, most)
    kept = list(headers_of(runs))
    assert kept
    buffers = b"".join(buffers_of(runs))
    pipe = PagePipe()
    spliced = through(pipe, vectors_of(runs))
    os.close(pipe._in), os.close(pipe._out), os.close(pipe._null)
    assert spliced == buffers
    assert expected.startswith(spliced)
    assert len(spliced) >= min(most, len(expected))
    runs.clear()
    mappings.close()


def test_what_the_socket_does_not_take_is_not_left_in_the_pipe(path):
    import socket

    pipe = open_pipe()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        data = b"x" * 200_000
        total = 0
        while True:
            offered, accepted = pipe.send(ours.fileno(), array("Q", (address_of_bytes(data), len(data))), more=False)
            assert offered == len(data)
            if accepted is None:
                break
            total += accepted
        assert total > 0
        theirs.settimeout(5)
        got = 0
        while got < total:
            got += len(theirs.recv(1 << 20))
        _, accepted = pipe.send(ours.fileno(), array("Q", (address_of_bytes(b"fresh"), 5)), more=False)
        assert accepted == 5
        assert theirs.recv(100) == b"fresh"


def test_pages_that_are_not_there_are_an_error_and_no_signal(path):
    mappings = Mappings()
    mappings.of(opened(path))
    mapped = mappings.of(opened(path))
    os.truncate(path, 0)
    pipe = open_pipe()
    with pytest.raises(OSError, match="Bad address"):
        pipe.send(pipe._null, array("Q", (mapped.address, 4_096)), more=False)
    mappings.close()


def test_no_more_vectors_than_a_call_takes_and_no_header_without_its_payload(path):
    pipe = open_pipe()
    header, payload = b"h" * 9, b"p" * 9
    vectors = array("Q", [address_of_bytes(header), 9, address_of_bytes(payload), 9] * 1_500)
    offered, accepted = pipe.send(pipe._null, vectors, more=False)
    assert offered == accepted
    assert offered % 18 == 0
    assert 0 < offered <= 1_024 * 9
    pipe.close()
