"""The ladder: every way of getting a file into a socket, each a sender of a few lines in a process of its own.

A sender takes its connections and does their handshakes, then sends the file down one after the other, each when a byte comes
that asks for it. What it has used in between it reads itself (getrusage) and reports when it is through. Sockets block:
a call returns when everything it was given is the kernel's.
"""

import contextlib
import errno
import fcntl
import math
import mmap
import os
import signal
import socket
import ssl
import struct
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from ktlsd.bench import usage
from ktlsd.bench.answers import NotMeasurable, Payload, WrongAnswer
from ktlsd.bench.connection import OPENSSL_CIPHERS, STALL, VERSIONS
from ktlsd.bench.result import Tls
from ktlsd.bench.usage import Usage
from ktlsd.errors import HandoverError
from ktlsd.net import handover
from ktlsd.net.kernel import LinuxKernel
from ktlsd.net.keylog_pipe import KeyLogPipe
from ktlsd.net.pages import PagePipe, address_of
from ktlsd.net.poller import Poller
from ktlsd.tls.records import MAX_PLAINTEXT
from ktlsd.tls.session import Session

_SMALL_STEP: Final = 65_536  # what programs commonly read at a time
_STEP: Final = 262_144  # what ktlsd encrypts at a time in userspace: larger was slower (docs/performance.md)
_SENDFILE_MAX: Final = 0x7FFF_F000  # bytes one call moves, sendfile(2)
_PIPE: Final = 1 << 20  # bytes; what anybody may ask for (fs.pipe-max-size)
_BLAME: Final = 1.0  # seconds
_TICK: Final = 0.05  # seconds; then it looks again, whatever the poller says
_PATIENCE: Final = struct.pack("ll", int(3 * STALL), 0)  # struct timeval

# MSG_ZEROCOPY: asm-generic/socket.h, linux/socket.h (since 4.14), linux/errqueue.h
_SO_ZEROCOPY: Final = 60
_MSG_ZEROCOPY: Final = 0x4000000
_SO_EE_ORIGIN_ZEROCOPY: Final = 5
_EXTENDED_ERR: Final = struct.Struct("=IBBBBII")  # errno, origin, type, code, pad, info, data: the first and last send done


class Link:
    """One connection of a sender."""

    deadline = math.inf  # for the poller

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fileno = sock.fileno
        self.session: Session | None = None
        self._asked = False
        self._ended = False

    def handshake(self, context: ssl.SSLContext, keylog: KeyLogPipe) -> Session:
        """Do it, in userspace. Raises PeerError."""
        session = self.session = Session(context)
        while not session.established:
            out = session.handshake(self.sock.recv(_SMALL_STEP))
            session.learn(keylog.drain())
            self.sock.sendall(out)
        self._asked = bool(session.decrypt(b""))
        return session

    def wait(self) -> None:
        """Wait for the byte that asks."""
        while not self._asked:
            came = self.sock.recv(_SMALL_STEP)
            if not came:
                raise WrongAnswer("the client left")
            self._asked = self.session is None or bool(self.session.decrypt(came))

    def end(self) -> None:
        """Wait until the client has everything."""
        if not self._ended:
            self._ended = True
            with contextlib.suppress(OSError):  # it hangs up, perhaps first, when it has what it wants; it tells if not
                self.sock.shutdown(socket.SHUT_WR)
                while self.sock.recv(_SMALL_STEP):
                    pass


Send = Callable[[Link, int, int], None]  # link, descriptor of the file, its size


@contextlib.contextmanager
def _mapped(fd: int, size: int) -> Iterator[tuple[mmap.mmap, memoryview]]:
    """Map the file for one transfer: the page faults of a fresh mapping are part of the price."""
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapping, memoryview(mapping) as view:
        yield mapping, view


# --- in the clear, or with keys in the kernel: the same calls ---


def _read_and_send(step: int) -> Send:
    def send(link: Link, fd: int, size: int) -> None:
        buffer = memoryview(bytearray(step))
        at = 0
        while at < size:
            got = os.preadv(fd, [buffer], at)
            link.sock.sendall(buffer[:got])
            at += got

    return send


def _map_and_send(link: Link, fd: int, size: int) -> None:
    with _mapped(fd, size) as (_, view):
        link.sock.sendall(view)


def _sendfile(link: Link, fd: int, size: int) -> None:
    at, out = 0, link.sock.fileno()
    while at < size:
        at += os.sendfile(out, fd, at, min(size - at, _SENDFILE_MAX))


def _splice(link: Link, fd: int, size: int) -> None:
    out = link.sock.fileno()
    with _pipe() as (outlet, inlet):
        at = 0
        while at < size:
            left = os.splice(fd, inlet, min(_PIPE, size - at), offset_src=at)
            at += left
            while left:
                left -= os.splice(outlet, out, left, flags=os.SPLICE_F_MORE if at < size else 0)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    outlet, inlet = os.pipe2(os.O_CLOEXEC)
    try:
        with contextlib.suppress(PermissionError):  # the user has too many pipes: a smaller one takes more calls
            fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, _PIPE)
        yield outlet, inlet
    finally:
        os.close(outlet)
        os.close(inlet)


def _zerocopy(link: Link, fd: int, size: int) -> None:
    """The kernel refers to our pages and says in the error queue when it needs them no longer."""
    sock = link.sock
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)
    except OSError as exc:
        raise NotMeasurable(f"no MSG_ZEROCOPY here (since Linux 4.14): {exc.strerror}") from exc
    with _mapped(fd, size) as (_, view):
        at = sends = done = 0
        while at < size:
            try:
                at += sock.send(view[at : at + _PIPE], _MSG_ZEROCOPY)
                sends += 1
            except OSError as exc:
                if exc.errno != errno.ENOBUFS:
                    raise
                if not sends:
                    raise NotMeasurable("MSG_ZEROCOPY: no room to note it (net.core.optmem_max, RLIMIT_MEMLOCK)") from exc
            done += _notices(sock)
        link.end()  # what the client has, the kernel has noted
        done += _notices(sock)
        if done < sends:
            raise WrongAnswer(f"MSG_ZEROCOPY: the kernel gave back {done} of {sends} sends")


def _notices(sock: socket.socket) -> int:
    """Return how many sends the kernel says are done; never waits."""
    done = 0
    while True:
        try:
            _, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(128), socket.MSG_ERRQUEUE)
        except BlockingIOError:
            return done
        for _, _, data in ancillary:
            fields = _EXTENDED_ERR.unpack_from(data)
            if fields[1] == _SO_EE_ORIGIN_ZEROCOPY:
                done += fields[6] - fields[5] + 1


def _splice_mapped(link: Link, fd: int, size: int) -> None:
    """Refer to mapped pages in a pipe and have them go from there, as ktlsd does with HTTP/2 (net/pages).

    Without blocking, but for the last record: Linux 6.1 waits forever in a splice of more than the send buffer holds, for room
    that data would make which it doesn't push. The last record blocks until TCP has all before it: FIN would lose the rest.
    """
    pipe, poller, kernel = PagePipe(), Poller(), LinuxKernel()
    sock, out = link.sock, link.sock.fileno()
    sock.setblocking(False)
    poller.add(link)
    try:
        with _mapped(fd, size) as (mapping, _):
            at, base, last = 0, address_of(mapping), (size - 1) // MAX_PLAINTEXT * MAX_PLAINTEXT
            while at < last:
                offered, accepted = pipe.send(out, array("Q", (base + at, last - at)), more=False)
                at += accepted or 0
                if accepted is None or accepted < offered:
                    kernel.push(sock)
                    now = time.monotonic()
                    poller.wait(now, now + _TICK)
            sock.setblocking(True)
            if pipe.send(out, array("Q", (base + last, size - last)), more=False)[1] != size - last:
                raise WrongAnswer("a blocking splice took less than it was given")
    finally:
        poller.close()
        pipe.close()


# --- encrypted in userspace ---


def _read_and_encrypt(link: Link, fd: int, size: int) -> None:
    buffer = memoryview(bytearray(_STEP))
    at = 0
    while at < size:
        got = os.preadv(fd, [buffer], at)
        _encrypt(link, buffer[:got])
        at += got


def _map_and_encrypt(link: Link, fd: int, size: int) -> None:
    with _mapped(fd, size) as (_, view):
        for at in range(0, size, _STEP):
            _encrypt(link, view[at : at + _STEP])


def _encrypt(link: Link, plain: memoryview) -> None:
    """All records of a step leave with one call, as in the server (net/tx_userspace)."""
    assert link.session is not None
    pieces = link.session.encrypt(plain)
    sent = link.sock.sendmsg(pieces)
    for piece in pieces:
        if sent < len(piece):  # a blocking socket takes all but when a signal comes
            link.sock.sendall(memoryview(piece)[sent:])
        sent = max(sent - len(piece), 0)


@dataclass(frozen=True, slots=True)
class Way:
    """One of them."""

    name: str
    tls: Tls
    send: Send


LADDER: Final = (
    Way("read+write 64 KiB", "none", _read_and_send(_SMALL_STEP)),
    Way("read+write 256 KiB", "none", _read_and_send(_STEP)),
    Way("mmap+write", "none", _map_and_send),
    Way("sendfile", "none", _sendfile),
    Way("splice", "none", _splice),
    Way("MSG_ZEROCOPY", "none", _zerocopy),
    Way("read+SSL_write", "userspace", _read_and_encrypt),
    Way("mmap+SSL_write", "userspace", _map_and_encrypt),
    Way("read+send", "kernel", _read_and_send(_STEP)),
    Way("sendfile", "kernel", _sendfile),
    Way("mapped sendmsg", "kernel", _map_and_send),
    Way("mapped vmsplice+splice", "kernel", _splice_mapped),
)


# --- the process ---


@dataclass(frozen=True, slots=True)
class Secrets:
    """Which TLS a sender speaks, with which certificate (PEM files). `cipher` "" is OpenSSL's choice; TLS 1.3's always is."""

    version: str
    cipher: str
    cert: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """Return a server's context."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.minimum_version = made.maximum_version = VERSIONS[self.version]
        made.set_ciphers(OPENSSL_CIPHERS[self.cipher])
        made.options |= ssl.OP_NO_RENEGOTIATION
        made.load_cert_chain(self.cert, self.key)
        return made


class _Report(msgspec.Struct):
    usage: Usage = Usage()
    refused: str = ""  # can't be done here
    broke: str = ""  # went wrong


class Sender:
    """A process that takes `each` connections at `port` and sends the file down each of them when it is asked to."""

    def __init__(self, way: Way, payload: Payload, secrets: Secrets | None, each: int, *, host: str = "127.0.0.1") -> None:
        listener = socket.create_server((host, 0), backlog=max(each, 16))
        self.port: int = listener.getsockname()[1]
        self._ours, theirs = socket.socketpair()
        self._heard: _Report | None = None
        self.pid = os.fork()
        if not self.pid:
            try:
                self._ours.close()
                theirs.sendall(msgspec.json.encode(_work(way, payload, secrets, listener, each)))
            finally:
                os._exit(0)
        listener.close()
        theirs.close()
        self._ours.settimeout(STALL)

    def report(self) -> Usage:
        """Return what sending cost. Raises NotMeasurable, WrongAnswer: what the process itself says went wrong."""
        if self._heard is None:
            try:
                self._heard = msgspec.json.decode(self._ours.recv(65_536) or b"{}", type=_Report)
            except TimeoutError:
                raise WrongAnswer("the sender does not come to an end") from None
        if self._heard.refused:
            raise NotMeasurable(self._heard.refused)
        if self._heard.broke:
            raise WrongAnswer(self._heard.broke)
        return self._heard.usage

    def blame(self, seen: NotMeasurable | WrongAnswer) -> None:
        """Raise what the process says went wrong beside what was `seen`, if it says anything."""
        self._ours.settimeout(_BLAME)
        try:
            self.report()
        except NotMeasurable:
            raise
        except WrongAnswer as exc:
            raise WrongAnswer(f"{seen}; {exc}") from exc

    def close(self) -> None:
        """End the process."""
        self._ours.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _work(way: Way, payload: Payload, secrets: Secrets | None, listener: socket.socket, each: int) -> _Report:
    """Be a sender."""
    try:
        usage.reset_peak(["self"])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the one who waits for us
        listener.settimeout(3 * STALL)
        keylog = KeyLogPipe()
        context = secrets.context() if secrets is not None and way.tls != "none" else None
        if context is not None:
            keylog.attach(context)
        links = [_accept(way, listener, context, keylog) for _ in range(each)]
        with payload.path.open("rb") as file:
            before = usage.own()
            for link in links:
                link.wait()
                way.send(link, file.fileno(), payload.size)
                link.end()
                link.sock.close()
            return _Report(usage.own().since(before))
    except NotMeasurable as exc:
        return _Report(refused=str(exc))
    except HandoverError as exc:
        return _Report(refused=f"the kernel refuses to encrypt ({exc.reason})")
    except Exception as exc:  # nobody else hears of it
        return _Report(broke=f"the sender broke: {type(exc).__name__}: {exc}")


def _accept(way: Way, listener: socket.socket, context: ssl.SSLContext | None, keylog: KeyLogPipe) -> Link:
    sock, _ = listener.accept()
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _PATIENCE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link = Link(sock)
    if context is not None:
        session = link.handshake(context, keylog)
        if way.tls == "kernel":
            if session.suite is None or not session.exportable:
                raise NotMeasurable(f"{session.cipher_name} is no cipher of the kernel's")
            handover.install(LinuxKernel(), sock, session.export_tx())
    else:
        sock.sendall(b"\0")  # in place of a handshake: the client goes on to its next connection when it has this one
    return link
