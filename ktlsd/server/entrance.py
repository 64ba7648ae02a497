"""The way in: listening sockets, which workers share; who may come in; and when nobody may for a while."""

import logging
import os
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ktlsd.errors import PeerError
from ktlsd.net.control import Control, pair
from ktlsd.net.kernel import Kernel
from ktlsd.net.listeners import Listener
from ktlsd.net.poller import Poller
from ktlsd.server.admission import Admission, Guest, Trusted, guest
from ktlsd.server.arrival import Arrival
from ktlsd.server.board import Board, Place, State, Tally
from ktlsd.server.services import Services
from ktlsd.server.waker import NEVER

_log = logging.getLogger("ktlsd")
_BURST: Final = 16  # connections taken before the others have their turn: a few milliseconds of handshakes
_FEW: Final = 4  # the same where other workers would take them too
_PAUSE: Final = 0.5  # seconds without accepting after descriptors ran out
_FRESH: Final = 3.0  # seconds after its last sign of life that a worker counts as stuck
_UNEVEN: Final = 1.125  # times its share of all connections, and
_UNEVEN_MIN: Final = 2  # some more, a worker may have before it leaves new ones to the others
_PROBES: Final = 64  # connections beyond limits.connections, for who asks how things are
_LAST: Final = 4_096  # connections taken in the end: as many as may have waited
_LOOK_AGAIN: Final = 0.1  # seconds until it looks whether they have caught up


@dataclass(frozen=True, slots=True)
class Door:
    """A way in: a listening socket, what is spoken behind it, and who answers. Without `context` there is no TLS."""

    listener: Listener
    context: ssl.SSLContext | None
    services: Services
    direct: bool = False  # nobody comes here by a proxy that says who its client is


@dataclass(frozen=True, slots=True)
class Membership:
    """A worker's part in a server of several processes."""

    board: Board
    place: Place
    control: Control
    generation: int = 1
    proxies: Trusted | None = None
    contexts: Sequence[ssl.SSLContext] = ()  # those whose certificates can be renewed, by number
    supervisor: Control | None = None  # the other end, of a worker that belongs to no server

    @classmethod
    def alone(cls) -> "Membership":
        """Return what a worker has that belongs to no server."""
        board = Board()
        ours, other = pair()
        return cls(board, board.take(os.getpid()), ours, supervisor=other)

    def leave(self) -> None:
        """The worker has ended."""
        self.control.close()
        if self.supervisor is not None:
            self.supervisor.close()
            self.board.close()


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A connection that has been let in. `client` is its address as we know it, or as a trusted proxy says."""

    sock: socket.socket
    client: tuple[str, int]
    guest: Guest
    door: Door


class Entrance:
    """Accepts at all doors. Workers share the queues: who has more than its share of connections leaves them to the others."""

    def __init__(
        self, doors: Sequence[Door], poller: Poller, kernel: Kernel, membership: Membership, services: Services
    ) -> None:
        self._doors = {door.listener: door for door in doors}
        self._poller = poller
        self._kernel = kernel
        self._member = membership
        self._alone = membership.supervisor is not None
        self._limits = services.limits
        self._metrics = services.metrics
        self._admission = Admission(services.limits, Tally(membership.board, membership.place))
        self._arrivals: dict[int, tuple[Arrival, Door]] = {}
        self._accepting = False
        self._direct = False  # watching doors at which probes are answered even when there is no room for anybody else
        self._open = 0
        self._grown = False  # more connections than when the others' were looked at last
        self.resume_at = NEVER  # monotonic seconds; accepting has been stopped until then

    def open(self) -> None:
        """Accept from now on."""
        if self.resume_at != NEVER:
            return
        if not self._accepting and self._doors and not self._full:
            self._accepting = True
            self._watch(direct=False)
        if not self._direct and self._doors:
            self._direct = True
            self._watch(direct=True)

    def _watch(self, *, direct: bool) -> None:
        for listener, door in self._doors.items():
            if door.direct is direct:
                self._poller.add(listener, level_triggered=True, shared=True)

    def _unwatch(self, *, direct: bool) -> None:
        for listener, door in self._doors.items():
            if door.direct is direct:
                self._poller.remove(listener)

    def _pause(self, until: float = NEVER) -> None:
        self.resume_at = min(self.resume_at, until)
        if self._accepting:
            self._accepting = False
            self._unwatch(direct=False)

    def _shut_direct(self) -> None:
        if self._direct:
            self._direct = False
            self._unwatch(direct=True)

    def clock(self, now: float) -> None:
        """Look whether it is time to stop accepting for a while, or to go on."""
        if now >= self.resume_at:
            self.resume_at = NEVER
            self._grown = True
            self.open()
        if self._grown and self._accepting:
            self._grown = False
            if self._over_share(now):
                self._pause(now + _LOOK_AGAIN)

    @property
    def _full(self) -> bool:
        return self._open + len(self._arrivals) >= self._limits.connections

    def _over_share(self, now: float) -> bool:
        if self._open <= _UNEVEN_MIN or self._alone:
            return False
        own = self._member.place.number
        others = [
            place.connections
            for place in self._member.board.places()
            if place.number != own and place.state is State.SERVING and place.last_beat > now - _FRESH
        ]
        return bool(others) and self._open > (self._open + sum(others)) / (len(others) + 1) * _UNEVEN + _UNEVEN_MIN

    def come_in(self, source: Listener | Arrival, now: float, *, ended: bool = False) -> Iterator[Newcomer]:
        """Yield the connections that come in now: there is something at a listener, or a proxy has said something."""
        if isinstance(source, Arrival):
            yield from self._identify(source, now, ended=ended)
            return
        direct = self._doors[source].direct
        for _ in range(_BURST if self._alone else _FEW):
            if self._full and (not direct or self._open >= self._limits.connections + _PROBES):
                self._metrics.count("accept_paused:connections")
                self._pause()  # until one of them ends
                return
            try:
                accepted = source.try_accept()
            except OSError as exc:
                self._out_of_descriptors(now, os.strerror(exc.errno or 0))
                return
            if accepted is None:
                return
            yield from self._accepted(*accepted, self._doors[source], now)
        if self._full and not direct:
            self._pause()  # now: the next connection would wake this worker, and nobody else

    def _accepted(self, sock: socket.socket, client: tuple[str, int], door: Door, now: float) -> Iterator[Newcomer]:
        if door.direct or self._member.proxies is None or client[0] not in self._member.proxies:
            yield from self._admitted(sock, client, door)
            return
        arrival = Arrival(sock, client, self._kernel, now + self._limits.header_timeout)
        self._arrivals[arrival.fileno()] = arrival, door
        self._poller.add(arrival)
        yield from self._identify(arrival, now)

    def _identify(self, arrival: Arrival, now: float, *, ended: bool = False) -> Iterator[Newcomer]:
        fd = arrival.fileno()
        try:
            client = arrival.identify(now, ended=ended)
            if client is None:
                return
            self._poller.remove(arrival)
            _, door = self._arrivals.pop(fd)
            yield from self._admitted(arrival.sock, client, door)
        except PeerError as error:
            self._metrics.count(f"turned_away:{type(error).__name__}")
            _log.info("%s port %d: %s", *arrival.proxy, error)
            self._drop(arrival)

    def _drop(self, arrival: Arrival) -> None:
        del self._arrivals[arrival.fileno()]
        self._poller.forget(arrival.fileno())
        arrival.sock.close()
        self.open()

    def _admitted(self, sock: socket.socket, client: tuple[str, int], door: Door) -> Iterator[Newcomer]:
        who = guest(client[0])
        limit = None if door.direct else self._admission.admit(who)
        if limit is None:
            self._count(+1)
            yield Newcomer(sock, client, who, door)
            return
        name = f"turned_away:{limit}"
        self._metrics.count(name)
        if self._metrics.counters[name] == 1:
            key = f"limits.connections_per_{limit}"
            _log.warning("%s port %d: has as many connections as %s allows; the next ones are only counted", *client, key)
        sock.close()
        self.open()

    def _out_of_descriptors(self, now: float, why: str) -> None:
        """Descriptors or memory ran out: new clients wait in the backlog; asking on would only spin."""
        self._metrics.count("accept_paused:descriptors")
        for door in self._doors.values():
            door.services.responder.close()  # what is only kept gives way
        if self._metrics.counters["accept_paused:descriptors"] == 1:
            _log.warning("cannot accept: %s; new clients wait. Raise LimitNOFILE or lower limits.connections", why)
        self._pause(now + _PAUSE)
        self._shut_direct()

    def left(self, who: Guest, *, direct: bool) -> None:
        """A connection that came in has ended; by which kind of door it came."""
        if not direct:
            self._admission.leave(who)
        self._count(-1)
        self.open()

    def _count(self, change: int) -> None:
        self._open += change
        self._grown = self._grown or change > 0
        self._member.place.connections = self._open

    def close(self, now: float, *, empty: bool) -> Iterator[Newcomer]:
        """Close the doors for good; with `empty`, yield first who waits: nobody else may be there to let them in.

        Otherwise others are there; who has come in and not yet said who it is may still do so.
        """
        for listener in self._doors if empty else ():
            for _ in range(_LAST):
                try:
                    accepted = listener.try_accept()
                except OSError:
                    break  # no descriptors: they are refused
                if accepted is None:
                    break
                yield from self._accepted(*accepted, self._doors[listener], now)
        self._pause()
        self._shut_direct()
        for listener in self._doors:
            listener.close()
        self._doors.clear()
        if empty:
            self.send_away()
        self.resume_at = NEVER

    @property
    def expecting(self) -> bool:
        """Whether somebody has come in who has not yet said who it is."""
        return bool(self._arrivals)

    def send_away(self) -> None:
        """Wait no longer for those who have not said who they are."""
        for arrival, _ in list(self._arrivals.values()):
            self._drop(arrival)
