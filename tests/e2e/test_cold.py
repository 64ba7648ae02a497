"""Files that are not in memory: whoever asks for them waits, nobody else does."""

import os
import threading

import pytest

from ktlsd.server import later
from tests.client import Client, wait_until
from tests.e2e.modes import kernel_of
from tests.h2client import Http2Client
from tests.serving import ThreadServer

SIZE = 12 << 20
CONTENT = os.urandom(1 << 20) * 12
MODES = ["userspace", "fake", pytest.param("kernel", marks=pytest.mark.ktls)]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "hot").write_bytes(CONTENT[:300_000])
    with (folder / "cold").open("wb") as file:
        file.write(CONTENT)
        file.flush()
        os.fsync(file.fileno())
    return folder


def cool(path):
    """Take a file out of memory; False where the file system keeps all of it there, or doesn't say."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.preadv(fd, [bytearray(1)], SIZE // 2, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


@pytest.fixture
def gate(monkeypatch):
    """Reading waits until it is opened."""
    opened = threading.Event()
    real = later.read_ahead

    def slow(cold):
        made = real(cold)
        return later.Later(made.key, lambda: opened.wait(20) and made.job(), made.done, made.needed)

    monkeypatch.setattr("ktlsd.server.conversation.read_ahead", slow)
    yield opened
    opened.set()


class Forgetful(set):
    """Never knows that a file system is mute: tmpfs, where these tests may run, is."""

    def add(self, device):
        pass


@pytest.fixture
def pretend(monkeypatch, root):
    """The file counts as cold until its bytes have been read ahead, whatever the file system says."""
    inode = os.stat(root / "cold").st_ino
    real = os.preadv

    def preadv(fd, buffers, offset, flags=0):
        if flags and os.fstat(fd).st_ino == inode:
            raise BlockingIOError
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr("ktlsd.net.gather.os.preadv", preadv)
    monkeypatch.setattr("ktlsd.net.gather.pages_cached", lambda *_: None)
    monkeypatch.setattr("ktlsd.net.gather._mute_devices", Forgetful())


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_that_waits_for_the_disk_holds_no_other_up(root, mode, gate, pretend):
    with ThreadServer(root, kernel_of(mode), handover_bytes=0) as server:
        client = Http2Client(server.port, window=1 << 24, connection_window=1 << 26)
        waiting = client.ask("/cold")
        assert client.fetch("/hot").body == CONTENT[:300_000]
        assert not client.streams[waiting].body
        other = Client(server.port)
        assert other.get("/hot").body == CONTENT[:300_000]
        other.close()
        gate.set()
        (stream,) = client.finish(waiting)
        assert stream.body == CONTENT
        assert server.metrics.counters["cold_reads"] >= 2
        client.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_download_by_http1_waits_and_goes_on(root, mode, gate, pretend):
    with ThreadServer(root, kernel_of(mode), handover_bytes=0) as server:
        client, other = Client(server.port), Client(server.port)
        client.send(b"GET /cold HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: server.metrics.counters["cold_reads"])
        assert other.get("/hot").body == CONTENT[:300_000]
        gate.set()
        assert client.reply().body == CONTENT
        assert client.get("/cold", Range="bytes=5-9").body == CONTENT[5:10]
        for peer in (client, other):
            peer.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_client_that_leaves_while_it_is_read(root, mode, gate, pretend):
    with ThreadServer(root, kernel_of(mode), handover_bytes=0) as server:
        client = Http2Client(server.port, window=1 << 24, connection_window=1 << 26)
        client.ask("/cold")
        reset = client.ask("/cold")
        wait_until(lambda: server.metrics.counters["cold_reads"] == 2)
        client.http.reset_stream(reset)
        client.said()
        client.close()
        gate.set()
        other = Client(server.port)
        assert other.get("/cold").body == CONTENT
        other.close()
        wait_until(lambda: not len(server.worker._jobs))


def test_a_disk_that_fails_ends_the_stream(root, monkeypatch, caplog):
    real = os.preadv
    inode = os.stat(root / "cold").st_ino

    def preadv(fd, buffers, offset, flags=0):
        if os.fstat(fd).st_ino == inode:
            raise BlockingIOError if flags else OSError(5, "Input/output error")
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    with ThreadServer(root, None) as server:
        client = Http2Client(server.port)
        stream = client.fetch("/cold")
        assert (stream.status, stream.reset) == (200, 2)
        assert client.fetch("/hot").body == CONTENT[:300_000]
        client.close()


@pytest.mark.parametrize("mode", ["userspace", "fake"])
def test_a_file_really_taken_out_of_memory(root, mode):
    if not cool(root / "cold"):
        pytest.skip("this file system does not say what is in memory")
    with ThreadServer(root, kernel_of(mode), handover_bytes=0) as server:
        client = Http2Client(server.port, window=1 << 24, connection_window=1 << 26)
        assert client.fetch("/cold").body == CONTENT
        assert server.metrics.counters["cold_reads"] <= 4  # asking may begin the reading, which may be over at once
        client.close()


def test_a_hole_in_the_middle_of_what_is_in_memory_is_seen(root):
    """Where the kernel tells of every page; elsewhere only the first and the last are asked about."""
    from ktlsd.errors import FileCold
    from ktlsd.net.gather import warm_count
    from ktlsd.net.residency import PAGE, pages_cached
    from ktlsd.slices import OpenFile

    path = root / "cold"
    if not cool(path):
        pytest.skip("this file system does not say what is in memory")
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead of the kernel's own
    for at in (*range(0, 1 << 20, PAGE), *range((1 << 20) + PAGE, 2 << 20, PAGE)):
        os.pread(fd, 1, at)
    file = OpenFile(fd, SIZE, 0)
    cached = pages_cached(fd, 0, 2 << 20)
    if cached is None:
        file.release()
        pytest.skip("this kernel has no cachestat (6.5)")
    assert cached == (2 << 20) // PAGE - 1
    with pytest.raises(FileCold):
        warm_count(file, 0, 2 << 20)
    assert warm_count(file, 0, 1 << 20) == 1 << 20
    assert warm_count(file, 1 << 19, 2 << 20) == 1 << 19, "what was found is not asked about again"
    with pytest.raises(FileCold):
        warm_count(file, 1 << 19, 2 << 20, whole=True)
    with pytest.raises(FileCold):
        warm_count(file, (1 << 20) + PAGE // 2, 1)
    assert warm_count(file, (1 << 20) + PAGE, PAGE) == PAGE
    file.residency.warm_from, file.residency.warm_to = 1 << 20, (1 << 20) + PAGE
    assert warm_count(file, 1 << 20, 1 << 20) == PAGE, "only what was read for us goes unasked"
    file.release()


def test_a_stretch_is_looked_through_once_however_little_goes_at_a_time(root, monkeypatch):
    from ktlsd.net import gather
    from ktlsd.slices import OpenFile

    asked = []

    def all_of_them(_, offset, length):
        asked.append((offset, length))
        return 1 << 40

    monkeypatch.setattr(gather, "pages_cached", all_of_them)
    file = OpenFile(os.open(root / "cold", os.O_RDONLY), SIZE, 0)
    at = 0
    while at < 3 << 20:
        at += min(gather.warm_count(file, at, 1 << 20), 100_000)
    assert asked == [(0, 1 << 20), (1 << 20, 1 << 20), (2 << 20, 1 << 20)]
    assert gather.warm_count(file, SIZE, 100) == 100, "who sends it finds out"
    asked.clear()
    assert gather.warm_count(file, 0, 1 << 20) == 1 << 20
    monkeypatch.setattr(gather, "_FRESH", 0.0)
    assert gather.warm_count(file, 0, 1 << 20) == 1 << 20
    file.residency.until = 0.0
    gather.warm_count(file, 5, 1 << 20)
    assert len(asked) == 2, "a second later they may have been taken out of memory"
    monkeypatch.setattr(gather, "pages_cached", lambda *_: None)  # a kernel before 6.5, or somebody else's file
    fresh = OpenFile(os.open(root / "cold", os.O_RDONLY), SIZE, 0)
    looked = []
    monkeypatch.setattr(gather, "_preadv", lambda _, __, at, ___: looked.append(at) or 1)
    for at in (0, 100_000, 200_000):
        gather.warm_count(fresh, at, 1 << 20)
    assert len(looked) == 6, "the ends say nothing of the middle: they are looked at each time"
    fresh.release()
    file.release()


@pytest.mark.parametrize(("seconds", "windows"), [(0.0, [1, 2, 4, 8, 16, 16]), (0.3, [1, 1, 1]), (1.0, [1, 0.5, 0.25, 0.25])])
def test_how_much_is_read_ahead_is_up_to_the_disk(root, monkeypatch, seconds, windows):
    from ktlsd.errors import FileCold
    from ktlsd.slices import OpenFile

    clock = [0.0]
    monkeypatch.setattr(later.time, "monotonic", lambda: clock[0])
    fd = os.open(root / "cold", os.O_RDONLY)
    file = OpenFile(fd, 1 << 40, 0)
    at, seen = 0, []
    real = os.preadv

    def slow(*args):
        clock[0] += seconds if not args[2] % (1 << 18) and args[2] == at else 0
        return min(len(args[1][0]), 1 << 20)

    monkeypatch.setattr(os, "preadv", slow)
    for _ in windows:
        work = later.read_ahead(FileCold(file, at))
        work.done(work.job())
        seen.append(work.size / (1 << 20))
        at = file.residency.warm_to
    assert seen == windows
    work = later.read_ahead(FileCold(file, at + (1 << 30)))
    assert work.size == 1 << 20, "who jumps about begins anew"
    work.done(True)
    monkeypatch.setattr(os, "preadv", real)
    file.release()
