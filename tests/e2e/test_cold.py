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

    monkeypatch.setattr("ktlsd.server.connection.read_ahead", slow)
    yield opened
    opened.set()


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
