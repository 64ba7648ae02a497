"""Fuzzing the HTTP/1.1 parser: any bytes, in any pieces, give requests or a refusal; never another exception, never
much memory.

KTLSD_TEST_FUZZ sets how many examples are tried; 20,000 were run by hand.
"""

import os

from hypothesis import example, given, settings
from hypothesis import strategies as st

from ktlsd.protocol.bodies import MAX_BODY
from ktlsd.protocol.http1 import MAX_BUFFERED, MAX_PIPELINED, Http1Connection
from ktlsd.protocol.messages import Refused, Request, Response
from tests.corpus.requests import CORPUS

EXAMPLES = int(os.environ.get("KTLSD_TEST_FUZZ", "400"))
_WORDS = [
    b"GET ", b"HEAD ", b"POST ", b"/", b"/a%20b?c", b"*", b"http://x/", b" HTTP/1.1", b" HTTP/1.0", b"\r\n",
    b"\r\n\r\n", b"\n", b"\r", b"Host: x\r\n", b"Content-Length: ", b"5", b"0", b"99999",
    b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n",
    b"Connection: keep-alive\r\n", b"0\r\n\r\n", b"5\r\nabcde\r\n", b";ext", b": ", b" ", b"\t", b"\x00", b"\xff",
]  # fmt: skip
_streams = st.one_of(
    st.binary(max_size=300),
    st.lists(st.sampled_from(_WORDS), max_size=40).map(b"".join),
    st.lists(st.sampled_from(sorted(CORPUS.values())), min_size=1, max_size=6).map(b"".join),
    st.tuples(st.sampled_from(_WORDS), st.integers(1, 9000)).map(lambda pair: pair[0] * pair[1]),
)


@settings(max_examples=EXAMPLES)
@given(_streams, st.lists(st.integers(1, 5000), max_size=8), st.booleans(), st.data())
@example(b"GET / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nzzzzz", [60], False, None)
def test_any_bytes_in_any_pieces(stream, cuts, early_end, data):
    connection = Http1Connection()
    answered = 0
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(stream[at : at + cut])
        at += cut
    pieces.append(stream[at:])
    for piece in pieces:
        found = connection.receive(piece)
        for request in found:
            assert isinstance(request, Request | Refused)
            assert isinstance(request, Request) or 400 <= request.error.status < 600
            connection.respond(request.stream_id, Response(200, [], [b"body"], 4))
            answered += 1
        assert len(connection._buffer) <= MAX_BUFFERED + max(map(len, pieces)) + MAX_BODY
        assert len(connection._exchanges) <= MAX_PIPELINED + 1
        while segments := connection.next_output(1 << 20):
            whole = sum(map(len, segments))
            count = data.draw(st.integers(1, whole)) if data else whole
            connection.sent(count)
    if early_end:
        connection.end_of_input()
        assert connection.closing or connection.busy
    connection.abandon()
