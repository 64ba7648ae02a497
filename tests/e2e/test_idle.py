"""Very many connections that do nothing. How many is set by KTLSD_TEST_IDLE; 10,000 were run by hand."""

import os
import re
import resource
import socket
import ssl
from pathlib import Path

import pytest

from tests import pki
from tests.client import wait_until
from tests.h2client import Http2Client
from tests.serving import program

IDLE = int(os.environ.get("KTLSD_TEST_IDLE", "500"))


@pytest.fixture
def descriptors():
    """Enough of them for both ends, for this test only: what runs later inherits the limit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], max(before[0], IDLE + 200)), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("protocol", ["http/1.1", "h2"])
def test_idle_connections_are_cheap_and_stay_usable(tmp_path, capsys, protocol):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/small").write_bytes(b"small")
    pki.write(tmp_path)
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with program("root", "--cert", "cert.pem", "--key", "key.pem", "--ktls", "off", "--workers", "1", cwd=tmp_path) as server:
        proc = Path(f"/proc/{server.workers()[0]}")
        peers = []
        before = 0
        for number in range(IDLE):
            if number == 50:  # what every server needs is there by then
                before = resident(proc)
            if protocol == "h2":
                peers.append(Http2Client(server.port))
                assert peers[-1].fetch("/small").body == b"small"
                continue
            sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            peers.append(context.wrap_socket(sock, server_hostname="localhost"))
            if number % 2:
                ask(peers[-1])
        assert len(os.listdir(proc / "fd")) >= IDLE
        each = (resident(proc) - before) / (IDLE - 50)
        with capsys.disabled():
            print(f"\n{IDLE} idle connections, {protocol}: {each / 1024:.1f} KiB each")
        assert each < 64 * 1024, "a leak, or a buffer kept for every connection"
        for peer in peers[:: max(IDLE // 20, 1)]:
            if protocol == "h2":
                assert peer.fetch("/small").body == b"small"
            else:
                ask(peer)
        for peer in peers:
            peer.close()
        wait_until(lambda: len(os.listdir(proc / "fd")) < 50)
        assert server.stop() == 0


def ask(peer):
    peer.send(b"GET /small HTTP/1.1\r\nHost: localhost\r\n\r\n")
    out = b""
    while not out.endswith(b"small"):
        data = peer.recv(4096)
        assert data
        out += data


def resident(proc):
    """Bytes of memory."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", (proc / "status").read_text())[1]) * 1024
