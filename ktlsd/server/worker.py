"""One process, one epoll: accept, pump, drain. Shares nothing but Settings and inherited sockets."""

import logging
import os
import signal
import socket
import ssl
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from ktlsd.errors import RequestError
from ktlsd.net.channel import Channel, HandoverPolicy
from ktlsd.net.kernel import Kernel
from ktlsd.net.keylog_pipe import KeyLogPipe
from ktlsd.net.listeners import Listener
from ktlsd.net.plain import PlainChannel
from ktlsd.net.poller import Event, Poller
from ktlsd.net.tx_userspace import Scratch
from ktlsd.server.connection import Connection, Services, Turn
from ktlsd.server.later import Later
from ktlsd.tls.session import Session

_log = logging.getLogger("ktlsd")
_ACCEPT_BURST: Final = 64  # connections taken before the others have their turn
_ACCEPT_PAUSE: Final = 0.5  # seconds without accepting after descriptors ran out
_NEVER: Final = float("inf")
_THREADS: Final = 2  # for work that must not stop the loop
_READERS: Final = 4  # for reading files that are not in memory
_MAX_JOBS: Final = 64  # waiting or running; more are refused
_JOB_DONE: Final = 0  # no signal has this number


class Waker:
    """A source for what comes from outside the sockets: signals, written into a socket pair by the interpreter, and a timer."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self.deadline = _NEVER

    def hook(self, signals: Sequence[signal.Signals]) -> None:
        """Catch these signals from now on; in the main thread only."""
        for number in signals:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)

    def fileno(self) -> int:
        """The end the interpreter does not write to."""
        return self._read.fileno()

    def write(self, number: int) -> None:
        """As if a signal had come; from any thread."""
        try:
            self._write.send(bytes([number]))
        except BlockingIOError:
            pass  # full: it wakes anyway

    def drain(self) -> bytes:
        """Return the numbers of the signals that came, b"" if none did."""
        try:
            return self._read.recv(4096)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """Close both ends."""
        self._read.close()
        self._write.close()


@dataclass(frozen=True, slots=True)
class Door:
    """A way in: a listening socket, what is spoken behind it, and who answers. Without `context` there is no TLS."""

    listener: Listener
    context: ssl.SSLContext | None
    services: Services


class Worker:
    """Accepts at its doors and serves until told to stop; `run` returns when the last connection has ended."""

    def __init__(
        self,
        doors: Sequence[Door],
        kernel: Kernel,
        policy: HandoverPolicy,
        services: Services,
        *,
        keylog: KeyLogPipe | None,
    ) -> None:
        self._doors = {door.listener: door for door in doors}
        self._kernel = kernel
        self._policy = policy
        self._services = services
        self._keylog = keylog
        self._scratch = Scratch()
        self._poller = Poller()
        self._connections: dict[int, Connection] = {}
        self._accepting = False
        self._draining = False
        self._threads = ThreadPoolExecutor(_THREADS, "ktlsd")
        self._readers = ThreadPoolExecutor(_READERS, "ktlsd-read")
        self._reading = 0  # of those below, the jobs that are not counted
        self._waiting: dict[bytes, list[tuple[Connection, int]]] = {}  # for the job with this key
        self._jobs_done: deque[tuple[Later, bool | None]] = deque()  # and what came out, None if it failed
        self.waker = Waker()

    def run(self) -> None:
        """Serve until the waker brings SIGTERM or SIGINT, then drain."""
        self._poller.add(self.waker, level_triggered=True)
        self._start_accepting()
        now = time.monotonic()
        while self._doors or self._connections:
            ready = self._poller.wait(now, self._scratch.mappings.sweep(now))
            now = time.monotonic()
            for event in self._poller.events(ready, now):
                if isinstance(event.source, Connection):
                    self._pump(event.source, now, event)
                elif isinstance(event.source, Listener):
                    self._accept(event.source, now)
                else:
                    self._woken(event, now)
            self._services.access_log.flush()
        self._close()

    # --- accepting -------------------------------------------------------------------------------------------------

    def _start_accepting(self) -> None:
        if not self._accepting and not self._draining:
            self._accepting = True
            for listener in self._doors:
                self._poller.add(listener, level_triggered=True)

    def _stop_accepting(self) -> None:
        if self._accepting:
            self._accepting = False
            for listener in self._doors:
                self._poller.remove(listener)

    def _accept(self, listener: Listener, now: float) -> None:
        for _ in range(_ACCEPT_BURST):
            if len(self._connections) >= self._services.limits.connections:
                self._services.metrics.count("accept_paused:connections")
                self._stop_accepting()  # until one of them ends
                return
            try:
                accepted = listener.try_accept()
            except OSError as exc:
                self._pause_accepting(now, os.strerror(exc.errno or 0))
                return
            if accepted is None:
                return
            try:
                self._welcome(*accepted, self._doors[listener], now)
            except (OSError, ssl.SSLError, MemoryError):  # epoll's or OpenSSL's limit: this client only
                _log.exception("cannot take on a connection")
                accepted[0].close()

    def _pause_accepting(self, now: float, why: str) -> None:
        """Descriptors or memory ran out: new clients wait in the backlog; asking on would only spin."""
        self._services.metrics.count("accept_paused:descriptors")
        if self._services.metrics.counters["accept_paused:descriptors"] == 1:
            _log.warning("cannot accept: %s; new clients wait. Raise LimitNOFILE or lower limits.connections", why)
        self._stop_accepting()
        self.waker.deadline = min(self.waker.deadline, now + _ACCEPT_PAUSE)
        self._poller.reschedule(self.waker, self.waker.fileno())

    def _welcome(self, sock: socket.socket, client: tuple[str, int], door: Door, now: float) -> None:
        channel: PlainChannel
        if door.context is None:
            channel = PlainChannel(sock, self._kernel)
        else:
            session = Session(door.context)
            channel = Channel(sock, session, self._kernel, self._policy, keylog=self._keylog, scratch=self._scratch)
        connection = Connection(channel, client, door.services, now)
        self._connections[connection.fileno()] = connection
        self._services.metrics.count("connections")
        self._poller.add(connection)
        self._pump(connection, now, Event(connection, readable=True))

    # --- serving ---------------------------------------------------------------------------------------------------

    def _pump(self, connection: Connection, now: float, event: Event) -> None:
        fd = connection.fileno()
        try:
            turn, complaint = connection.pump(now, event)
        except Exception:  # our bug: this connection ends, the worker lives
            _log.exception("bug: connection dropped")
            self._services.metrics.count("ended:bug")
            connection.shut()
            turn, complaint = Turn.CLOSED, None
        if complaint:
            _log.info("%s", complaint)
        for stream_id, later in connection.take_jobs():
            self._start(connection, stream_id, later, now)
        if turn is Turn.CLOSED:
            self._poller.forget(fd)
            self._connections.pop(fd, None)
            if len(self._connections) < self._services.limits.connections and self.waker.deadline == _NEVER:
                self._start_accepting()
            return
        if turn is Turn.AGAIN:
            self._poller.again(connection)
        self._poller.reschedule(connection, fd)

    # --- work for threads ------------------------------------------------------------------------------------------

    def _start(self, connection: Connection, stream_id: int, later: Later, now: float) -> None:
        """Have a thread do what an answer waits for; at the limit the client is asked to come again."""
        waiting = self._waiting.get(later.key)
        if waiting is not None:
            waiting.append((connection, stream_id))
            return
        self._reading += later.needed
        if len(self._waiting) - self._reading >= _MAX_JOBS and not later.needed:
            connection.resume(stream_id, now, refusal=RequestError(503, "The server is at its limit; try again in a moment."))
            self._poller.again(connection)
            return
        self._waiting[later.key] = [(connection, stream_id)]

        def run() -> None:
            result = None
            try:
                if any(connection.is_open for connection, _ in tuple(self._waiting[later.key])):
                    result = later.job()
            except OSError as exc:  # of a disk: whoever sends gets it too
                _log.warning("cannot read ahead: %s", exc.strerror)
            except Exception:  # our bug: those who wait are told, and nobody tries again
                _log.exception("a job failed")
            self._jobs_done.append((later, result))
            self.waker.write(_JOB_DONE)

        (self._readers if later.needed else self._threads).submit(run)

    def _resume(self, now: float) -> None:
        while self._jobs_done:
            later, result = self._jobs_done.popleft()
            refusal = None
            waiting = self._waiting.pop(later.key)
            self._reading -= later.needed
            if result is None and not later.needed:
                refusal = RequestError(500, "Something is wrong with the server, not with the request.")
            else:
                later.done(result)
            for connection, stream_id in waiting:
                if self._connections.get(connection.fileno()) is connection:
                    if later.needed:
                        connection.go_on(stream_id)
                    else:
                        connection.resume(stream_id, now, refusal=refusal)
                    self._pump(connection, now, Event(connection))

    # --- stopping --------------------------------------------------------------------------------------------------

    def _woken(self, event: Event, now: float) -> None:
        came = self.waker.drain()
        stops = sum(number in (signal.SIGTERM, signal.SIGINT) for number in came)
        if signal.SIGUSR1 in came or signal.SIGHUP in came:
            self._services.access_log.reopen()
            _log.info("access log opened anew")
        if signal.SIGHUP in came:
            _log.warning("this release does not reload its configuration: restart ktlsd for changes to count")
        self._resume(now)
        for _ in range(stops):
            if self._draining:
                self._end_all("told twice to stop")
            else:
                self._drain(now)
        if event.overdue:
            self.waker.deadline = _NEVER
            if self._draining:
                self._end_all("drain_timeout is over")
            else:
                self._start_accepting()

    def _drain(self, now: float) -> None:
        """Take what waits in the backlog, then no more; answer what has been asked, then end."""
        for listener in self._doors:
            self._accept(listener, now)
        self._stop_accepting()
        self._draining = True
        for listener in self._doors:
            listener.close()
        self._doors.clear()
        _log.info("stopping: %d connections left", len(self._connections))
        self.waker.deadline = now + self._services.limits.drain_timeout
        self._poller.reschedule(self.waker, self.waker.fileno())
        for connection in list(self._connections.values()):
            connection.drain()
            self._pump(connection, now, Event(connection))

    def _end_all(self, why: str) -> None:
        if self._connections:
            _log.warning("%s: %d connections are cut", why, len(self._connections))
        for fd, connection in list(self._connections.items()):
            connection.shut()
            self._poller.forget(fd)
        self._connections.clear()

    def _close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._services.access_log.close()
        if self._services.access_log.lost:
            self._services.metrics.count("log_lines_lost", self._services.access_log.lost)
        self._scratch.mappings.close()
        self._poller.close()
        self.waker.close()
        _log.info("served: %s", self._services.metrics.summary())
