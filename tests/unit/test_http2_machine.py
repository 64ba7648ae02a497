"""An independent client (h2's own client side) against our server side, in any order of events: every body bit-exact.

Windows are tiny, reads are tiny, streams are reset at any moment, settings change in between.
"""

import os
import tempfile

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, ResponseReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes, Settings
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ktlsd.net.gather import gather
from ktlsd.protocol.http2 import Http2Connection
from ktlsd.protocol.messages import Response
from ktlsd.slices import FileSlice, OpenFile

SIZE = 300_000
CONTENT = os.urandom(SIZE)
_FILE = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the module
_FILE.write(CONTENT)
_FILE.flush()
PRIORITIES = st.sampled_from([None, "u=0", "u=7, i", "i", "u=3"])


class Machine(RuleBasedStateMachine):
    @initialize(window=st.sampled_from([0, 1, 100, 65_535, 1 << 20]), frame=st.sampled_from([16_384, 40_000, 1 << 20]))
    def begin(self, window, frame):
        self.file = OpenFile(_FILE.fileno(), SIZE, 0, close_fd=lambda _: None)
        self.file.residency.asks = False  # whatever the page cache does meanwhile
        self.client = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        # Said with the first SETTINGS and acknowledged here: h2 takes that for the acknowledgement of the next change.
        values = {SettingCodes.INITIAL_WINDOW_SIZE: window, SettingCodes.MAX_FRAME_SIZE: frame}
        self.client.local_settings = Settings(client=True, initial_values=values)
        self.client.initiate_connection()
        self.client.max_inbound_frame_size = frame  # h2 notices the acknowledgement one call too late
        self.server = Http2Connection()
        self.scratch = memoryview(bytearray(70_000))
        self.next_id = 1
        self.expected = {}
        self.bodies = {}
        self.done = set()
        self.reset = set()
        self.on_the_way = b""
        self.now = 0.0
        self.to_server()
        self.serve(70_000, 4)
        self.read(1 << 20)

    # --- the two sides -------------------------------------------------------------------------------------------------

    def to_server(self):
        self.now += 0.02
        for request in self.server.receive(self.client.data_to_send(), self.now):
            self.server.respond(request.stream_id, self.response(request.target.decode()))
        self.server.sent(0)

    def response(self, target):
        parts = []
        length = 0
        for spec in target.strip("/").split(","):
            kind, offset, count = spec.split("-")
            offset, count = int(offset), int(count)
            length += count
            parts.append(CONTENT[offset : offset + count] if kind == "b" else FileSlice(self.file, offset, count))
        return Response(200, [(b"X", b"y")], parts, length)

    def to_client(self, data):
        for event in self.client.receive_data(data):
            if isinstance(event, DataReceived):
                self.bodies[event.stream_id] += event.data
            elif isinstance(event, StreamEnded):
                self.done.add(event.stream_id)
            elif isinstance(event, StreamReset):
                if event.error_code == 0 and event.stream_id in self.done:
                    continue  # the request's content is not wanted any more
                raise AssertionError(f"stream {event.stream_id} was reset: {event.error_code}")
            elif isinstance(event, ConnectionTerminated):
                raise AssertionError(f"the connection ended: {event}")
            else:
                assert not isinstance(event, ResponseReceived) or (b":status", b"200") in event.headers

    # --- what may happen ---------------------------------------------------------------------------------------------

    @rule(
        parts=st.lists(
            st.tuples(st.sampled_from("bf"), st.integers(0, SIZE - 1), st.integers(0, 60_000)), min_size=1, max_size=3
        ),
        priority=PRIORITIES,
        whole=st.booleans(),
    )
    def ask(self, parts, priority, whole):
        if len(self.expected) - len(self.done) - len(self.reset) >= 50:
            return
        parts = [(kind, offset, min(count, SIZE - offset)) for kind, offset, count in parts]
        stream_id, self.next_id = self.next_id, self.next_id + 2
        target = "/" + ",".join(f"{kind}-{offset}-{count}" for kind, offset, count in parts)
        fields = [(":method", "GET"), (":scheme", "https"), (":path", target), (":authority", "localhost")]
        self.client.send_headers(stream_id, fields + ([("priority", priority)] if priority else []), end_stream=whole)
        self.expected[stream_id] = b"".join(CONTENT[offset : offset + count] for _, offset, count in parts)
        self.bodies[stream_id] = b""
        self.to_server()

    @rule(take=st.sampled_from([1, 7, 9, 10, 100, 5_000, 16_393, 70_000]), times=st.integers(1, 4))
    def serve(self, take, times):
        """The channel accepts some of what is there; some of that reaches the client."""
        for _ in range(times):
            segments = self.server.next_output(1 << 20)
            if not segments:
                return
            data = bytes(gather(segments, self.scratch[:take]))
            self.server.sent(len(data))
            self.on_the_way += data

    @rule(read=st.sampled_from([1, 8, 9, 500, 20_000, 1 << 20]))
    def read(self, read):
        data, self.on_the_way = self.on_the_way[:read], self.on_the_way[read:]
        self.to_client(data)
        self.to_server()

    @rule(pick=st.integers(0, 50), increment=st.sampled_from([1, 10, 1_000, 70_000]))
    def widen(self, pick, increment):
        open_streams = [s for s in self.expected if s not in self.done and s not in self.reset]
        self.client.increment_flow_control_window(increment)
        if open_streams:
            self.client.increment_flow_control_window(increment, open_streams[pick % len(open_streams)])
        self.to_server()

    @rule(window=st.sampled_from([0, 1, 1_000, 100_000]))
    def change_settings(self, window):
        self.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.to_server()

    @rule(pick=st.integers(0, 50))
    def give_up(self, pick):
        open_streams = [s for s in self.expected if s not in self.done and s not in self.reset]
        if open_streams and len(self.reset) < 20:
            stream_id = open_streams[pick % len(open_streams)]
            self.client.reset_stream(stream_id)
            self.reset.add(stream_id)
            self.to_server()

    @rule()
    def ping(self):
        self.client.ping(b"12345678")
        self.to_server()

    @invariant()
    def bodies_are_what_was_asked_for(self):
        if not hasattr(self, "expected"):
            return
        for stream_id, body in self.bodies.items():
            assert self.expected[stream_id].startswith(body)
            assert stream_id not in self.done or body == self.expected[stream_id]
        assert self.server.fault is None

    def teardown(self):
        if not hasattr(self, "expected"):
            return
        for _ in range(10_000):
            open_streams = [s for s in self.expected if s not in self.done and s not in self.reset]
            if not open_streams and not self.server.busy:
                break
            for stream_id in open_streams:
                if self.client.remote_flow_control_window(stream_id) < 70_000:
                    self.client.increment_flow_control_window(70_000)
                    self.client.increment_flow_control_window(70_000, stream_id)
            self.to_server()
            self.serve(70_000, 4)
            self.read(1 << 20)
        assert not open_streams, "not everything came"
        assert self.file.holders == 1, "a file was not let go of"


Machine.TestCase.settings = settings(
    max_examples=int(os.environ.get("KTLSD_TEST_HTTP2", "60")),
    stateful_step_count=60,
    deadline=None,
    report_multiple_bugs=False,
)
TestHttp2 = Machine.TestCase
