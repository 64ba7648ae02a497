"""What connections share: who answers, where it is written down, and what the limits are."""

from dataclasses import dataclass
from typing import Protocol

from ktlsd.errors import RequestError
from ktlsd.protocol.messages import Refused, Request, Response
from ktlsd.server.accesslog import AccessLog
from ktlsd.server.later import Later
from ktlsd.server.metrics import Metrics
from ktlsd.settings import Limits


class Answers(Protocol):
    """Who answers requests."""

    def respond(self, request: Request | Refused) -> Response | Later:
        """Return the response, or what has to be done first, in a thread."""

    def refuse(self, request: Request | Refused, error: RequestError) -> Response:
        """Return the response that says why there is no other."""


@dataclass(frozen=True, slots=True)
class Services:
    """What connections share: none of it belongs to any."""

    responder: Answers
    access_log: AccessLog
    metrics: Metrics
    limits: Limits
