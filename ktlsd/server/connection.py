"""One connection from accept to close: `pump` moves it on as far as it goes without waiting.

handshake -> HTTP -> closing -> closed. Output first, then input, then back to the poller.
"""

import enum
import time
from dataclasses import dataclass
from typing import Final, Protocol

from ktlsd.errors import FileTruncated, Overdue, PeerError, PeerTruncated, PlainHttp, RequestError, UnexpectedMessage
from ktlsd.net.plain import Mode, PlainChannel
from ktlsd.net.poller import Event
from ktlsd.protocol.http1 import Http1Connection
from ktlsd.protocol.http1_syntax import plain_answer
from ktlsd.protocol.messages import Completed, Refused, Request, Response
from ktlsd.server.accesslog import AccessLog, Entry, TlsFacts, timestamp
from ktlsd.server.auth import Later
from ktlsd.server.metrics import Metrics
from ktlsd.settings import Limits

_BUDGET: Final = 4 << 20  # bytes one connection may send in its turn before the others have theirs
_RECEIVES: Final = 16  # times one connection may receive in its turn, 16 KiB each
_KEY_UPDATES_PER_SECOND: Final = 100  # more is an attack; Java clients have been seen with dozens (HAProxy)
_CLOSE_TICK: Final = 0.05  # seconds between looks at what TCP still holds, doubling up to a second


class Answers(Protocol):
    """Who answers requests."""

    def respond(self, request: Request | Refused) -> Response | Later:
        """Return the response, or what has to be done first, in a thread."""

    def refuse(self, request: Request | Refused, error: RequestError) -> Response:
        """Return the response that says why there is no other."""


class _Stage(enum.Enum):
    HANDSHAKE = enum.auto()
    HTTP = enum.auto()
    CLOSING = enum.auto()
    CLOSED = enum.auto()


class Turn(enum.Enum):
    """How a pump ended."""

    WAIT = enum.auto()  # until the socket or the deadline says so
    AGAIN = enum.auto()  # the turn was over, there is more to do
    CLOSED = enum.auto()


@dataclass(slots=True)
class _Pending:
    """A request that is being answered."""

    request: Request | Refused
    started: float  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class Services:
    """What connections share: none of it belongs to any."""

    responder: Answers
    access_log: AccessLog
    metrics: Metrics
    limits: Limits


class Connection:
    """A client. A source for the poller: `fileno` and `deadline` (monotonic seconds)."""

    __slots__ = (
        "_channel",
        "_client",
        "_close_tick",
        "_close_until",
        "_fd",
        "_http",
        "_jobs",
        "_key_update_tokens",
        "_key_updates_seen",
        "_pending",
        "_services",
        "_stage",
        "_unacknowledged",
        "deadline",
        "draining",
    )

    def __init__(self, channel: PlainChannel, client: tuple[str, int], services: Services, now: float) -> None:
        self._channel = channel
        self._client = client
        self._services = services
        self._http = Http1Connection(max_requests=services.limits.requests_per_connection)
        self._pending: dict[int, _Pending] = {}
        self._jobs: list[tuple[int, Later]] = []
        self._stage = _Stage.HANDSHAKE
        self._fd = channel.fileno()
        self._key_update_tokens = (now, float(_KEY_UPDATES_PER_SECOND))
        self._key_updates_seen = 0
        self._close_tick = _CLOSE_TICK
        self._close_until = 0.0
        self._unacknowledged = 0
        self.deadline = now + services.limits.handshake_timeout
        self.draining = False

    def fileno(self) -> int:
        """The descriptor, the same from accept to close."""
        return self._fd

    # --- the one function ------------------------------------------------------------------------------------------

    def pump(self, now: float, event: Event) -> tuple[Turn, str | None]:
        """Do all that can be done at once; return how it ended and, if the peer was at fault, one line about it."""
        if event.readable:
            self._channel.note_input(ended=event.ended)
        try:
            if event.overdue and self.deadline <= now:
                self._overdue(now)
            if self._stage is _Stage.HANDSHAKE:
                if not self._channel.try_handshake():
                    return Turn.WAIT, None
                self._established(now)
            if self._stage is _Stage.HTTP and self._pump_http(now):
                return Turn.AGAIN, None
            if self._stage is _Stage.CLOSING:
                self._pump_closing(now)
                if self._stage is _Stage.CLOSING and self._channel.has_input:
                    return Turn.AGAIN, None
        except (PeerError, FileTruncated) as error:
            return self._fail(error, now)
        return (Turn.CLOSED if self._stage is _Stage.CLOSED else Turn.WAIT), None

    def _established(self, now: float) -> None:
        self._stage = _Stage.HTTP
        facts, metrics = self._channel.facts, self._services.metrics
        if self._channel.mode is not Mode.PLAIN:
            metrics.count("handshakes_resumed" if facts.resumed else "handshakes_full")
        self.deadline = now + self._services.limits.idle_timeout
        if self.draining:
            self._http.drain(one_more=True)

    def _pump_http(self, now: float) -> bool:
        """Output, then input, until neither moves; True if the turn's budget ended it."""
        http, channel = self._http, self._channel
        spent = received = 0
        channel.try_flush()  # the end of a response may still be held there when HTTP has nothing more to send
        while True:
            while segments := http.next_output(_BUDGET):
                sent = channel.try_send(segments, body_bytes=http.body_bytes)
                if sent is None:
                    break
                self._completed(http.sent(sent))
                self._set_deadline(now)
                spent += sent
                if spent >= _BUDGET or http.working:
                    return True
            if http.working:
                self._set_deadline(now)
                return True
            if completed := http.sent(0):  # a stream that ended without a last piece
                self._completed(completed)
                continue
            if channel.expiring and not http.busy:
                http.drain()
            if http.closing:
                self._begin_closing(now)
                return False
            if not self._take_input(now):
                if channel.expiring and not http.busy and not http.closing and not http.head_begun:
                    continue  # a KeyUpdate came that can't be answered, and nothing is owed: end it now
                return channel.has_input and http.wants_input
            received += 1
            if received >= _RECEIVES:
                return True

    def _take_input(self, now: float) -> bool:
        """Receive once and answer what became whole; False if nothing new came."""
        http, channel = self._http, self._channel
        requests = http.receive(b"") if http.head_begun else []
        if not requests:
            if not http.wants_input:
                return False
            try:
                data = channel.try_receive()
            except PeerTruncated:
                data = b""  # a client may have closed its side only; if it is gone altogether, sending will tell
            self._check_key_updates(now)
            if data is None:
                return False
            if not data:
                http.end_of_input()
                return True
            begun = http.head_begun
            requests = http.receive(data)
            if not begun and not requests and http.head_begun and not http.busy:
                self._set_deadline(now)
        for request in requests:
            self._answer(request, now)
        return True

    def _answer(self, request: Request | Refused, now: float) -> None:
        self._pending[request.stream_id] = _Pending(request, time.time())
        self._services.metrics.count("requests")
        self._respond(request, now)

    def _respond(self, request: Request | Refused, now: float) -> None:
        response = self._services.responder.respond(request)
        if isinstance(response, Later):
            self._jobs.append((request.stream_id, response))
        else:
            self._http.respond(request.stream_id, response)
        self._set_deadline(now)

    @property
    def is_open(self) -> bool:
        """Whether there is still somebody to answer; may be asked from any thread."""
        return self._stage is _Stage.HTTP

    def take_jobs(self) -> list[tuple[int, Later]]:
        """Return what must be done in a thread before these requests can be answered; `resume` each afterwards."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def resume(self, stream_id: int, now: float, *, refusal: RequestError | None = None) -> None:
        """A job is done, or could not be: answer the request. Pump afterwards."""
        pending = self._pending.get(stream_id)
        if pending is None or self._stage is not _Stage.HTTP:
            return  # the client has left meanwhile
        if refusal is None:
            self._respond(pending.request, now)
        else:
            self._http.respond(stream_id, self._services.responder.refuse(pending.request, refusal))

    def _set_deadline(self, now: float) -> None:
        """Something was achieved. What comes next has its own time: progress of a response, the rest of a head, a request."""
        limits = self._services.limits
        if self._http.busy:
            self.deadline = now + limits.progress_timeout
        elif self._http.head_begun:
            self.deadline = now + limits.header_timeout
        else:
            self.deadline = now + limits.idle_timeout

    def _check_key_updates(self, now: float) -> None:
        """A token bucket: `_KEY_UPDATES_PER_SECOND` may come at once, and as many again with every second."""
        seen = self._channel.facts.key_updates
        if seen == self._key_updates_seen:
            return
        last, tokens = self._key_update_tokens
        tokens = min(tokens + (now - last) * _KEY_UPDATES_PER_SECOND, _KEY_UPDATES_PER_SECOND)
        tokens -= seen - self._key_updates_seen
        self._key_updates_seen = seen
        self._key_update_tokens = (now, tokens)
        if tokens < 0:
            error = UnexpectedMessage(f"more than {_KEY_UPDATES_PER_SECOND} KeyUpdates a second")
            self._channel.say_goodbye(error)
            raise error

    # --- deadlines -------------------------------------------------------------------------------------------------

    def _overdue(self, now: float) -> None:
        """A deadline passed: answer 408 if a request was begun, else end the connection."""
        if self._stage is _Stage.HANDSHAKE:
            raise Overdue("no handshake in time")
        if self._stage is _Stage.CLOSING:
            return
        if self._http.owes_work:  # ours to do: the client can't help it
            self.deadline = now + self._services.limits.progress_timeout
            return
        if self._http.busy or not self._channel.try_flush():
            left = self._channel.unacknowledged()
            if left != self._unacknowledged:  # slow, but it does take what TCP holds: writable comes in large steps only
                self._unacknowledged = left
                self.deadline = now + self._services.limits.progress_timeout
                return
            raise Overdue("the client takes no data")
        if self._http.head_begun:
            for refused in self._http.give_up(RequestError(408, "The request did not arrive in time.")):
                self._answer(refused, now)
        else:
            self._http.end_of_input()
            self._services.metrics.count("closed_idle")

    def _begin_closing(self, now: float) -> None:
        self._stage = _Stage.CLOSING
        self._close_until = now + self._services.limits.linger_timeout

    def _pump_closing(self, now: float) -> None:
        """Close without losing the tail: as long as the client's TCP makes progress it gets its time."""
        if self._channel.try_close():
            self._finish()
            return
        if now < self.deadline and self._close_tick > _CLOSE_TICK:
            return
        left = self._channel.unacknowledged()
        if left != self._unacknowledged:
            self._unacknowledged = left
            limits = self._services.limits
            self._close_until = now + (limits.progress_timeout if left else limits.linger_timeout)
        if now >= self._close_until:
            if left:
                raise Overdue("the client did not take the end of what was sent")
            self._finish()
            return
        self.deadline = min(now + self._close_tick, self._close_until)
        self._close_tick = min(self._close_tick * 2, 1.0)

    # --- ends ------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take no new requests; end when what was asked is answered. Pump afterwards."""
        self.draining = True
        if self._stage is _Stage.HTTP:
            self._http.drain()

    def _finish(self) -> None:
        self._abandon()
        self._channel.drop()
        self._stage = _Stage.CLOSED
        self.deadline = float("inf")

    def _fail(self, error: PeerError | FileTruncated, now: float) -> tuple[Turn, str | None]:
        """End the connection because of `error`; return a line for the log, None if nothing was lost."""
        stage = self._stage
        if isinstance(error, PlainHttp):
            self._channel.send_plain(plain_answer(error.request))
        unfinished = self._abandon()
        if self._channel.told and stage is not _Stage.CLOSING:
            self._begin_closing(now)  # dropped with input unread, TCP would reset and destroy what was told
            try:
                self._pump_closing(now)
            except PeerError:
                self._finish()
        else:
            if unfinished or (isinstance(error, Overdue) and stage is _Stage.CLOSING):
                self._channel.abort()
            self._finish()
        turn = Turn.CLOSED if self._stage is _Stage.CLOSED else Turn.AGAIN if self._channel.has_input else Turn.WAIT
        metrics = self._services.metrics
        if not unfinished and isinstance(error, PeerTruncated) and stage is not _Stage.HANDSHAKE:
            metrics.count("closed_by_client")
            return turn, None  # between requests many clients just leave
        metrics.count(f"ended:{type(error).__name__}")
        host, port = self._client
        return turn, f"{host} port {port}: {error}"

    def _abandon(self) -> bool:
        """Give up the responses that are not complete, log them as such; whether there were any."""
        left = self._http.abandon()
        for stream_id, status, body_bytes in left:
            self._log(stream_id, status, body_bytes, complete=False)
        return bool(left)

    def shut(self) -> None:
        """End at once, at the end of the drain time or because of a bug: with RST if a response is unfinished."""
        self._services.metrics.count("ended:shut")
        if self._abandon() or self._stage is _Stage.CLOSING:
            self._channel.abort()
        self._finish()

    def _completed(self, completed: list[Completed]) -> None:
        for done in completed:
            self._log(done.stream_id, done.status, done.body_bytes, complete=True)

    def _log(self, stream_id: int, status: int, body_bytes: int, *, complete: bool) -> None:
        pending = self._pending.pop(stream_id, None)
        services, channel = self._services, self._channel
        services.metrics.count(f"body_bytes:{channel.mode.value}", body_bytes)
        if pending is None or not services.access_log.enabled:
            return
        request, kernel = pending.request, channel.mode is Mode.KERNEL
        why = None if kernel else channel.why_userspace or "no response of handover_bytes yet"
        facts = channel.facts
        tls = TlsFacts(facts.version_name, facts.cipher_name, facts.resumed, channel.mode.value, why)
        end = time.time()
        common = {"status": status, "bytes": body_bytes, "complete": complete, "tls": tls, "client": self._client[0]}
        timing = {"time": timestamp(end), "duration": round(max(end - pending.started, 0.0), 6)}
        services.access_log.add(Entry(**_request_facts(request), **common, **timing))  # type: ignore[arg-type]


def _request_facts(request: Request | Refused) -> dict[str, str | None]:
    """What the log says of the request itself; latin-1 keeps every byte apart."""
    facts: dict[str, str | None] = {"protocol": "", "host": "", "range": None, "referer": None, "user_agent": None}
    if isinstance(request, Refused):
        method, _, rest = request.request_line.decode("latin-1").partition(" ")
        return facts | {"method": method, "target": rest.partition(" ")[0]}
    for key, name in (("range", b"range"), ("referer", b"referer"), ("user_agent", b"user-agent")):
        value = request.header(name)
        facts[key] = value.decode("latin-1") if value is not None else None
    target, host = request.target.decode("latin-1"), request.host.decode("latin-1")
    return facts | {"method": request.method, "target": target, "protocol": request.version, "host": host}
