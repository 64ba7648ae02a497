"""Request to Response, a straight line; every error that belongs to the request becomes a response here."""

import hashlib
import logging
import os
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from ktlsd.errors import RequestError
from ktlsd.files import listing, mime, plan
from ktlsd.files.listing import Entry, Order
from ktlsd.files.plan import Representation
from ktlsd.protocol import semantics
from ktlsd.protocol.messages import Refused, Request, Response
from ktlsd.protocol.negotiation import choose_encoding, prefers_json
from ktlsd.protocol.semantics import Path
from ktlsd.server.later import Later
from ktlsd.server.services import Answers
from ktlsd.server.sites import Policy, Site, Sites, host_name
from ktlsd.slices import OpenFile

_log = logging.getLogger("ktlsd")
_SMALL_LISTING: Final = 200  # names; a longer listing is made piece by piece, others in between
_BATCH: Final = 100  # names looked at in one piece
_MAX_LISTED: Final = 100_000  # names; more are not shown
_MAX_STREAMS: Final = 32  # long listings in the making, each up to some 25 MB
_NOT_FOUND: Final = "There is no such file."
_ASKABLE: Final = b"Authorization, If-Match, If-Modified-Since, If-None-Match, If-Range, Range, Want-Repr-Digest"
_EXPOSED: Final = b"Accept-Ranges, Content-Encoding, Content-Length, Content-Range, ETag, Repr-Digest"


class Responder(Answers):
    """Answers requests from the sites. Total: `respond` always returns a response, or Later for one that takes longer."""

    def __init__(self, sites: Sites, *, hsts: bytes | None = None) -> None:
        """`hsts` is the value of Strict-Transport-Security, None for none."""
        self._sites = sites
        self._hsts = hsts
        self._streams = _Slots()

    def respond(self, request: Request | Refused, now: float) -> Response | Later:
        """Return the response, Date and Server fields included."""
        wall = time.time()
        try:
            response = plan.plan_refusal(request.error) if isinstance(request, Refused) else self._answer(request, wall)
        except RequestError as error:
            return self.refuse(request, error)
        except Exception:  # our bug: this client gets a 500, the others go on
            _log.exception("cannot answer a request")
            return self.refuse(request, RequestError(500, "Something is wrong with the server, not with the request."))
        return response if isinstance(response, Later) else self._signed_off(response, wall)

    def refuse(self, request: Request | Refused, error: RequestError) -> Response:
        """Return the response that says why there is no other."""
        asked = request if isinstance(request, Request) else None
        return self._signed_off(plan.plan_error(error.status, error.detail, asked), time.time())

    def _signed_off(self, response: Response, now: float) -> Response:
        """Add what every response has; an operator's own Server or HSTS stays."""
        said = {name.lower() for name, _ in response.headers}
        if b"server" not in said:
            response.headers.insert(0, (b"Server", b"ktlsd"))
        response.headers.insert(0, (b"Date", semantics.http_date(int(now))))
        if self._hsts is not None and b"strict-transport-security" not in said:
            response.headers.append((b"Strict-Transport-Security", self._hsts))
        return response

    # --- one request, from top to bottom ---------------------------------------------------------------------------

    def _answer(self, request: Request, now: float) -> Response | Later:
        if request.method not in semantics.METHODS:
            known = request.method in ("POST", "PUT", "DELETE", "PATCH", "CONNECT", "TRACE")
            raise RequestError(405 if known else 501, "Files can be fetched with GET and HEAD; nothing else is done here.")
        if request.target == b"*":
            return plan.plan_options()
        path = semantics.parse_path(request.target)
        site = self._sites.choose(request.host)
        policy = site.policy(path)
        try:
            response = self._allowed(request, path, policy, now) or self._found(_Asked(request, site, path, policy, now))
        except RequestError as error:
            response = plan.plan_error(error.status, error.detail, request)
            if error.status == 401:
                response.headers.append((b"WWW-Authenticate", b'Basic realm="files", charset="UTF-8"'))
        if isinstance(response, Response):
            _decorate(response, request, policy)
        return response

    def _allowed(self, request: Request, path: Path, policy: Policy, now: float) -> Response | Later | None:
        """Everything that is decided without looking at a file; None to go on. Raises RequestError."""
        if request.method == "OPTIONS":  # a preflight comes without credentials (Fetch §3.2.2)
            return plan.plan_options()
        if policy.redirect is not None:
            location = _redirect_target(policy.redirect, request, path)
            return plan.plan_redirect(request, policy.status, location, "It is somewhere else.")
        if path.hidden:
            raise RequestError(404, _NOT_FOUND)
        if policy.signer is not None:
            verdict = policy.signer.verify(path, request.target.partition(b"?")[2], now)
            if not verdict:
                raise RequestError(403, "This address has expired." if verdict is None else "This address is not signed.")
        return _password(request, policy)

    def _found(self, asked: "_Asked") -> Response | Later:
        if asked.policy.try_files is None:
            return self._path(asked, asked.path)
        own = asked.path.encoded(directory=asked.path.is_directory).decode("ascii")
        for candidate in asked.policy.try_files:
            try:
                tried = semantics.parse_path(candidate.replace("{path}", own).encode("utf-8"))
                if not tried.hidden:
                    return self._path(asked, tried)
            except RequestError as error:
                if error.status != 404:
                    raise
        raise RequestError(404, _NOT_FOUND)

    def _path(self, asked: "_Asked", path: Path) -> Response | Later:
        file = asked.site.root.open(path.relative)
        if later := asked.check(path, file):
            return later
        if file is None:
            if not path.is_directory and path.segments:
                return plan.plan_redirect_to_directory(asked.request, path)
            return self._directory(asked, path)
        if path.is_directory:
            file.release()
            raise RequestError(404, "There is no such directory.")
        return _file(asked, path, file)

    def _directory(self, asked: "_Asked", path: Path) -> Response | Later:
        for name in asked.site.index:
            index = Path((*path.segments, name), is_directory=False)
            try:
                file = asked.site.root.open(index.relative)
            except RequestError as error:
                if error.status != 404:
                    raise
                continue
            if file is not None:
                return asked.check(index, file) or _file(asked, index, file)
        if not asked.site.policy(path).listing:
            raise RequestError(404, "This directory is not listed.")
        return self._listing(asked.request, asked.site, path)

    # --- listings --------------------------------------------------------------------------------------------------

    def _listing(self, request: Request, site: Site, path: Path) -> Response:
        as_json = prefers_json(request.header(b"accept"))
        order = Order.of_query(request.target.partition(b"?")[2])
        found = site.root.scan(path.relative)
        first = list(islice(found, _SMALL_LISTING + 1))
        entries = [entry for entry in first if entry is not None]
        content_type = b"application/json" if as_json else b"text/html; charset=utf-8"
        response = Response(200, [(b"Content-Type", content_type), (b"Vary", b"Accept")])

        def render(cut: int) -> Iterator[bytes]:
            order.sort(entries)
            return listing.render_json(entries) if as_json else site.template.render(path, entries, order, cut=cut)

        if len(first) > _SMALL_LISTING:
            if self._streams.taken >= _MAX_STREAMS:
                raise RequestError(503, "Too many long listings are being made.")
            response.content_length, response.stream = None, _LongListing(self._streams, found, entries, render)
            return response
        page = b"".join(render(0))
        etag = b'W/"%s"' % hashlib.sha256(page).hexdigest()[:24].encode()
        response.headers.append((b"ETag", etag))
        status = semantics.evaluate(plan.conditions(request), semantics.Validators(etag, 1 << 62))
        if status == 304:
            return Response(304, response.headers[1:], content_length=None)
        if status is not None:
            raise RequestError(status, "The folder is not the one the request's condition asks for.")
        response.body, response.content_length = [page], len(page)
        return response


class _Slots:
    """How many long listings are in the making."""

    taken = 0


class _LongListing:
    """Reads a folder a batch at a time, then renders it; an empty piece lets others have their turn.

    Has its place from the beginning, and until `close`.
    """

    def __init__(
        self, slots: _Slots, found: Iterator[Entry | None], entries: list[Entry], render: Callable[[int], Iterator[bytes]]
    ) -> None:
        self._slots = slots
        self._found = found
        self._entries = entries
        self._render = render
        self._pieces: Iterator[bytes] | None = None
        self._open = True
        slots.taken += 1

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._pieces is None:
            batch = list(islice(self._found, _BATCH))
            self._entries += (entry for entry in batch if entry is not None)
            enough = len(self._entries) >= _MAX_LISTED
            if batch and not enough:
                return b""
            self._pieces = self._render(len(self._entries) if enough else 0)
        return next(self._pieces)

    def close(self) -> None:
        """Give the place back."""
        if self._open:
            self._open = False
            self._slots.taken -= 1


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that may be answered, as far as what it names is concerned."""

    request: Request
    site: Site
    path: Path
    policy: Policy
    now: float  # seconds since the epoch

    def check(self, path: Path, file: OpenFile | None) -> Later | None:
        """Ask the rules again if it is another path that was opened (an index, one of try_files).

        Lets go of `file` if it may not be sent, or not yet. Raises RequestError.
        """
        if path == self.path:
            return None
        policy = self.site.policy(path)
        later = refusal = None
        if policy.signer is not None and policy.signer is not self.policy.signer:
            refusal = RequestError(403, "This address is not signed.")
        else:
            try:
                later = _password(self.request, policy)
            except RequestError as error:
                refusal = error
        if file is not None and (later or refusal):
            file.release()
        if refusal is not None:
            raise refusal
        return later


def _password(request: Request, policy: Policy) -> Later | None:
    """Ask for a password where one is wanted; None if it is right. Raises RequestError(401)."""
    if policy.passwords is None:
        return None
    known = policy.passwords.check(request.header(b"authorization"), time.monotonic())
    if isinstance(known, Later):
        return known
    if not known:
        raise RequestError(401, "A user name and a password are asked for.")
    return None


def _file(asked: _Asked, path: Path, file: OpenFile) -> Response:
    """Answer from an open file, in the form the client takes best; the reference that came with `file` is used up."""
    request, site = asked.request, asked.site
    policy = asked.policy if path == asked.path else site.policy(path)
    where, name = path.relative, path.segments[-1]
    content_type = policy.content_type or mime.content_type(name)
    shown = Representation(file, content_type, offer_digest=site.files.repr_digest)
    sibling: OpenFile | None = None
    try:
        if site.siblings is not None and mime.is_compressible(content_type):
            shown, sibling, where = _negotiated(request, site, shown, where)
        if site.digests is not None:
            shown = replace(shown, digest=site.digests.lookup(where, shown.file, time.monotonic()))
        boundary = os.urandom(15).hex().encode() if request.header(b"range") else b""
        response = plan.plan_file(request, shown, int(asked.now), boundary=boundary)
        response.reusable = response.status == 200 and not (policy.is_locked or asked.policy.is_locked)
    finally:
        file.release()  # the response's slices hold it from here on
        if sibling is not None:
            sibling.release()
    if policy.disposition is not None:
        response.headers.append((b"Content-Disposition", _disposition(policy.disposition, name)))
    if policy.cache_control is not None and response.status in (200, 206, 304):
        response.headers.append((b"Cache-Control", policy.cache_control))
    return response


def _negotiated(
    request: Request, site: Site, shown: Representation, path: bytes
) -> tuple[Representation, OpenFile | None, bytes]:
    """Return the form this client takes, the file opened for it, and where that lies. Raises RequestError(406)."""
    assert site.siblings is not None
    codings = site.siblings.codings(path, shown.file, time.monotonic())
    coding = choose_encoding(request.header(b"accept-encoding"), codings)
    if coding is None:
        raise RequestError(406, "It does not exist in a content coding that the client takes.")
    if not codings:
        return shown, None, path
    if coding:
        sibling = site.siblings.open(path, shown.file, coding)
        if sibling is not None:
            return replace(shown, file=sibling, encoding=coding, varies=True), sibling, site.siblings.path(path, coding)
    return replace(shown, varies=True), None, path


def _disposition(kind: str, name: bytes) -> bytes:
    """Return Content-Disposition with the file's name (RFC 6266): a plain form for old clients, the true one encoded."""
    plain = bytes(c if 0x20 <= c <= 0x7E and c not in b'"\\%' else 0x5F for c in name)
    value = b'%s; filename="%s"' % (kind.encode("ascii"), plain)
    if plain != name:
        value += b"; filename*=UTF-8''" + semantics.encode_segment(name).replace(b"'", b"%27")
    return value


def _redirect_target(template: str, request: Request, path: Path) -> bytes:
    own = path.encoded(directory=path.is_directory)
    query = request.target.partition(b"?")[2]
    if not query:
        template = template.replace("?{query}", "").replace("&{query}", "")
    target = urllib.parse.quote(template, safe="%/:?#[]@!$&'()*+,;={}~").encode("ascii")
    return target.replace(b"{path}", own).replace(b"{query}", query)


def _decorate(response: Response, request: Request, policy: Policy) -> None:
    """Add what the rules say of every answer: CORS, the operator's own fields."""
    if policy.cors is not None:
        _allow_origin(response, request, policy.cors)
    for name, value in policy.headers:  # the operator's word is the last one
        lower = name.lower()
        response.headers = [field for field in response.headers if field[0].lower() != lower]
        response.headers.append((name, value))


def _allow_origin(response: Response, request: Request, origins: frozenset[bytes]) -> None:
    """Let scripts of these origins read the response (Fetch §3.2)."""
    origin = request.header(b"origin")
    if b"*" in origins:
        response.headers.append((b"Access-Control-Allow-Origin", b"*"))
    else:
        plan.add_vary(response.headers, b"Origin")
        if origin is None or origin.lower() not in origins:
            return
        response.headers.append((b"Access-Control-Allow-Origin", origin))
    response.headers.append((b"Access-Control-Expose-Headers", _EXPOSED))
    if request.method == "OPTIONS" and request.header(b"access-control-request-method") is not None:
        response.headers += (
            (b"Access-Control-Allow-Methods", b"GET, HEAD"),
            (
                b"Access-Control-Allow-Headers",
                _ASKABLE,
            ),
            (b"Access-Control-Max-Age", b"86400"),
        )


class Redirector(Answers):
    """Answers on a plain-text port: everything is at https, but what certificate authorities come to look for."""

    _CHALLENGE: Final = b".well-known", b"acme-challenge"  # RFC 8555 §8.3

    def __init__(self, challenges: Responder, https_port: int) -> None:
        self._challenges = challenges
        self._port = b"" if https_port == 443 else b":%d" % https_port

    def respond(self, request: Request | Refused, now: float) -> Response | Later:
        """Return a redirect to the same address at https, or a challenge's file."""
        if isinstance(request, Refused) or not self._is_redirectable(request) or self._is_challenge(request):
            return self._challenges.respond(request, now)
        if not host_name(request.host):
            response = plan.plan_error(400, "Without a Host field there is no telling where to; use https://.", request)
        else:
            host = request.host if request.host.startswith(b"[") else request.host.partition(b":")[0]
            host = host.partition(b"]")[0] + b"]" if host.startswith(b"[") else host
            location = b"https://" + host + self._port + request.target
            response = plan.plan_redirect(request, 308, location, "This is served over https only.")
        response.headers[:0] = ((b"Date", semantics.http_date(int(time.time()))), (b"Server", b"ktlsd"))
        return response

    def refuse(self, request: Request | Refused, error: RequestError) -> Response:
        """Return the response that says why there is no other."""
        return self._challenges.refuse(request, error)

    @staticmethod
    def _is_redirectable(request: Request) -> bool:
        return request.method in semantics.METHODS and request.target.startswith(b"/")

    def _is_challenge(self, request: Request) -> bool:
        try:
            return semantics.parse_path(request.target).segments[:2] == self._CHALLENGE
        except RequestError:
            return False
