"""Many of the same: random transfers must compare equal, slow closes must lose nothing.

How many is set by KTLSD_TEST_TRANSFERS and KTLSD_TEST_CLOSES; what is run by default fits into CI on the slow kernel.
"""

import hashlib
import os
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ktlsd.net.handover import probe
from ktlsd.net.kernel import LinuxKernel
from ktlsd.settings import Limits
from tests.client import CIPHERS, VERSIONS, Client
from tests.contract.test_channel import CONTENT, Pair, _advance
from tests.serving import ThreadServer, tls_stat

pytestmark = pytest.mark.ktls

TRANSFERS = int(os.environ.get("KTLSD_TEST_TRANSFERS", "600"))
CLOSES = int(os.environ.get("KTLSD_TEST_CLOSES", "24"))
_CLOSE_SIZE = 150_000
_SMALL = 4096
EVERY = [(v, c) for v in VERSIONS for c in CIPHERS]


@pytest.mark.timeout(3600)
def test_random_transfers_compare_equal(tmp_path):
    """Random size, offset, count, threshold and split into segments, on connections that are used again and again."""
    from ktlsd.net.channel import HandoverPolicy
    from ktlsd.slices import FileSlice, OpenFile

    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    file = OpenFile(os.open(path, os.O_RDONLY), len(CONTENT), 0)
    kernel = LinuxKernel()
    facts = probe(kernel)
    seed = int(os.environ.get("KTLSD_TEST_SEED", "20261121"))
    rng = random.Random(seed)
    done = 0
    while done < TRANSFERS:
        version, cipher = rng.choice(EVERY)
        threshold = rng.choice([0, 0, 1, 1000, 65_536, 200_000])
        rekey = rng.choice([None, None, 50_000, 300_000])
        policy = HandoverPolicy(facts, threshold, rekey)
        pair = Pair(kernel, policy, version, cipher, send_buffer=rng.choice([None] * 14 + [_SMALL, 65_536]))
        for _ in range(min(rng.randint(10, 60), TRANSFERS - done)):
            segments, expected = [], hashlib.sha256()
            total = 0
            for _ in range(rng.choice([1, 2, 2, 3, 8])):
                if rng.random() < 0.4:
                    piece = rng.randbytes(rng.choice([1, 9, 200, 16_383, 16_384, 30_000]))
                    segments.append(piece)
                else:
                    offset = rng.randrange(len(CONTENT))
                    length = min(int(2 ** rng.uniform(0, 18)), len(CONTENT) - offset)
                    segments.append(FileSlice(file, offset, length))
                    piece = CONTENT[offset : offset + length]
                expected.update(piece)
                total += len(piece)
            body = total
            while segments:
                sent = pair.channel.try_send(segments, body_bytes=body)
                _advance(segments, sent or 0)
                pair.exchange()
            assert hashlib.sha256(pair.read(total)).digest() == expected.digest(), f"seed {seed}, transfer {done}"
            done += 1
            if pair.channel.expiring:
                break
        pair.close()
        assert pair.client.closed
        pair.done()
    file.release()
    assert tls_stat("TlsDecryptError") == 0


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("version", "cipher"), [("TLSv1.3", "AES-128-GCM"), ("TLSv1.2", "CHACHA20-POLY1305")])
def test_closes_with_a_slow_reader_lose_nothing(tmp_path, version, cipher):
    """Small send buffer, slow reader, unread input, Connection: close: every byte comes, then close_notify, then FIN."""
    (tmp_path / "file").write_bytes(CONTENT[:_CLOSE_SIZE])
    rng = random.Random(5)
    choices = [
        (rng.choice(["plain", "small"]), rng.choice([4096, None]), rng.random() < 0.5, rng.choice([0, 0, 0.001, 0.02]))
        for _ in range(CLOSES)
    ]
    limits = Limits(linger_timeout=2.0)
    with (
        ThreadServer(tmp_path, LinuxKernel(), limits=limits, handover_bytes=0) as plain,
        ThreadServer(tmp_path, LinuxKernel(), limits=limits, handover_bytes=0, send_buffer=_SMALL) as small,
        ThreadPoolExecutor(8) as pool,
    ):
        ports = {"plain": plain.port, "small": small.port}

        def download(choice):
            buffer, receive_buffer, pipelined, pause = choice
            peer = Client(ports[buffer], version, cipher, receive_buffer=receive_buffer)
            peer.send(b"GET /file HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            if pipelined:  # unread when the server closes
                peer.send(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
            status, headers = peer.head()
            time.sleep(pause)
            body = peer.until(int(headers["content-length"]))
            peer.wait_for_close()
            peer.close()
            return status, body == CONTENT[:_CLOSE_SIZE], peer.tls.closed, bytes(peer.tls.plain)

        assert set(pool.map(download, choices)) == {(200, True, True, b"")}


def test_a_client_that_sent_fin_before_the_hand_over_is_served_in_userspace(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    log = tmp_path / "log"
    with ThreadServer(tmp_path, LinuxKernel(), handover_bytes=0, log_file=log) as server:
        peer = Client(server.port)
        peer.tls.send(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
        out = peer.tls.take()
        peer.sock.sendall(out)
        peer.sock.shutdown(socket.SHUT_WR)
        assert peer.reply().body == CONTENT
        peer.wait_for_close()
        assert peer.tls.closed
        peer.close()
        server.stop()
        # The FIN may come before or after the request is answered; either way every byte came.
        assert server.entries()[0]["tls"]["why"] in (None, "TCP_ULP:ENOTCONN")


def test_a_file_that_shrinks_under_the_kernel_is_an_aborted_download(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT * 8)
    log = tmp_path / "log"
    with ThreadServer(tmp_path, LinuxKernel(), handover_bytes=0, log_file=log, send_buffer=65_536) as server:
        peer = Client(server.port, receive_buffer=16_384)
        peer.send(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
        status, headers = peer.head()
        os.truncate(path, 1000)
        with pytest.raises(ConnectionError):  # reset, or an end before the last byte
            peer.until(int(headers["content-length"]))
        assert (status, peer.tls.closed) == (200, False), "close_notify would make the body look complete"
        server.stop()
        (entry,) = server.entries()
        assert (entry["complete"], entry["tls"]["tx"]) == (False, "kernel")
        assert server.metrics.counters["ended:FileTruncated"] == 1
