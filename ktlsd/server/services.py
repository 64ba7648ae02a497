"""What connections share: who answers, where it is written down, and what the limits are."""

from dataclasses import dataclass, field
from typing import Protocol

from ktlsd.errors import RequestError
from ktlsd.protocol.messages import Fields, Refused, Request, Response
from ktlsd.server.accesslog import AccessLog
from ktlsd.server.later import Later
from ktlsd.server.metrics import Metrics
from ktlsd.settings import Limits

Form = bytes | Fields  # a request as it came: by HTTP/1.1 its bytes, by HTTP/2 its header list


@dataclass(slots=True)
class Known:
    """What a request is answered with that came before, and what the log says."""

    request: Request
    body_bytes: int
    wire: bytes = b""  # all of it, as it goes out by HTTP/1.1
    frames: list[bytes] = field(default_factory=list)  # and by HTTP/2: `http2_known.prepare`
    end: bytes = b""  # of HTTP/1.1's head: about the connection
    last: bool = False  # the connection ends with it


class Answers(Protocol):
    """Who answers requests."""

    def respond(self, request: Request | Refused, now: float) -> Response | Later:
        """Return the response, or what has to be done first, in a thread.

        `now` is monotonic seconds and the same for a whole turn of the loop.
        """
        ...

    def refuse(self, request: Request | Refused, error: RequestError) -> Response:
        """Return the response that says why there is no other."""
        ...

    def known(self, form: Form, now: float) -> Known | None:
        """Return the answer to a request that came before in this very form, if that is still right."""
        return None

    def close(self) -> None:
        """Let go of everything that is only kept to be quicker."""
        return

    def sweep(self, now: float) -> None:
        """Let go of what is kept and not right any more; called once a second."""
        return

    def recognise(self, form: Form, request: Request | Refused, end: bytes = b"") -> None:
        """Say that this request came in this form, and with what its answer's head ends by HTTP/1.1."""
        return


@dataclass(frozen=True, slots=True)
class Services:
    """What connections share: none of it belongs to any."""

    responder: Answers
    access_log: AccessLog
    metrics: Metrics
    limits: Limits
