"""HTTP/1.1 on the wire (RFC 9112): a connection's bytes to requests, responses to segments.

The head of a request is read by hand: the rules are few, and here each has its own answer and status. What a lenient
parser lets through (bare LF, obs-fold, a space before the colon, two lengths) is how requests are smuggled past a proxy.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

from ktlsd.errors import RequestError
from ktlsd.protocol.bodies import BodyDrain
from ktlsd.protocol.http1_syntax import END, MAX_HEAD, MAX_REQUEST_LINE, understand, write_head
from ktlsd.protocol.messages import Ended, Refused, Request, Response
from ktlsd.slices import FileSlice, Segment

MAX_PIPELINED: Final = 4  # requests understood and not yet answered; more wait in the buffer
MAX_BUFFERED: Final = MAX_HEAD + 4  # bytes; above it no more input is wanted
MAX_DISCARDED: Final = 262_144  # bytes taken behind the last request and thrown away
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(slots=True)
class _Exchange:
    """One request's answer on its way out."""

    stream_id: int
    keep_alive: bool
    head_only: bool
    http10: bool
    response: Response | None = None
    head: bytes | memoryview = b""
    body_sent: int = 0
    continue_wanted: bool = False
    chunked: bool = False


class Http1Connection:
    """One connection's protocol state. Call `receive` with what came, `respond` to each request in any order,
    send from `next_output`, tell with `sent` how much was accepted.
    """

    def __init__(self, *, max_requests: int = 10_000) -> None:
        self._buffer = bytearray()
        self._searched = 0  # the buffer holds no end of head before this
        self._exchanges: deque[_Exchange] = deque()
        self._body: BodyDrain | None = None
        self._held: Request | None = None  # its body is still coming; its exchange is the last
        self._next_id = 1
        self._left = max_requests
        self._line = b""  # the last request line, for the log
        self._refused = False  # what comes now is thrown away
        self._discarded = 0  # bytes of it
        self._input_ended = False
        self._draining = 0  # 1: the next response says that it is the last; 2: and where nothing has been asked that was it
        self.closing = False  # the last response is out: close
        self._held_output = False
        self.progress = 0  # bytes that have gone out
        self.fault, self.leaving = None, False  # HTTP/1.1 tells in a response what is wrong, and that it will end

    # --- what the server wants to know -----------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a response is owed or on its way."""
        return len(self._exchanges) > (self._held is not None)

    @property
    def owes_work(self) -> bool:
        """Whether the next response waits for something of ours, not for the client."""
        exchange = self._exchanges[0] if self._exchanges else None
        return self.busy and exchange is not None and (exchange.response is None or self.working or self._held_output)

    @property
    def head_begun(self) -> bool:
        """Whether part of a request, or of its body, has come and the rest has not."""
        # A lone CR is half an empty line, which is nothing yet.
        return self._body is not None or (bool(self._buffer) and self._buffer != b"\r")

    @property
    def at_rest(self) -> bool:
        """Whether nothing is begun, owed or about to end: what comes next begins a request that isn't the last."""
        begun = self._exchanges or self._buffer or self._body
        return not (begun or self._refused or self._draining or self.closing) and self._left > 1

    @property
    def plain_end(self) -> bytes | None:
        """What a head ends with that answers all that came, if that is one request without a body; else None."""
        if len(self._exchanges) != 1 or self._buffer or self._body is not None:
            return None
        return _end_of_head(self._exchanges[0])

    def answered(self, count: int, *, last: bool = False) -> bool:
        """Account for a request that came while it was `at_rest`, and its answer of so many bytes; whether it still is.

        `last`: the client wanted it to be the last.
        """
        self._left -= 1
        self._next_id += 1
        self.progress += count
        self.closing = self._refused = last
        return self._left > 1 and not last

    @property
    def wants_input(self) -> bool:
        """Whether more input may be handed in; without it the peer has to wait (TCP's window fills).

        Behind the last request it is thrown away, but taken while its answer goes out: alerts and KeyUpdates come with it.
        """
        if self._refused:
            return self._discarded < MAX_DISCARDED and not self._input_ended
        return len(self._buffer) < MAX_BUFFERED and len(self._exchanges) < MAX_PIPELINED

    @property
    def body_bytes(self) -> int:
        """The length of the response body that is being sent, headers not counted."""
        exchange = self._exchanges[0] if self._exchanges else None
        return exchange.body_sent + exchange.response.body_bytes if exchange and exchange.response else 0

    # --- requests --------------------------------------------------------------------------------------------------

    def receive(self, data: bytes, now: float = 0.0) -> list[Request | Refused]:
        """Take input, return the requests that are whole. Call with b"" after responses went out: more may be waiting."""
        if self._refused:
            self._discarded += len(data)  # the connection ends with the response that is on its way
            return []
        self._buffer += data
        found: list[Request | Refused] = []
        while not self._refused:
            try:
                if self._body is not None and not self._drop_body():
                    break
                if self._held is not None:
                    found.append(self._held)
                    self._held, self._line = None, b""
                    continue
                if self._exchanges and not self._exchanges[-1].keep_alive:
                    self._take_no_more()  # what was pipelined behind it gets no answer (RFC 9112 §9.6)
                    break
                if len(self._exchanges) >= MAX_PIPELINED:
                    break
                head = self._take_head()
                if head is None:
                    break
                request = self._parse(head)
                if self._body is not None and not self._exchanges[-1].continue_wanted:
                    self._held = request  # a request is whole when its body is
                else:
                    found.append(request)
                    self._line = b""
            except RequestError as error:
                found += self._refuse(error)
        if self._draining > 1 and not self._exchanges and not self.head_begun and data:
            self.closing = True  # the rest of a body was all that was waited for
        return found

    def give_up(self, error: RequestError) -> list[Request | Refused]:
        """Refuse what has come of a request so far (408): answer what is returned; then the connection closes."""
        return self._refuse(error)

    def end_of_input(self) -> None:
        """The peer sends no more: answer what is whole, then close."""
        self._input_ended = True
        self._take_no_more()

    def _take_no_more(self) -> None:
        """Forget what has come of a request so far, and close behind the last response."""
        self._forget_input()
        self._close_when_done()

    def _forget_input(self) -> None:
        self._refused = True
        self._body = None
        self._buffer.clear()
        if self._held is not None:
            self._held = None
            self._exchanges.pop()

    def drain(self, *, one_more: bool = False) -> None:
        """Answer what has been asked, then close; with `one_more` the client is told with a response, and may ask for it."""
        self._draining = max(self._draining, 1 if one_more else 2)
        if self._draining > 1 and not self._exchanges and not self.head_begun:
            self.closing = True

    def _close_when_done(self) -> None:
        if self._exchanges:
            self._exchanges[-1].keep_alive = False
        else:
            self.closing = True

    def _take_head(self) -> bytes | None:
        """Cut the next request's head, without its empty line, out of the buffer; None if it isn't whole yet."""
        buffer = self._buffer
        while buffer.startswith(b"\r\n"):  # empty lines before a request are to be ignored (RFC 9112 §2.2)
            del buffer[:2]
            self._searched = 0
        end = buffer.find(b"\r\n\r\n", max(self._searched - 3, 0))
        if end < 0:
            self._searched = len(buffer)
            line_end = buffer.find(b"\r\n", 0, MAX_REQUEST_LINE + 2)
            if line_end < 0 and len(buffer) > MAX_REQUEST_LINE:
                raise RequestError(414, f"The request line is longer than {MAX_REQUEST_LINE} bytes.")
            if len(buffer) > MAX_HEAD:
                raise RequestError(431, f"The header is larger than {MAX_HEAD} bytes.")
            if buffer.find(b"\n\n") >= 0 or buffer.startswith(b"\n"):
                raise RequestError(400, "Lines must end in CR LF.")
            return None
        head = bytes(buffer[:end])
        del buffer[: end + 4]
        self._searched = 0
        return head

    def _parse(self, head: bytes) -> Request:
        self._line = head[:256].partition(b"\r\n")[0]
        understood = understand(head)
        method, target, host, headers, http10, persistent, expectation, values = understood
        body = BodyDrain.for_request(values, http10=http10) if values is not None else None
        self._left -= 1
        exchange = _Exchange(self._take_id(), persistent and self._left > 0, method == "HEAD", http10)
        if expectation is not None and not http10:
            if [value.lower() for value in expectation] != [b"100-continue"]:
                raise RequestError(417, "The only expectation met here is 100-continue.")
            exchange.continue_wanted = body is not None and not self._buffer
        self._body = body
        self._exchanges.append(exchange)
        return Request(method, target, host, headers, "HTTP/1.0" if http10 else "HTTP/1.1", exchange.stream_id)

    def _refuse(self, error: RequestError) -> list[Request | Refused]:
        """Answer with an error in its turn, and read no further: where the next request starts is not known any more."""
        line = self._line or bytes(self._buffer[:256]).partition(b"\r\n")[0]
        answered = self._body is not None and self._held is None
        self._forget_input()
        if answered:
            self._close_when_done()
            return []  # its answer is out or on its way (Expect): another one would be taken for the next request's
        exchange = _Exchange(self._take_id(), keep_alive=False, head_only=line.startswith(b"HEAD "), http10=False)
        self._exchanges.append(exchange)
        return [Refused(error, exchange.stream_id, line)]

    def _drop_body(self) -> bool:
        """Throw a request's body away; True once all of it has come. Raises RequestError if it is malformed or too long."""
        assert self._body is not None
        self._body.feed(self._buffer)
        if not self._body.done:
            return False
        self._body = None
        return True

    def _take_id(self) -> int:
        stream_id = self._next_id
        self._next_id += 1
        return stream_id

    # --- responses -------------------------------------------------------------------------------------------------

    def respond(self, stream_id: int, response: Response) -> None:
        """Queue the answer to a request; it goes out in the order the requests came in."""
        exchange = next(e for e in self._exchanges if e.stream_id == stream_id)
        if response.close_connection or (self._draining and exchange is self._exchanges[-1]):
            exchange.keep_alive = False
        exchange.response = response
        if exchange.continue_wanted and response.status >= 400:
            exchange.keep_alive = False  # the client may or may not send the body now: nobody could tell it from a request
        if response.stream is not None:
            exchange.chunked = not exchange.http10
            exchange.keep_alive = exchange.keep_alive and exchange.chunked
        exchange.head = _head(response, exchange)
        if exchange.head_only:
            response.close()

    def next_output(self, budget: int) -> list[Segment]:
        """Return the segments to send next, about `budget` bytes or one file slice; [] if there are none now."""
        out: list[Segment] = []
        if self._held_output:
            return out
        for exchange in self._exchanges:
            if exchange.response is None or budget <= 0 or self.closing:
                break
            if exchange.head:
                out.append(exchange.head)
                budget -= len(exchange.head)
            if exchange.response.stream is not None and not exchange.response.body:
                self._pull(exchange)
            for segment in exchange.response.body:
                out.append(segment)
                budget -= len(segment)
            if exchange.response.stream is not None or not exchange.keep_alive:
                break
        return out

    def _pull(self, exchange: _Exchange) -> None:
        """Take the next piece of a stream into the body, as a chunk (RFC 9112 §7.1) where the client knows chunks."""
        response = exchange.response
        assert response is not None
        assert response.stream is not None
        try:
            piece = next(response.stream)
        except StopIteration:
            response.stream.close()
            response.stream = None
            piece = b"0\r\n\r\n" if exchange.chunked else b""
        else:
            if piece and exchange.chunked:
                piece = b"%x\r\n%s\r\n" % (len(piece), piece)
        if piece:
            response.body.append(piece)

    @property
    def working(self) -> bool:
        """Whether `next_output` has nothing now, but would have after more work: call it again, others first."""
        exchange = self._exchanges[0] if self._exchanges else None
        if exchange is None or exchange.response is None or exchange.head:
            return False
        return exchange.response.stream is not None and not exchange.response.body

    def sent(self, count: int) -> list[Ended]:
        """Account for `count` bytes from the front of `next_output` that are gone; return the responses now complete."""
        completed = []
        self.progress += count
        while self._exchanges:
            exchange = self._exchanges[0]
            response = exchange.response
            if response is None:
                break
            gone = min(count, len(exchange.head))
            if gone:
                exchange.head = memoryview(exchange.head)[gone:]
                count -= gone
            while response.body and (count or not len(response.body[0])):
                segment = response.body[0]
                gone = min(count, len(segment))
                count -= gone
                exchange.body_sent += gone
                if gone == len(segment):
                    response.body.pop(0)
                    if isinstance(segment, FileSlice):
                        segment.close()
                elif isinstance(segment, FileSlice):
                    segment.advance(gone)
                else:
                    response.body[0] = memoryview(segment)[gone:]
            if exchange.head or response.body or response.stream is not None:
                break
            completed.append(self._finish(exchange, response))
        assert count == 0, "more bytes were sent than there were"
        return completed

    def _finish(self, exchange: _Exchange, response: Response) -> Ended:
        self._exchanges.popleft()
        if not exchange.keep_alive:
            self.closing = True
            self._refused = True
        elif self._draining > 1 and not self._exchanges:
            self.closing = True
        return Ended(exchange.stream_id, response.status, exchange.body_sent, complete=True)

    def abandon(self) -> list[Ended]:
        """Let go of all unfinished responses and return them."""
        left = []
        for exchange in self._exchanges:
            status = exchange.response.status if exchange.response else 0
            left.append(Ended(exchange.stream_id, status, exchange.body_sent, complete=False))
            if exchange.response is not None:
                exchange.response.close()
        self._exchanges.clear()
        return left

    def hold(self) -> int:
        """What stands first in the output has to be read first: send nothing until `release`; return its stream."""
        self._held_output = True
        return self._exchanges[0].stream_id

    def release(self, stream_id: int) -> None:
        """It has been read."""
        self._held_output = False

    def file_failed(self) -> bool:
        """A file can't be sent to its end: nobody could tell the response behind it from its rest."""
        return False


def _head(response: Response, exchange: _Exchange) -> bytes:
    """Return status line, fields and the empty line; an interim 100 in front if the client waits for it."""
    head = write_head(response, _end_of_head(exchange))
    return _CONTINUE + head if exchange.continue_wanted and response.status < 400 else head


def _end_of_head(exchange: _Exchange) -> bytes:
    chunked = b"Transfer-Encoding: chunked\r\n" if exchange.chunked else b""
    if not exchange.keep_alive:
        return chunked + END
    return chunked + b"Connection: keep-alive\r\n" if exchange.http10 else chunked
