"""Answers to what is asked again and again: found by the whole request, small files with their contents.

A worker asked for the same file thousands of times a second opens, looks at and plans it each time, and reads it if it is
small. Here the second equal request (method, target, host, every field) within a second has its answer kept, and the file
open; a large file's answer refers to it. Before it is used in a turn of the loop the open file is looked at: its inode's
change time tells of changes, of a file moved over it, and of its end. What is decided elsewhere (a precompressed sibling
that appears, a folder that is renamed) counts after a second at most. Whoever asks for a small file in the very same form,
by HTTP/1.1 the bytes, by HTTP/2 the header list, has the answer as it goes out, and is not understood anew.
"""

import os
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from ktlsd.errors import FileCold, FileTruncated, RequestError
from ktlsd.net.gather import gather
from ktlsd.protocol.header_blocks import block_of
from ktlsd.protocol.http1_syntax import END, write_head
from ktlsd.protocol.http2_known import prepare
from ktlsd.protocol.messages import Headers, Refused, Request, Response, holds_secret
from ktlsd.protocol.semantics import http_date
from ktlsd.server.later import Later
from ktlsd.server.process import descriptor_limit, out_of_descriptors
from ktlsd.server.services import Answers, Form, Known
from ktlsd.slices import FileSlice, OpenFile

HOT_MAX: Final = 64_000  # bytes of a file whose contents are kept: with its header it goes out in one step
_FOR: Final = 1.0  # seconds until it is looked for anew
_SETTLED: Final = 0.1  # seconds since the last change: two changes within a tick of the file system's clock look like one
ENTRIES: Final = 512  # each has a descriptor; no more than one in eight that the process may have
_MEMORY: Final = 16 << 20  # bytes
_SEEN: Final = 4_096
_KEY_MAX: Final = 1_024  # bytes of a request,
_HEADERS_MAX: Final = 8_192  # bytes of an answer's: with HTTP/2 they go in one frame
_DATA_MAX: Final = 1_536  # and as it came

Key = tuple[str, bytes, bytes, tuple[tuple[bytes, bytes], ...]]


@dataclass(slots=True)
class _Hot:
    file: OpenFile
    body: bytes | None  # None: too large
    offset: int
    length: int
    headers: Headers  # without the first, Date
    until: float  # monotonic seconds
    looked: float  # at the file, monotonic seconds
    form: Form = b""  # the request as it came
    known: Known | None = None  # how that is answered
    second: int = 0  # since the epoch, that the answer names

    def write(self, known: Known, second: int) -> None:
        """Write the answer as it goes out."""
        self.second, response = second, self.response(second)
        assert self.body is not None
        if isinstance(self.form, bytes):
            known.wire = write_head(response, known.end) + self.body
        else:
            known.frames = prepare(block_of(response), self.body)

    def response(self, second: int) -> Response:
        headers = [(b"Date", http_date(second)), *self.headers]
        if self.body is not None:
            return Response(200, headers, [self.body] if self.body else [], self.length)
        file = self.file.share()
        part = FileSlice(file, self.offset, self.length)
        file.release()  # the slice holds it
        return Response(200, headers, [part], self.length)


class HotResponses(Answers):
    """Stands before a responder and answers what it can by itself. One worker's."""

    def __init__(self, responder: Answers) -> None:
        self._responder = responder
        self._most = min(ENTRIES, descriptor_limit() // 8)
        self._hot: OrderedDict[Key, _Hot] = OrderedDict()
        self._seen: set[int] = set()  # hashes of what was asked for once
        self._bytes = 0
        self._by_form: dict[Form, _Hot] = {}
        self._now = 0.0  # monotonic seconds
        self._second = 0  # since the epoch

    def known(self, form: Form, now: float) -> Known | None:
        """Return the answer to a request that came before in this very form, if that is still right."""
        hot = self._by_form.get(form)
        if hot is None or hot.known is None:
            return None
        second = self._second if now == self._now else self._wall(now)
        if hot.looked != now:
            if hot.until <= now or not _unchanged(hot.file):
                return None  # who is asked now sees it, too, and forgets it
            hot.looked = now
        if hot.second != second:
            hot.write(hot.known, second)
        return hot.known

    def _wall(self, now: float) -> int:
        """Return seconds since the epoch; the clock is read once in a turn."""
        if now != self._now:
            self._now, self._second = now, int(time.time())
        return self._second

    def recognise(self, form: Form, request: Request | Refused, end: bytes = b"") -> None:
        """Say that this request came in this form, and with what its answer's head ends by HTTP/1.1."""
        if (len(form) if isinstance(form, bytes) else sum([len(name) + len(value) for name, value in form])) > _DATA_MAX:
            return
        hot = self._hot.get(_key(request)) if isinstance(request, Request) else None
        if isinstance(request, Request) and hot is not None and hot.body is not None and not hot.form:
            hot.form, hot.second = form, 0
            hot.known = Known(request, hot.length, end=end, last=end == END)
            self._by_form[form] = hot

    def respond(self, request: Request | Refused, now: float) -> Response | Later:
        """Return the response, or what has to be done first, in a thread."""
        if isinstance(request, Refused) or request.method != "GET":
            return self._responder.respond(request, now)
        key = _key(request)
        self.sweep(now)
        hot = self._hot.get(key)
        if hot is not None:
            if _unchanged(hot.file):
                return hot.response(self._wall(now))
            self._forget(key)
        response = self._responder.respond(request, now)
        if isinstance(response, Response) and response.status == 503 and self._hot and out_of_descriptors():
            self.close()  # those that are only kept are the first to go
            response = self._responder.respond(request, now)
        if isinstance(response, Response) and response.reusable:
            self._remember(key, response, now)
        return response

    def sweep(self, now: float) -> None:
        """Let go of what was kept long enough, and of its files: a deleted one's space is not held."""
        while self._hot and next(iter(self._hot.values())).until <= now:  # the first is the oldest
            self._forget(next(iter(self._hot)))

    def refuse(self, request: Request | Refused, error: RequestError) -> Response:
        """Return the response that says why there is no other."""
        return self._responder.refuse(request, error)

    def _remember(self, key: Key, response: Response, now: float) -> None:
        """Keep an answer, if it was asked for before."""
        if len(response.body) != 1:
            return
        if hash(key) not in self._seen:
            if len(self._seen) >= _SEEN:
                self._seen.clear()
            self._seen.add(hash(key))
            return
        if len(key[1]) + sum(len(name) + len(value) for name, value in key[3]) > _KEY_MAX:
            return
        if holds_secret(key[3], key[1]):
            return
        if sum(len(name) + len(value) for name, value in response.headers) > _HEADERS_MAX:
            return
        (part,) = response.body
        if not isinstance(part, FileSlice) or time.time() - part.file.ctime_ns / 1e9 < _SETTLED:
            return
        body = _read(part) if part.length <= HOT_MAX else None
        if (body is None and part.length <= HOT_MAX) or not _unchanged(part.file):
            return
        headers = response.headers[1:]
        self._hot[key] = _Hot(part.file.hold(), body, part.offset, part.length, headers, now + _FOR, 0.0)
        self._bytes += 2 * len(body or b"")  # the answer, ready, is another copy
        while self._bytes > _MEMORY or len(self._hot) > self._most:
            self._forget(next(iter(self._hot)))

    def _forget(self, key: Key) -> None:
        hot = self._hot.pop(key)
        self._bytes -= 2 * len(hot.body or b"")
        self._by_form.pop(hot.form, None)
        hot.file.release()

    def close(self) -> None:
        """Let go of everything that is kept."""
        for key in list(self._hot):
            self._forget(key)


def _key(request: Request) -> Key:
    return request.method, request.target, request.host, request.headers


def _read(part: FileSlice) -> bytes | None:
    """Return its bytes, None if they are not to be had at once."""
    try:
        body = bytes(gather([part], memoryview(bytearray(part.length))))
    except (FileCold, FileTruncated):
        return None
    return body if len(body) == part.length else None


def _unchanged(file: OpenFile) -> bool:
    """Whether nothing has happened to the inode: not to its contents, its rights, nor its names."""
    try:
        facts = os.fstat(file.fd)
    except OSError:  # ESTALE: who opens it anew finds out
        return False
    return facts.st_ctime_ns == file.ctime_ns and facts.st_size == file.size and facts.st_nlink > 0
