"""Requests and their answers on one established connection: output first, then input, as far as it goes without waiting."""

from typing import Final

from ktlsd.errors import (
    FileCold,
    FileTruncated,
    Http2Error,
    PeerError,
    PeerTruncated,
    RequestError,
    UnexpectedMessage,
)
from ktlsd.net.plain import Mode, PlainChannel
from ktlsd.net.tx_userspace import WHOLE_MAX
from ktlsd.protocol.budgets import Allowance
from ktlsd.protocol.http1 import Http1Connection
from ktlsd.protocol.http2 import Http2Connection
from ktlsd.protocol.http2_known import Asked
from ktlsd.protocol.messages import Refused, Request
from ktlsd.server.later import Later, read_ahead
from ktlsd.server.ledger import Ledger
from ktlsd.server.patience import Patience
from ktlsd.server.services import Known, Services

_BUDGET: Final = 4 << 20  # bytes one connection may send in its turn before the others have theirs,
_BUDGET_USERSPACE: Final = 1 << 20  # and where we encrypt them ourselves: a millisecond or two
_RECEIVES: Final = 16  # times one connection may receive in its turn, 16 KiB each
_KNOWN_MAX: Final = WHOLE_MAX - 16_384  # bytes of bodies in one such answer; headers come to it
_KNOWN: Final = 4  # and by the short way, where nobody looks whose turn it is
_KEY_UPDATES_PER_SECOND: Final = 100  # more is an attack; Java clients have been seen with dozens (HAProxy)


class Conversation:
    """HTTP with one client. Belongs to a connection, which knows how it began and ends it when `is_over`."""

    __slots__ = (
        "_answered", "_channel", "_cut", "_failure", "_faulted", "_http", "_http1", "_http2", "_key_updates",
        "_key_updates_seen", "_ledger", "_mode", "_patience", "_sent", "_services", "complaint", "jobs", "rests", "spent",
    )  # fmt: skip

    def __init__(self, channel: PlainChannel, services: Services, patience: Patience, client: str) -> None:
        limits = services.limits
        self._channel = channel
        self._services = services
        self._patience = patience
        self._ledger = Ledger(services.access_log, services.metrics, client)
        self._mode = channel.mode
        self._http1: Http1Connection | None = None
        self._http2: Http2Connection | None = None
        self._http: Http1Connection | Http2Connection
        if channel.facts.alpn == "h2":
            self._http = self._http2 = Http2Connection(limits.requests_per_connection, limits.progress_timeout)
            services.metrics.count("connections_http2")
        else:
            self._http = self._http1 = Http1Connection(max_requests=limits.requests_per_connection)
        self.rests = self._http.at_rest  # it stands between two requests
        self._key_updates = Allowance(_KEY_UPDATES_PER_SECOND, _KEY_UPDATES_PER_SECOND)
        self._key_updates_seen = 0
        self._faulted = False
        self._failure: PeerError | None = None  # what the short way ended with
        self._answered: tuple[Known, ...] = ()  # by the short way, and not yet sent
        self._cut = False  # the connection was lost before they were
        self._sent = 0  # bytes that the channel has accepted
        self.spent = 0  # of them since somebody asked
        self.complaint: PeerError | FileTruncated | None = None  # what the log is to say and the connection survives
        self.jobs: list[tuple[int, Later]] = []  # what threads must do before these streams go on; then `resume` or `go_on`

    # --- the short way ---------------------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Receive what `answer_known` is going to look at."""
        try:
            self._channel.fetch()
        except PeerError as error:
            self._failure = error
            self.rests = False

    def answer_known(self, now: float, *, hold: bool = False) -> int | None:
        """While it `rests`: answer requests that came before, in the same form, with what was kept; return how many bytes.

        None: there is more to do than that, `pump` has to follow; else, if they are to be held, `let_go`.
        """
        channel, http1, answers = self._channel, self._http1, self._services.responder
        spent = 0
        for _ in range(_KNOWN):
            try:
                data = channel.try_receive()
                if not data or channel.facts.key_updates != self._key_updates_seen:
                    self._received(data, now)
                    break
            except PeerTruncated:
                self._http.end_of_input()
                break
            except PeerError as error:
                self._failure = error
                break
            if http1 is None:
                spent += self._answer_some(data, now, hold)
            else:
                known = answers.known(data, now)
                if known is None or not self._send_known(known.wire, known.body_bytes, last=known.last, hold=hold):
                    self._understand(data, now)
                    break
                if hold:
                    self._answered += (known,)
                else:
                    self._ledger.answered(known.request, known.body_bytes, channel, now)
                self._patience.rested(now)
                spent += len(known.wire)
                self.rests = http1.answered(len(known.wire), last=known.last)
            if not self.rests or channel.expiring:
                break
            if not channel.has_input:
                self._sent += spent
                return spent
        self.rests = False  # until `pump` finds that it does
        self._sent += spent
        self.spent += spent
        return None

    def let_go(self, now: float) -> bool:
        """Send what was held, and say so in the log; False: `pump` has to follow."""
        try:
            self._channel.try_flush()
        except PeerError as error:
            self._failure = error
            self._cut = bool(self._answered)
            self.rests = False
        self._account(now)
        return self._failure is None

    def _account(self, now: float) -> None:
        for known in self._answered:
            if self._cut:
                self._ledger.cut(known.request, self._channel, now)
            else:
                self._ledger.answered(known.request, known.body_bytes, self._channel, now)
        self._answered = ()

    def greet(self, now: float) -> bool:
        """Begin with what may have come along with the handshake's end; whether that was all, by the short way."""
        spent = self.answer_known(now) if self.rests else None
        self.spent += spent or 0
        return spent is not None

    def _answer_some(self, data: bytes, now: float, hold: bool) -> int:
        """The same for HTTP/2, where several requests may come at a time: all of them or none. Return bytes sent."""
        http = self._http2
        assert http is not None
        asked = http.known.read(data)
        answers = self._find(asked, now) if asked is not None else None
        if asked is not None and answers is not None:
            hold = hold and len(answers) <= 1  # more are a batch by themselves
            sizes = [each.body_bytes for each in answers]
            wire = http.known.write(asked, sizes, [each.frames for each in answers], _KNOWN_MAX)
            if wire is not None and (not wire or self._send_known(wire, max(sizes), last=False, hold=hold)):
                self._answered += tuple(answers)
                if not hold:
                    self._account(now)
                if answers:  # not for windows alone
                    self._patience.rested(now)
                self.rests = http.answered(asked, sum(sizes), sum([len(each.frames) - 2 for each in answers]), now)
                return len(wire)
        self._understand(data, now)
        self.rests = False
        return 0

    def _find(self, asked: Asked, now: float) -> list[Known] | None:
        """Return all answers, None if one is missing."""
        answers = []
        for fields in asked.fields:
            known = self._services.responder.known(fields, now)
            if known is None:
                return None
            answers.append(known)
        return answers

    def _send_known(self, wire: bytes, body_bytes: int, *, last: bool, hold: bool) -> bool:
        """Send an answer whole or nothing of it; whether it went. If the connection is lost, it is as if it had been begun."""
        try:
            return self._channel.try_send_whole(wire, body_bytes=body_bytes, last=last, hold=hold)
        except PeerError as error:
            self._failure = error
            return False

    # --- every other way -------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether everything has been said."""
        return self._http.closing

    def pump(self, now: float) -> bool:
        """Output, then input, until neither moves; True if the turn's budget ended it. Raises PeerError, FileTruncated."""
        if self._answered:
            self.let_go(now)
        if self._failure is not None:
            raise self._failure
        again = self._pump(now)
        self._channel.try_flush()  # what nothing was sent behind: a handshake's last records, the end of a response
        self.rests = not again and self._http.at_rest
        return again

    def _pump(self, now: float) -> bool:
        http, channel = self._http, self._channel
        spent = received = 0
        budget = _BUDGET_USERSPACE if channel.mode is Mode.USERSPACE else _BUDGET
        blocked = False
        while True:
            while segments := http.next_output(budget):
                try:
                    sent = channel.try_send(segments, body_bytes=http.body_bytes)
                except FileCold as cold:
                    self.jobs.append((http.hold(), read_ahead(cold)))
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
                if self._patience.moves(http):
                    self._achieved(now)
                spent += sent
                if spent >= budget or http.working:
                    self._take_input(now)  # and then the others
                    return True
            if http.working and not blocked:
                self._take_input(now)
                self._achieved(now)
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
        http = self._http
        requests = http.receive(b"", now) if http.head_begun else []
        if requests:
            for request in requests:
                self._answer(request, now)
            return True
        if not http.wants_input:
            return False
        try:
            data = self._channel.try_receive()
        except PeerTruncated:
            data = b""  # a client may have closed its side only; if it is gone altogether, sending will tell
        return self._received(data, now)

    def _received(self, data: bytes | None, now: float) -> bool:
        """Answer what became whole by `data`, b"" for the client's end, None for nothing; False if nothing new came."""
        if self._channel.facts.key_updates != self._key_updates_seen:
            self._count_key_updates(now)
        if data:
            self._understand(data, now)
        elif data is not None:
            self._http.end_of_input()
        return data is not None

    def _count_key_updates(self, now: float) -> None:
        """`_KEY_UPDATES_PER_SECOND` may come at once, and as many again with every second."""
        new = self._channel.facts.key_updates - self._key_updates_seen
        self._key_updates_seen += new
        self._services.metrics.count("key_updates", new)
        if not self._key_updates.spend(now, new):
            error = UnexpectedMessage(f"more than {_KEY_UPDATES_PER_SECOND} KeyUpdates a second")
            self._channel.say_goodbye(error)
            raise error

    def _understand(self, data: bytes, now: float) -> None:
        http = self._http
        begun, rested = http.head_begun, self._http1 is not None and self._http1.at_rest
        requests = http.receive(data, now)
        if not begun and not requests and http.head_begun and not http.busy:
            self._achieved(now)
        for request in requests:
            self._answer(request, now)
            if isinstance(request, Request) and request.fields is not None:
                self._services.responder.recognise(request.fields, request)
            elif rested and self._http1 is not None and (end := self._http1.plain_end) is not None:
                self._services.responder.recognise(data, request, end)

    # --- answers ---------------------------------------------------------------------------------------------------

    def _answer(self, request: Request | Refused, now: float) -> None:
        self._ledger.open(request, now)
        if self._services.metrics.answering > self._services.limits.responses:
            self._services.metrics.count("turned_away:responses")
            error = RequestError(503, "The server is at its limit; try again in a moment.")
            self._http.respond(request.stream_id, self._services.responder.refuse(request, error))
            self._achieved(now)
        else:
            self._respond(request, now)

    def _respond(self, request: Request | Refused, now: float) -> None:
        response = self._services.responder.respond(request, now)
        if isinstance(response, Later):
            self.jobs.append((request.stream_id, response))
        else:
            self._http.respond(request.stream_id, response)
        self._achieved(now)

    def go_on(self, stream_id: int) -> None:
        """What a response was waiting for has been read. Pump afterwards."""
        self._http.release(stream_id)

    def resume(self, stream_id: int, now: float, refusal: RequestError | None) -> None:
        """A job is done, or could not be: answer the request, if its stream is still there. Pump afterwards."""
        request = self._ledger.request(stream_id)
        if request is None:
            return
        if refusal is None:
            self._respond(request, now)
        else:
            self._http.respond(stream_id, self._services.responder.refuse(request, refusal))

    def _achieved(self, now: float) -> None:
        if self._channel.mode is not self._mode:
            self._mode = self._channel.mode
            self._services.metrics.count("handovers")
        self._patience.achieved(self._http, now)

    # --- its end ---------------------------------------------------------------------------------------------------

    def overdue(self, now: float) -> None:
        """A deadline passed: answer 408 if a request was begun, else end it. Raises Overdue."""
        http = self._http
        self.rests = False
        if http.owes_work:
            self._patience.excuse(now)
        elif self._patience.lasts(http, self._channel, self._sent, now):
            pass
        elif http.head_begun:
            for refused in http.give_up(RequestError(408, "The request did not arrive in time.")):
                self._answer(refused, now)
        else:
            http.end_of_input()
            self._services.metrics.count("closed_idle")

    def drain(self, *, gently: bool) -> None:
        """End when what was asked is answered; `gently`: a client that is idle may ask once more. Pump afterwards."""
        self.rests = False
        self._http.drain(one_more=gently)

    def abandon(self) -> bool:
        """Give up the responses that are not complete, log them as such; whether there were any."""
        left = self._http.abandon()
        self._ledger.close(left, self._channel)
        return self._cut or any(not each.complete for each in left)

    def _complain(self, error: PeerError | FileTruncated, what: str = "ended") -> None:
        count_error(self._services, error, what)
        self.complaint = error


def count_error(services: Services, error: PeerError | FileTruncated, what: str = "ended") -> None:
    """Count what somebody was at fault with."""
    name = f"{type(error).__name__}:{error.code}" if isinstance(error, Http2Error) else type(error).__name__
    services.metrics.count(f"{what}:{name}")
