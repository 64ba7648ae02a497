"""What connections share: who answers, where it is written down, and what the limits are."""

from dataclasses import dataclass
from typing import Protocol

from ktlsd.errors import RequestError
from ktlsd.protocol.messages import Refused, Request, Response
from ktlsd.server.accesslog import AccessLog
from ktlsd.server.later import Later
from ktlsd.server.metrics import Metrics
from ktlsd.settings import Limits


@dataclass(slots=True)
class Known:
    """What a request is answered with that came before: all of it as it goes out by HTTP/1.1, and what the log says."""

    request: Request
    body_bytes: int
    wire: bytes


class Answers(Protocol):
    """Who answers requests."""

    def respond(self, request: Request | Refused) -> Response | Later:
        """Return the response, or what has to be done first, in a thread."""
        ...

    def refuse(self, request: Request | Refused, error: RequestError) -> Response:
        """Return the response that says why there is no other."""
        ...

    def known(self, data: bytes, now: float) -> Known | None:
        """Return the answer to a request of HTTP/1.1 that came before, byte for byte, if that is still right.

        `now` is monotonic seconds and the same for a whole turn of the loop.
        """
        return None

    def recognise(self, data: bytes, request: Request | Refused) -> None:
        """Say that this request came as these bytes."""
        return


@dataclass(frozen=True, slots=True)
class Services:
    """What connections share: none of it belongs to any."""

    responder: Answers
    access_log: AccessLog
    metrics: Metrics
    limits: Limits
