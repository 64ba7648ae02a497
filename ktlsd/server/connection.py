"""One connection from accept to close: `pump` moves it on as far as it goes without waiting.

handshake -> HTTP -> closing -> closed. Output first, then input, then back to the poller.
"""

import enum
from typing import Final

from ktlsd.errors import (
    FileCold,
    FileTruncated,
    Http2Error,
    Overdue,
    PeerError,
    PeerTruncated,
    PlainHttp,
    RequestError,
    UnexpectedMessage,
)
from ktlsd.net.plain import Mode, PlainChannel
from ktlsd.net.poller import Event
from ktlsd.protocol.budgets import Allowance
from ktlsd.protocol.http1 import Http1Connection
from ktlsd.protocol.http1_syntax import plain_answer
from ktlsd.protocol.http2 import Http2Connection
from ktlsd.protocol.messages import Refused, Request
from ktlsd.server.admission import Guest
from ktlsd.server.later import Later, read_ahead
from ktlsd.server.ledger import Ledger
from ktlsd.server.patience import Leave, MinimumRate
from ktlsd.server.services import Services

_BUDGET: Final = 4 << 20  # bytes one connection may send in its turn before the others have theirs
_RECEIVES: Final = 16  # times one connection may receive in its turn, 16 KiB each
_KEY_UPDATES_PER_SECOND: Final = 100  # more is an attack; Java clients have been seen with dozens (HAProxy)


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


class Connection:
    """A client. A source for the poller: `fileno` and `deadline` (monotonic seconds)."""

    __slots__ = (
        "_channel", "_client", "_complaint", "_faulted", "_fd", "_http", "_jobs", "_key_updates", "_key_updates_seen",
        "_leave", "_ledger", "_mode", "_paced", "_progress", "_progress_due", "_rate", "_sent", "_services", "_stage",
        "_unacknowledged", "deadline", "draining", "guest", "spent", "uncounted",
    )  # fmt: skip

    def __init__(self, channel: PlainChannel, client: tuple[str, int], guest: Guest, services: Services, now: float) -> None:
        self._channel = channel
        self._client = client
        self._services = services
        self._http: Http1Connection | Http2Connection = Http1Connection(max_requests=services.limits.requests_per_connection)
        self._ledger = Ledger(services.access_log, services.metrics, client[0])
        self._jobs: list[tuple[int, Later]] = []
        self._stage = _Stage.HANDSHAKE
        self._fd = channel.fileno()
        self._faulted = False
        self._progress = 0
        self._progress_due = 0.0
        self._key_updates = Allowance(_KEY_UPDATES_PER_SECOND, _KEY_UPDATES_PER_SECOND)
        self._key_updates_seen = 0
        self._leave: Leave | None = None  # once it is closing
        self._unacknowledged = 0
        self._complaint: str | None = None
        self._mode = Mode.HANDSHAKE
        self._paced: int | None = None
        self._sent = 0  # bytes that the channel has accepted
        self._rate = MinimumRate(services.limits) if services.limits.min_rate is not None else None
        self.deadline = now + services.limits.handshake_timeout
        self.draining = False
        self.guest = guest
        self.uncounted = False  # not one of its client's connections: a probe
        self.spent = 0  # bytes sent in the last turn

    def fileno(self) -> int:
        """The descriptor, the same from accept to close."""
        return self._fd

    @property
    def handshaking(self) -> bool:
        """Whether this client has not yet shown that it speaks TLS."""
        return self._stage is _Stage.HANDSHAKE

    def pace(self, rate: int | None) -> None:
        """Send at most so many bytes a second from now on; None for no limit."""
        if rate != self._paced and self._stage is not _Stage.CLOSED:
            self._paced = rate
            self._channel.pace(rate)

    # --- the one function ------------------------------------------------------------------------------------------

    def pump(self, now: float, event: Event) -> tuple[Turn, str | None]:
        """Do all that can be done at once; return how it ended and, if somebody was at fault, one line about it."""
        self.spent = 0
        if event.readable:
            self._channel.note_input(ended=event.ended)
        try:
            turn = self._turn(now, overdue=event.overdue and self.deadline <= now)
        except (PeerError, FileTruncated) as error:
            turn = self._fail(error, now)
        complaint, self._complaint = self._complaint, None
        return turn, complaint

    def _turn(self, now: float, *, overdue: bool) -> Turn:
        if overdue:
            self._overdue(now)
        if self._stage is _Stage.HANDSHAKE:
            if not self._channel.try_handshake():
                return Turn.WAIT
            self._established(now)
        if self._stage is _Stage.HTTP and self._pump_http(now):
            return Turn.AGAIN
        if self._stage is _Stage.CLOSING:
            self._pump_closing(now)
            if self._stage is _Stage.CLOSING and self._channel.has_input:
                return Turn.AGAIN
        return Turn.CLOSED if self._stage is _Stage.CLOSED else Turn.WAIT

    def _established(self, now: float) -> None:
        self._stage = _Stage.HTTP
        facts, metrics, limits = self._channel.facts, self._services.metrics, self._services.limits
        if self._channel.mode is not Mode.PLAIN:
            metrics.count("handshakes:resumed" if facts.resumed else "handshakes:full")
        self._mode = self._channel.mode
        self.deadline = now + limits.idle_timeout
        if facts.alpn == "h2":
            self._http = Http2Connection(limits.requests_per_connection, limits.progress_timeout)
            metrics.count("connections_http2")
        if self.draining:
            self._http.drain(one_more=True)

    def _pump_http(self, now: float) -> bool:
        """Output, then input, until neither moves; True if the turn's budget ended it."""
        http, channel = self._http, self._channel
        spent = received = 0
        blocked = False
        channel.try_flush()  # the end of a response may still be held there when HTTP has nothing more to send
        while True:
            while segments := http.next_output(_BUDGET):
                try:
                    sent = channel.try_send(segments, body_bytes=http.body_bytes)
                except FileCold as cold:
                    self._jobs.append((http.hold(), read_ahead(cold)))
                    self._services.metrics.count("cold_reads")
                    continue
                except FileTruncated as error:
                    if not http.file_failed():
                        raise
                    self._complain(error, "stream_ended")
                    continue
                blocked = sent is None
                if sent is None:
                    break
                self._ledger.close(http.sent(sent), channel)
                self._sent += sent
                self.spent += sent
                if http.progress != self._progress or not http.busy:  # answers to a PING are none
                    self._set_deadline(now)
                spent += sent
                if spent >= _BUDGET or http.working:
                    self._take_input(now)  # and then the others
                    return True
            if http.working and not blocked:
                self._take_input(now)
                self._set_deadline(now)
                return True
            if ended := http.sent(0):  # without a last piece, or reset
                self._ledger.close(ended, channel)
                continue
            if channel.expiring:
                http.drain()
            if http.fault is not None and not self._faulted:
                self._faulted = True
                self._complain(http.fault)
            if http.closing:
                self._begin_closing(now)
                return False
            if not self._take_input(now):
                if channel.expiring and not (http.busy or http.closing or http.leaving or http.head_begun):
                    continue  # a KeyUpdate came that can't be answered, and nothing is owed: end it now
                return channel.has_input and http.wants_input
            received += 1
            if received >= _RECEIVES:
                return True

    def _take_input(self, now: float) -> bool:
        """Receive once and answer what became whole; False if nothing new came."""
        http, channel = self._http, self._channel
        requests = http.receive(b"", now) if http.head_begun else []
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
            requests = http.receive(data, now)
            if not begun and not requests and http.head_begun and not http.busy:
                self._set_deadline(now)
        for request in requests:
            self._answer(request, now)
        return True

    def _answer(self, request: Request | Refused, now: float) -> None:
        self._ledger.open(request)
        if self._services.metrics.answering > self._services.limits.responses:
            self._services.metrics.count("turned_away:responses")
            error = RequestError(503, "The server is at its limit; try again in a moment.")
            self._http.respond(request.stream_id, self._services.responder.refuse(request, error))
            self._set_deadline(now)
        else:
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

    def go_on(self, stream_id: int) -> None:
        """What a response was waiting for has been read. Pump afterwards."""
        self._http.release(stream_id)

    def resume(self, stream_id: int, now: float, *, refusal: RequestError | None = None) -> None:
        """A job is done, or could not be: answer the request, if the client is still there. Pump afterwards."""
        request = self._ledger.request(stream_id)
        if request is None or self._stage is not _Stage.HTTP:
            return
        if refusal is None:
            self._respond(request, now)
        else:
            self._http.respond(stream_id, self._services.responder.refuse(request, refusal))

    def _set_deadline(self, now: float) -> None:
        """Something was achieved. What comes next has its own time: progress of a response, the rest of a head, a request."""
        limits = self._services.limits
        self._progress = self._http.progress
        if self._channel.mode is not self._mode:
            self._mode = self._channel.mode
            self._services.metrics.count("handovers")
        if self._http.busy:
            self.deadline = self._progress_due = now + limits.progress_timeout
            if self._rate is not None:
                self._rate.begin(now)  # it is looked at when that is due, in a turn: here nobody could be told
                self.deadline = min(self.deadline, self._rate.due)
            return
        if self._rate is not None:
            self._rate.rest()
        if self._http.head_begun:
            self.deadline = now + limits.header_timeout
        else:
            self.deadline = now + (limits.linger_timeout if self._http.leaving else limits.idle_timeout)

    def _check_key_updates(self, now: float) -> None:
        """`_KEY_UPDATES_PER_SECOND` may come at once, and as many again with every second."""
        new = self._channel.facts.key_updates - self._key_updates_seen
        self._key_updates_seen += new
        if new:
            self._services.metrics.count("key_updates", new)
        if new and not self._key_updates.spend(now, new):
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
            if self._rate is not None:
                self._rate.rest()  # what we owed is not to be held against it
            return
        if self._rate is not None and self._http.busy and 0 < self._rate.due <= now:
            self._rate.look(now, self._sent - self._channel.unacknowledged())
            self.deadline = min(self._progress_due, self._rate.due)
            if now < self._progress_due:
                return
        if not (flushed := self._channel.try_flush()) or self._http.busy:
            left = self._channel.unacknowledged()
            # Slow, but it takes what TCP holds: writable comes in large steps. Where HTTP/2 has no window TCP holds only talk.
            if left != self._unacknowledged and (not flushed or self._http.next_output(1)):
                self._unacknowledged = left
                self.deadline = self._progress_due = now + self._services.limits.progress_timeout
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
        self._leave = Leave(self._services.limits, now)

    def _pump_closing(self, now: float) -> None:
        if self._channel.try_close() or (self._leave is not None and self._leave.over(self._channel, now)):
            self._finish()
        elif self._leave is not None:
            self.deadline = self._leave.deadline

    # --- ends ------------------------------------------------------------------------------------------------------

    def drain(self, *, gently: bool = False) -> None:
        """End when what was asked is answered; `gently`: a client that is idle may ask once more. Pump afterwards."""
        self.draining = True
        if self._stage is _Stage.HTTP:
            self._http.drain(one_more=gently)

    def _finish(self) -> None:
        self._abandon()
        if self._mode is Mode.USERSPACE and self._channel.why_userspace:
            self._services.metrics.count(f"handover_refusals:{self._channel.why_userspace}")
        self._channel.drop()
        self._stage = _Stage.CLOSED
        self.deadline = float("inf")

    def _fail(self, error: PeerError | FileTruncated, now: float) -> Turn:
        """End the connection because of `error`; there is a line for the log if anything was lost."""
        stage = self._stage
        if stage is _Stage.HANDSHAKE:
            self._services.metrics.count(f"handshake_failures:{type(error).__name__}")
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
        if not unfinished and isinstance(error, PeerTruncated) and stage is not _Stage.HANDSHAKE:
            self._services.metrics.count("closed_by_client")  # between requests many clients just leave
        else:
            self._complain(error)
        return Turn.CLOSED if self._stage is _Stage.CLOSED else Turn.AGAIN if self._channel.has_input else Turn.WAIT

    def _complain(self, error: PeerError | FileTruncated, what: str = "ended") -> None:
        """Count an error, and have one line about it in the log."""
        name = f"{type(error).__name__}:{error.code}" if isinstance(error, Http2Error) else type(error).__name__
        self._services.metrics.count(f"{what}:{name}")
        self._complaint = f"{self._client[0]} port {self._client[1]}: {error}"

    def _abandon(self) -> bool:
        """Give up the responses that are not complete, log them as such; whether there were any."""
        left = self._http.abandon()
        self._ledger.close(left, self._channel)
        return any(not each.complete for each in left)

    def shut(self) -> None:
        """End at once, at the end of the drain time or because of a bug: with RST if a response is unfinished."""
        self._services.metrics.count("ended:shut")
        if self._abandon() or self._stage is _Stage.CLOSING:
            self._channel.abort()
        self._finish()
