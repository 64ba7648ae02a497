"""One connection from accept to close: `pump` moves it on as far as it goes without waiting.

handshake -> conversation -> closing -> closed.
"""

import enum

from ktlsd.errors import FileTruncated, Overdue, PeerError, PeerTruncated, PlainHttp, RequestError
from ktlsd.net.plain import Mode, PlainChannel
from ktlsd.net.poller import Event
from ktlsd.protocol.http1_syntax import plain_answer
from ktlsd.server.admission import Guest
from ktlsd.server.conversation import Conversation, count_error
from ktlsd.server.later import Later
from ktlsd.server.patience import Leave, Patience
from ktlsd.server.services import Services


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
        "_channel", "_client", "_complaint", "_due", "_fd", "_leave", "_paced", "_patience", "_services", "_stage",
        "_talk", "draining", "guest", "in_line", "uncounted",
    )  # fmt: skip

    def __init__(self, channel: PlainChannel, client: tuple[str, int], guest: Guest, services: Services, now: float) -> None:
        self._channel = channel
        self._client = client
        self._services = services
        self._patience = Patience(services.limits, now)
        self._talk: Conversation | None = None  # from the end of the handshake to the beginning of the end
        self._leave: Leave | None = None  # once it is closing
        self._stage = _Stage.HANDSHAKE
        self._fd = channel.fileno()
        self._due = False  # the deadline had passed when the poller looked
        self._complaint: str | None = None
        self._paced: int | None = None
        self.draining = False
        self.guest = guest
        self.in_line = False  # its turn will come
        self.uncounted = False  # not one of its client's connections: a probe

    def fileno(self) -> int:
        """The descriptor, the same from accept to close."""
        return self._fd

    @property
    def deadline(self) -> float:
        """When to look after it even if nothing comes (monotonic seconds)."""
        return self._patience.deadline

    @property
    def handshaking(self) -> bool:
        """Whether this client has not yet shown that it speaks TLS."""
        return self._stage is _Stage.HANDSHAKE

    @property
    def brief(self) -> bool:
        """Whether it may be one that the short way is enough for."""
        return self._talk is not None and self._talk.rests and not self._due

    @property
    def has_ended(self) -> bool:
        """Whether it is closed."""
        return self._stage is _Stage.CLOSED

    def take_spent(self) -> int:
        """Return how many bytes it sent since this was asked last."""
        if self._talk is None:
            return 0
        spent, self._talk.spent = self._talk.spent, 0
        return spent

    def pace(self, rate: int | None) -> None:
        """Send at most so many bytes a second from now on; None for no limit."""
        if rate != self._paced and self._stage is not _Stage.CLOSED:
            self._paced = rate
            self._channel.pace(rate)

    # --- the one function ------------------------------------------------------------------------------------------

    def note(self, event: Event) -> None:
        """Remember what the poller saw, for `pump`."""
        if event.readable:
            self._channel.note_input(ended=event.ended)
        if event.overdue:
            self._due = True

    # The short way in three steps: with many connections each is done for all of them before the next.

    def fetch(self) -> None:
        """Receive, if it may be a request that came before."""
        if self._talk is not None and self._talk.rests and not self._due:
            self._talk.fetch()

    def answer_known(self, now: float, *, hold: bool = False) -> int | None:
        """Do all that can be done at once if that is answering what came before: return how many bytes that were.

        None: there is more to do than that, `pump` has to follow. `hold`: else `let_go` has to.
        """
        talk = self._talk
        return talk.answer_known(now, hold=hold) if talk is not None and talk.rests and not self._due else None

    def let_go(self, now: float) -> bool:
        """Send what was answered; False: `pump` has to follow."""
        return self._talk is None or self._talk.let_go(now)

    def pump(self, now: float) -> tuple[Turn, str | None]:
        """Do all that can be done at once; return how it ended and, if somebody was at fault, one line about it."""
        overdue, self._due = self._due and self.deadline <= now, False
        try:
            turn = self._turn(now, overdue=overdue)
        except (PeerError, FileTruncated) as error:
            turn = self._fail(error, now)
        complaint, self._complaint = self._complaint, None
        return turn, complaint

    def _turn(self, now: float, *, overdue: bool) -> Turn:
        if self._stage is _Stage.HANDSHAKE:
            if overdue:
                raise Overdue("no handshake in time")
            if not self._channel.try_handshake():
                return Turn.WAIT
            self._established(now)
            if self._talk is not None and self._talk.greet(now):
                return Turn.WAIT
        if self._stage is _Stage.HTTP and self._converse(now, overdue=overdue):
            return Turn.AGAIN
        if self._stage is _Stage.CLOSING:
            self._pump_closing(now)
            if self._stage is _Stage.CLOSING and self._channel.has_input:
                return Turn.AGAIN
        return Turn.CLOSED if self._stage is _Stage.CLOSED else Turn.WAIT

    def _established(self, now: float) -> None:
        self._stage = _Stage.HTTP
        if self._channel.mode is not Mode.PLAIN:
            self._services.metrics.count("handshakes:resumed" if self._channel.facts.resumed else "handshakes:full")
        self._patience.established(now)
        self._talk = Conversation(self._channel, self._services, self._patience, self._client[0])
        if self.draining:
            self._talk.drain(gently=True)

    def _converse(self, now: float, *, overdue: bool) -> bool:
        talk = self._talk
        assert talk is not None
        if overdue:
            talk.overdue(now)
        try:
            again = talk.pump(now)
        finally:
            if talk.complaint is not None:
                self._complaint, talk.complaint = self._line(talk.complaint), None
        if talk.is_over and not again:
            self._begin_closing(now)
        return again

    # --- work in threads -------------------------------------------------------------------------------------------

    def take_job(self) -> tuple[int, Later] | None:
        """Return what a thread must do before a stream can go on; `resume` or `go_on` afterwards."""
        return self._talk.jobs.pop(0) if self._talk is not None and self._talk.jobs else None

    @property
    def is_open(self) -> bool:
        """Whether there is still somebody to answer; may be asked from any thread."""
        return self._stage is _Stage.HTTP

    def go_on(self, stream_id: int) -> None:
        """What a response was waiting for has been read. Pump afterwards."""
        if self._talk is not None:
            self._talk.go_on(stream_id)

    def resume(self, stream_id: int, now: float, *, refusal: RequestError | None = None) -> None:
        """A job is done, or could not be: answer the request, if the client is still there. Pump afterwards."""
        if self._talk is not None and self._stage is _Stage.HTTP:
            self._talk.resume(stream_id, now, refusal)

    # --- ends ------------------------------------------------------------------------------------------------------

    def _begin_closing(self, now: float) -> None:
        self._stage = _Stage.CLOSING
        self._rest_no_more()
        self._leave = Leave(self._services.limits, now)

    def _pump_closing(self, now: float) -> None:
        if self._channel.try_close() or (self._leave is not None and self._leave.over(self._channel, now)):
            self._finish()
        elif self._leave is not None:
            self._patience.deadline = self._leave.deadline

    def drain(self, *, gently: bool = False) -> None:
        """End when what was asked is answered; `gently`: a client that is idle may ask once more. Pump afterwards."""
        self.draining = True
        if self._talk is not None and self._stage is _Stage.HTTP:
            self._talk.drain(gently=gently)

    def _rest_no_more(self) -> None:
        if self._talk is not None:
            self._talk.rests = False

    def _finish(self) -> None:
        self._rest_no_more()
        self._abandon()
        if self._channel.mode is Mode.USERSPACE and self._channel.why_userspace:
            self._services.metrics.count(f"handover_refusals:{self._channel.why_userspace}")
        self._channel.drop()
        self._stage = _Stage.CLOSED
        self._patience.deadline = float("inf")

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

    def _complain(self, error: PeerError | FileTruncated) -> None:
        """Count an error, and have one line about it in the log."""
        count_error(self._services, error)
        self._complaint = self._line(error)

    def _line(self, error: PeerError | FileTruncated) -> str:
        return f"{self._client[0]} port {self._client[1]}: {error}"

    def _abandon(self) -> bool:
        """Give up the responses that are not complete, log them as such; whether there were any."""
        return self._talk is not None and self._talk.abandon()

    def shut(self) -> None:
        """End at once, at the end of the drain time or because of a bug: with RST if a response is unfinished."""
        self._services.metrics.count("ended:shut")
        if self._abandon() or self._stage is _Stage.CLOSING:
            self._channel.abort()
        self._finish()
