"""One process, one epoll: accept, pump, drain. Shares nothing but Settings, inherited sockets, and a board of numbers."""

import logging
import signal
import ssl
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from ktlsd.errors import RequestError
from ktlsd.net.channel import Channel, HandoverPolicy
from ktlsd.net.control import Message, close_all
from ktlsd.net.kernel import Kernel
from ktlsd.net.keylog_pipe import KeyLogPipe
from ktlsd.net.listeners import Listener
from ktlsd.net.plain import PlainChannel
from ktlsd.net.poller import Event, Poller
from ktlsd.net.tx_userspace import Scratch
from ktlsd.server.arrival import Arrival
from ktlsd.server.board import Place, State
from ktlsd.server.connection import Connection, Turn
from ktlsd.server.contexts import load_pem
from ktlsd.server.entrance import Door, Entrance, Membership, Newcomer
from ktlsd.server.jobs import Jobs
from ktlsd.server.later import Later
from ktlsd.server.metrics import MemoryGauge, Report, read_report
from ktlsd.server.services import Services
from ktlsd.server.shares import Shares
from ktlsd.server.turns import Turns
from ktlsd.server.waker import NEVER, Waker
from ktlsd.tls.session import Session

_log = logging.getLogger("ktlsd")
_NOT_BLAMED: Final = 2  # times limits.min_rate: nobody is held back so far that it would be cut for it
_FEW: Final = 64  # connections: when no more have something to do, what is known is answered without asking whose turn it is
_COHORT: Final = 64  # connections that may take the short way together
_COHORT_MIN: Final = 16  # with fewer it makes no difference, but that the first waits for the others
_MUCH: Final = 65_536  # bytes of answers after which the clock is looked at
_ROUND: Final = 0.005  # seconds after which a round ends with the turn that is on: nobody waits longer to be seen
BEAT: Final = 1.0  # seconds between signs of life


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
        membership: Membership | None = None,
    ) -> None:
        self._kernel = kernel
        self._policy = policy
        self._services = services
        self._limits = services.limits
        self._metrics = services.metrics
        self._keylog = keylog
        self._member = membership or Membership.alone()
        self._shares = Shares(self._limits.bandwidth) if self._limits.bandwidth is not None else None
        self._scratch = Scratch()
        self._poller = Poller()
        self._answers = list({id(door.services.responder): door.services.responder for door in doors}.values())
        self._entrance = Entrance(doors, self._poller, kernel, self._member, services)
        self._turns: Turns[Connection] = Turns()
        self._connections: dict[int, Connection] = {}
        self._handshakes: dict[int, Connection] = {}  # those that are not through, the oldest first
        self._draining = False
        self._drain_until = NEVER
        self._entrance.send_away()
        self._beat_at = 0.0
        self._memory = MemoryGauge()
        self.waker = Waker()
        self._jobs = Jobs(self.waker)

    def run(self) -> None:
        """Serve until told to drain."""
        self._poller.add(self.waker, level_triggered=True)
        self._poller.add(self._member.control, level_triggered=True)
        self._member.place.state = State.SERVING
        now = time.monotonic()
        self._beat(now)
        self._entrance.open()
        self._member.control.send("ready")
        while not self._draining or self._connections or self._entrance.expecting:
            until = now if self._turns else min(self._beat_at, self._entrance.resume_at, self._drain_until)
            ready = self._poller.wait(now, min(until, self._scratch.mappings.sweep(now) or NEVER))
            now = time.monotonic()
            few = len(ready) <= _FEW and not self._turns
            came: list[Connection] = []
            for event in self._poller.events(ready, now):
                source = event.source
                if isinstance(source, Connection):
                    source.note(event)
                    if few and event.readable:
                        came.append(source)
                    else:
                        self._turns.add(source.guest.client, source, news=event.readable)
                elif isinstance(source, Listener | Arrival):
                    for new in self._entrance.come_in(source, now, ended=event.ended):
                        self._welcome(new, now)
                else:
                    self._woken(event, now)
            for connection in self._answer_known(came, now)[0] if came else ():
                self._turns.add(connection.guest.client, connection, news=True)
            if self._turns:
                self._round(now)
            self._clock(now)
            self._services.access_log.flush()
        self._close()

    def _round(self, now: float) -> None:
        """Clients have their turns, all of them or as many as there is time for."""
        until = now + _ROUND
        for client in self._turns.clients():
            self._let(client, now, until)
            if time.monotonic() >= until:
                break  # to see who has come meanwhile; the others are the first in the next round

    def _let(self, client: bytes, now: float, until: float) -> None:
        """Have one client's connections do what they have to, as much as is its share of this round, and not beyond `until`."""
        quota = self._turns.quota()
        while quota > 0:
            brief = self._turns.take_brief(client, _COHORT)
            if brief:
                left, spent = self._answer_known(brief, now)
                self._turns.put_back(client, left)
                quota -= max(self._turns.cost(0) * len(brief), spent)
            connection = self._turns.take(client)
            if connection is None:
                return
            left, spent = ([], 0) if connection.has_ended else self._answer_known([connection], now)
            if left:
                self._pump(connection, now)
                spent = connection.take_spent()
                if self._shares is not None and spent:
                    self._shares.sent(client, connection.fileno(), spent)
            quota -= self._turns.cost(spent)
            if time.monotonic() >= until:
                break
        self._turns.rest(client)

    def _answer_known(self, connections: Sequence[Connection], now: float) -> tuple[list[Connection], int]:
        """Take the short way with each; return those for which that is not all, or the round had no time, and bytes sent.

        Of the others nothing but the deadline has changed, which is later now. If they are not few, each step is done for all
        before the next: the processor has one thing at a time to do, and who waits for several answers is woken once.
        """
        left: list[Connection] = []
        answered: list[Connection] = []
        total = 0
        together = len(connections) >= _COHORT_MIN
        if together:
            for connection in connections:
                try:
                    connection.fetch()
                except Exception:
                    self._drop(connection)
        following = iter(connections)
        for connection in following:
            try:
                spent = connection.answer_known(now, hold=together)
            except Exception:
                self._drop(connection)
                continue
            if spent is None:
                left.append(connection)
            else:
                total += spent
                if together:
                    answered.append(connection)
                if spent and self._shares is not None:
                    self._shares.sent(connection.guest.client, connection.fileno(), spent)
            if (spent is None or spent > _MUCH) and time.monotonic() >= now + _ROUND:
                left += following
        for connection in answered:
            try:
                if not connection.let_go(now):
                    left.append(connection)
            except Exception:
                self._drop(connection)
        return left, total

    def _drop(self, connection: Connection) -> None:
        """An exception that nobody expects is our bug: this connection ends, the worker lives. Call it where it is caught."""
        _log.exception("bug: connection dropped")
        self._metrics.count("ended:bug")
        connection.shut()
        self._ended(connection)

    def _clock(self, now: float) -> None:
        """Everything that is due by the clock and not by a connection's deadline."""
        if now >= self._beat_at:
            self._beat(now)
        self._entrance.clock(now)
        if now >= self._drain_until:
            self._end_all("the time for draining is over")

    def _beat(self, now: float) -> None:
        """Show a sign of life, and what has been counted."""
        place = self._member.place
        place.beat(now)
        self._beat_at = now + BEAT
        for responder in self._answers:
            responder.sweep(now)
        report = Report(self._member.generation, dict(self._metrics.counters), self._metrics.reads, self._metrics.read_seconds)
        report.counters |= {"mapping_hits": self._scratch.mappings.hits, "mapping_misses": self._scratch.mappings.misses}
        report.counters["log_lines_lost"] = self._services.access_log.lost
        report.memory, report.answering = self._memory.read(), self._metrics.answering
        if self._shares is not None and self._shares.due(now):
            report.rates = self._shares.rates(now)
            others = [other.rates for p in self._others() if (other := read_report(p.report())) is not None]
            self._pace(self._shares.reckon([report.rates, *others]))
        if not place.publish(msgspec.json.encode(report)):
            report.rates = {}
            place.publish(msgspec.json.encode(report))

    def _others(self) -> list[Place]:
        own = self._member.place.number
        return [place for place in self._member.board.places() if place.number != own]

    def _pace(self, rates: dict[str, int] | None) -> None:
        """Hold connections back to their shares, or let them go."""
        own = self._limits.bandwidth_per_connection
        for connection in self._connections.values():
            rate = rates.get(connection.guest.client.hex()) if rates is not None else None
            if rate is not None:
                rate = max(rate, _NOT_BLAMED * (self._limits.min_rate or 0))
            connection.pace(min(rate, own) if rate is not None and own is not None else rate or own)

    # --- new connections -------------------------------------------------------------------------------------------

    def _welcome(self, new: Newcomer, now: float) -> None:
        try:
            connection = self._made(new, now)
            self._poller.add(connection)
        except (OSError, ssl.SSLError, MemoryError) as exc:  # epoll's or OpenSSL's limit: this client only
            _log.warning("cannot take on a connection: %s", exc)
            self._entrance.left(new.guest, direct=new.door.direct)
            new.sock.close()
            return
        fd = connection.fileno()
        connection.draining, connection.uncounted = self._draining, new.door.direct
        self._connections[fd] = connection
        self._handshakes[fd] = connection
        new.door.services.metrics.count("connections")
        self._pump(connection, now)
        if len(self._handshakes) > self._limits.handshakes:
            oldest = next(iter(self._handshakes.values()))
            self._metrics.count("turned_away:handshakes")
            oldest.shut()
            self._ended(oldest)

    def _made(self, new: Newcomer, now: float) -> Connection:
        channel: PlainChannel
        if new.door.context is None:
            channel = PlainChannel(new.sock, self._kernel)
        else:
            exports = not self._policy.off and self._keylog is not None
            session = Session(new.door.context, self._scratch.bios, exports=exports)
            channel = Channel(new.sock, session, self._kernel, self._policy, keylog=self._keylog, scratch=self._scratch)
        connection = Connection(channel, new.client, new.guest, new.door.services, now)
        connection.pace(self._limits.bandwidth_per_connection)
        return connection

    # --- serving ---------------------------------------------------------------------------------------------------

    def _pump(self, connection: Connection, now: float) -> None:
        """Move a connection on."""
        fd = connection.fileno()
        try:
            turn, complaint = connection.pump(now)
        except Exception:
            self._drop(connection)
            return
        if complaint:
            _log.info("%s", complaint)
        while job := connection.take_job():
            self._start(connection, *job, now)
        if fd in self._handshakes and not connection.handshaking:
            del self._handshakes[fd]
        if turn is Turn.CLOSED:
            self._ended(connection)
            return
        if turn is Turn.AGAIN:
            self._turns.add(connection.guest.client, connection)
        self._poller.reschedule(connection, fd)

    def _ended(self, connection: Connection) -> None:
        fd = connection.fileno()
        if self._connections.get(fd) is connection:
            self._poller.forget(fd)
            del self._connections[fd]
            self._handshakes.pop(fd, None)
            self._entrance.left(connection.guest, direct=connection.uncounted)

    # --- work for threads ------------------------------------------------------------------------------------------

    def _start(self, connection: Connection, stream_id: int, later: Later, now: float) -> None:
        """Have a thread do what an answer waits for; at the limit the client is asked to come again."""
        if not self._jobs.start(connection, stream_id, later):
            connection.resume(stream_id, now, refusal=RequestError(503, "The server is at its limit; try again in a moment."))
            self._turns.add(connection.guest.client, connection)

    def _resume(self, now: float) -> None:
        for later, result, seconds, waiting in self._jobs.finished():
            refusal = None
            if result is None and not later.needed:
                refusal = RequestError(500, "Something is wrong with the server, not with the request.")
            else:
                later.done(result)
            if later.needed:
                self._metrics.read_took(seconds)
                self._metrics.count("cold_bytes", later.size)
            for connection, stream_id in waiting:
                if self._connections.get(connection.fileno()) is not connection:
                    continue
                try:
                    if later.needed:
                        connection.go_on(stream_id)
                    else:
                        connection.resume(stream_id, now, refusal=refusal)
                except Exception:
                    self._drop(connection)
                    continue
                self._turns.add(connection.guest.client, connection)

    # --- being told ------------------------------------------------------------------------------------------------

    def _woken(self, event: Event, now: float) -> None:
        if event.source is self._member.control:
            for message in self._member.control.receive():
                self._told(message, now)
            return
        came = self.waker.drain()
        self._resume(now)
        for _ in range(sum(number in (signal.SIGTERM, signal.SIGINT) for number in came)):
            self._told(Message("cut" if self._draining else "drain", self._limits.drain_timeout), now)

    def _told(self, message: Message, now: float) -> None:
        """The supervisor said something."""
        if message.word == "drain":
            self._drain(now, message.value)
        elif message.word == "retire":  # others have taken over: idle clients may ask once more
            self._drain(now, message.value, gently=True)
        elif message.word == "cut":
            self._end_all("told to stop at once")
        elif message.word == "log" and message.fds:
            self._services.access_log.go_on_in(message.fds[0])
        elif message.word == "certificate" and message.fds:
            load_pem(self._member.contexts[int(message.value)], message.fds[0])
        elif not message.word:
            self._poller.remove(self._member.control)
            _log.warning("the supervisor is gone: stopping")
            self._drain(now, self._limits.drain_timeout)
        close_all(message.fds)

    def _drain(self, now: float, seconds: float, *, gently: bool = False) -> None:
        """Take no new connections; answer what has been asked, then end."""
        self._drain_until = now + seconds
        if not self._draining:
            self._draining = True
            self._member.place.state = State.LEAVING
            for new in self._entrance.close(now, empty=not gently):
                self._welcome(new, now)
            _log.info("stopping: %d connections left", len(self._connections))
        for connection in list(self._connections.values()):
            connection.drain(gently=gently)
            self._turns.add(connection.guest.client, connection)

    def _end_all(self, why: str) -> None:
        self._drain_until = NEVER
        if self._connections:
            _log.warning("%s: %d connections are cut", why, len(self._connections))
        for connection in list(self._connections.values()):
            connection.shut()
            self._ended(connection)

    def _close(self) -> None:
        self._jobs.close()
        self._services.access_log.close()
        self._beat(time.monotonic())
        self._scratch.mappings.close()
        self._memory.close()
        self._poller.close()
        self.waker.close()
        self._member.leave()
        if self._metrics.counters:
            _log.info("served: %s", self._metrics.summary())
