"""An independent TLS client: pyOpenSSL over memory BIOs, which can choose its TLS 1.3 suite and resume."""

import socket
import time
from dataclasses import dataclass

from OpenSSL import SSL

VERSIONS = {"TLSv1.2": SSL.TLS1_2_VERSION, "TLSv1.3": SSL.TLS1_3_VERSION}
CIPHERS = ("AES-128-GCM", "AES-256-GCM", "CHACHA20-POLY1305")
_SUITES_13 = {
    "AES-128-GCM": b"TLS_AES_128_GCM_SHA256",
    "AES-256-GCM": b"TLS_AES_256_GCM_SHA384",
    "CHACHA20-POLY1305": b"TLS_CHACHA20_POLY1305_SHA256",
}
_CIPHERS_12 = {
    "AES-128-GCM": b"ECDHE-ECDSA-AES128-GCM-SHA256",
    "AES-256-GCM": b"ECDHE-ECDSA-AES256-GCM-SHA384",
    "CHACHA20-POLY1305": b"ECDHE-ECDSA-CHACHA20-POLY1305",
}


def context(version: str, cipher: str) -> SSL.Context:
    made = SSL.Context(SSL.TLS_CLIENT_METHOD)
    made.set_min_proto_version(VERSIONS[version])
    made.set_max_proto_version(VERSIONS[version])
    if version == "TLSv1.3":
        made.set_tls13_ciphersuites(_SUITES_13[cipher])
    else:
        made.set_cipher_list(_CIPHERS_12[cipher])
    made.set_session_cache_mode(SSL.SESS_CACHE_CLIENT)
    return made


class MemoryClient:
    """The client's end, sans-IO: `receive` ciphertext, `take` what must go out."""

    def __init__(self, ctx: SSL.Context, *, session: SSL.Session | None = None) -> None:
        self.ssl = SSL.Connection(ctx, None)
        self.ssl.set_tlsext_host_name(b"localhost")
        self.ssl.set_connect_state()
        if session is not None:
            self.ssl.set_session(session)
        self.established = False
        self.closed = False  # close_notify came
        self.plain = bytearray()

    def advance(self) -> None:
        """Handshake and read as far as it goes."""
        if not self.established:
            try:
                self.ssl.do_handshake()
                self.established = True
            except SSL.WantReadError:
                return
        try:
            while True:
                self.plain += self.ssl.recv(16_384)
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            self.closed = True

    def receive(self, ciphertext: bytes) -> None:
        view = memoryview(ciphertext)
        while view:
            taken = self.ssl.bio_write(bytes(view[:16384]))
            view = view[taken:]
            self.advance()

    def take(self) -> bytes:
        out = b""
        try:
            while True:
                out += self.ssl.bio_read(4096)
        except SSL.WantReadError:
            return out

    def send(self, data: bytes) -> None:
        while data:
            data = data[self.ssl.send(data) :]


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """A blocking HTTP/1.1 client over `MemoryClient`."""

    def __init__(
        self, port: int, version: str = "TLSv1.3", cipher: str = "AES-256-GCM", *,
        session: SSL.Session | None = None, receive_buffer: int | None = None, ctx: SSL.Context | None = None,
    ) -> None:  # fmt: skip
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(30)
        self.sock.connect(("127.0.0.1", port))
        self.tls = MemoryClient(ctx or context(version, cipher), session=session)
        self.tls.advance()
        while not self.tls.established:
            self.flush()
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionError("closed during the handshake")
            self.tls.receive(data)
        self.flush()

    def flush(self) -> None:
        self.sock.sendall(self.tls.take())

    def send(self, data: bytes) -> None:
        self.tls.send(data)
        self.flush()

    def fill(self) -> bool:
        """Receive once; False at TCP's end."""
        data = self.sock.recv(1 << 18)
        if data:
            self.tls.receive(data)
        return bool(data)

    def until(self, count: int) -> bytes:
        while len(self.tls.plain) < count:
            if not self.fill():
                raise ConnectionError(f"TCP ended after {len(self.tls.plain)} of {count} bytes")
        out = bytes(self.tls.plain[:count])
        del self.tls.plain[:count]
        return out

    def head(self) -> tuple[int, dict[str, str]]:
        while (end := self.tls.plain.find(b"\r\n\r\n")) < 0:
            if not self.fill():
                raise ConnectionError("TCP ended in the header")
        lines = bytes(self.tls.plain[:end]).decode("latin-1").split("\r\n")
        del self.tls.plain[: end + 4]
        return int(lines[0].split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in lines[1:])}

    def reply(self, *, body: bool = True) -> Reply:
        status, headers = self.head()
        length = int(headers.get("content-length", 0)) if body and status not in (204, 304) else 0
        return Reply(status, headers, self.until(length))

    def get(self, target: str, **fields: str) -> Reply:
        lines = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in fields.items())
        self.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode("latin-1"))
        return self.reply()

    def wait_for_close(self) -> None:
        """Read to TCP's end; `tls.closed` tells whether close_notify came first."""
        while self.fill():
            pass

    def close(self) -> None:
        self.sock.close()


def wait_until(condition, seconds: float = 10.0) -> None:
    """Poll until `condition()` holds; for what other threads do, which has no event to wait on."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
