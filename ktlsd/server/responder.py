"""Request to Response, a straight line; every error that belongs to the request becomes a response here."""

import logging
import time

from ktlsd.errors import RequestError
from ktlsd.files import mime, plan
from ktlsd.files.root import DocumentRoot
from ktlsd.protocol import semantics
from ktlsd.protocol.messages import Refused, Request, Response
from ktlsd.slices import OpenFile

_log = logging.getLogger("ktlsd")
_INDEX = b"index.html"


class Responder:
    """Answers requests from one document root. Total: `respond` always returns a response."""

    def __init__(self, root: DocumentRoot) -> None:
        self._root = root

    def respond(self, request: Request | Refused) -> Response:
        """Return the response, Date and Server fields included."""
        now = int(time.time())
        try:
            response = plan.plan_refusal(request.error) if isinstance(request, Refused) else self._answer(request, now)
        except RequestError as error:
            response = plan.plan_error(error.status, error.detail)
        except Exception:  # our bug: this client gets a 500, the others go on
            _log.exception("cannot answer a request")
            response = plan.plan_error(500, "Something is wrong with the server, not with the request.")
        response.headers[:0] = ((b"Date", semantics.http_date(now)), (b"Server", b"ktlsd"))
        return response

    def _answer(self, request: Request, now: int) -> Response:
        if request.method not in semantics.METHODS:
            known = request.method in ("POST", "PUT", "DELETE", "PATCH", "CONNECT", "TRACE")
            raise RequestError(405 if known else 501, "Files can be fetched with GET and HEAD; nothing else is done here.")
        if request.target == b"*":
            return plan.plan_options()
        path = semantics.parse_path(request.target)
        if path.hidden:
            raise RequestError(404, "There is no such file.")
        if request.method == "OPTIONS":
            return plan.plan_options()
        file = self._root.open(path.relative)
        if file is None:
            if not path.is_directory and path.segments:
                return plan.plan_redirect(request, path)
            return self._index(request, path, now)
        if path.is_directory:
            file.release()
            raise RequestError(404, "There is no such directory.")
        return self._file(request, file, path.segments[-1], now)

    def _index(self, request: Request, path: semantics.Path, now: int) -> Response:
        try:
            file = self._root.open(b"/".join((*path.segments, _INDEX)))
        except RequestError as error:
            if error.status == 404:
                raise RequestError(404, "This directory has no index.html.") from error
            raise
        if file is None:
            raise RequestError(404, "This directory has no index.html.")
        return self._file(request, file, _INDEX, now)

    @staticmethod
    def _file(request: Request, file: OpenFile, name: bytes, now: int) -> Response:
        try:
            return plan.plan_file(request, file, mime.content_type(name), now)
        finally:
            file.release()  # the response's slices hold it from here on
