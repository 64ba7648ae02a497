"""A load client that doesn't bottleneck.

One transfer of each kind is taken whole, decrypted and compared (`verify`). In measured ones (`Volley`) the ciphertext is
thrown away in the kernel: recv with MSG_TRUNC copies nothing, needs no keys and lets go of the interpreter. What is left to
check there is how much came: not less than any encryption of the answer could have, as counted in the verified transfer of
the same request on an equal connection, and not much more.

Small files can't be measured like that: a new connection for each would measure handshakes, and behind one another on a
connection nobody knows without decrypting where one answer ends. So `Loop` decrypts and compares, as curl would. That costs
this process about as much as it costs the server: with few connections the rate is the pair's, and CPU seconds per request
say more about the server than requests per second.
"""

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ktlsd.bench import answers
from ktlsd.bench.answers import Http2Counter, WrongAnswer
from ktlsd.bench.connection import Ask, Connection, Wire

_HEAD_MAX: Final = 16_384  # bytes
SMALL: Final = 65_536  # bytes; files up to here are asked for again and again on a connection that stays


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a measurement: seconds from the first request to the last byte, bytes of payload, responses."""

    seconds: float
    bytes: int
    transfers: int


def verify(ask: Ask) -> Wire:
    """Do one transfer whole and compare it. Raises WrongAnswer, NotMeasurable."""
    with contextlib.closing(Connection(ask)) as connection:
        return connection.verify()


class Volley:
    """Downloads on connections that are open already: handshakes are neither timed nor in the server's CPU seconds.

    One slot for each of `asks`, all at the same time; in each slot `each` downloads one after the other, every one on a
    connection of its own. A context manager.
    """

    def __init__(self, asks: Sequence[Ask], wire: Wire, each: int) -> None:
        """Open the connections. Raises NotMeasurable."""
        self._wire = wire
        self._slots: list[list[Connection]] = [[] for _ in asks]
        try:
            for _ in range(each):
                for ask, slot in zip(asks, self._slots, strict=True):
                    connection = Connection(ask)
                    slot.append(connection)
                    if (connection.version, connection.cipher) != (wire.version, wire.cipher):
                        raise WrongAnswer(f"it agrees on {connection.cipher} now and on {wire.cipher} before")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Volley":
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self._slots:
            for connection in slot:
                connection.close()

    def run(self) -> Outcome:
        """Ask, and take all answers. Raises WrongAnswer."""
        first = self._slots[0][0].ask_for
        spans: list[float] = []  # seconds of each slot
        errors: list[BaseException] = []

        def take(slot: list[Connection]) -> None:
            end = idle = 0.0
            try:
                for connection in slot:
                    connection.ask()
                    last, waited = connection.discard(self._wire)
                    connection.close()
                    end, idle = last + waited, idle + waited
                spans.append(end - begin - idle)
            except BaseException as exc:
                errors.append(exc)

        threads = [threading.Thread(target=take, args=(slot,)) for slot in self._slots[1:]]
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        take(self._slots[0])
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        count = sum(map(len, self._slots)) * first.streams
        return Outcome(max(spans), count * first.payload.size, count)


class Loop:
    """The same small file again and again on connections that stay; every answer is decrypted, over HTTP/1.1 compared too.

    On each connection there is one request (with HTTP/2 `streams`) at any time: whoever has been answered asks again, so that
    the server has something to do while we decrypt.
    """

    def __init__(self, asks: Sequence[Ask], wire: Wire) -> None:
        """Open the connections. Raises NotMeasurable."""
        self._connections: list[Connection] = []
        self._content = asks[0].payload.path.read_bytes()
        self._end = b"\r\n\r\n" + self._content
        self._first = asks[0]
        self._stream = 1  # the next one on every connection
        try:
            for ask in asks:
                self._connections.append(Connection(ask))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()

    def run(self, seconds: float, most: int = 1 << 30) -> Outcome:
        """Ask for so long, at most so many times on each connection. Raises WrongAnswer."""
        first, connections, done = self._first, self._connections, 0
        take = self._http2 if first.kind == "h2" else self._http1
        begin = now = time.monotonic()
        request = self._request()
        for connection in connections:
            connection.send(request)
        while True:
            done += 1
            last = now - begin >= seconds or done >= most
            request = b"" if last else self._request()
            for connection in connections:
                take(connection)
                if request:
                    connection.send(request)
            now = time.monotonic()
            if last:
                break
        count = done * len(connections) * first.streams
        return Outcome(now - begin, count * first.payload.size, count)

    def _request(self) -> bytes:
        first = self._first
        if first.kind != "h2":
            return answers.http1_request(first.payload.name, closes=False)
        self._stream += 2 * first.streams
        return answers.http2_requests(first.payload.name, first.streams, self._stream - 2 * first.streams)

    def _http1(self, connection: Connection) -> None:
        content = self._content
        answer = connection.read()
        while not answer.endswith(content):
            if len(answer) > len(content) + _HEAD_MAX or b"\r\n\r\n" in answer[: -len(content)]:
                break
            more = connection.read()
            if not more:
                raise WrongAnswer(f"it hangs up after {len(answer)} bytes of an answer")
            answer += more
        if answer[:12] != b"HTTP/1.1 200" or answer[-len(content) - 4 :] != self._end:
            raise WrongAnswer(f"it answers something else: {answer[:40]!r}, {len(answer)} bytes with the header")

    def _http2(self, connection: Connection) -> None:
        counter = Http2Counter(self._first.payload.size, self._first.streams)
        while True:
            plain = connection.read()
            if not plain:
                raise WrongAnswer(f"it hangs up after {counter.body} bytes of {self._first.streams} answers")
            if counter.feed(plain):
                return
