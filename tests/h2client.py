"""An independent HTTP/2 client over TLS: h2's client side on a blocking socket, with windows and reads as small as wanted."""

from dataclasses import dataclass, field

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)
from h2.settings import SettingCodes

from tests.client import Client, context


@dataclass
class Stream:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False
    reset: int | None = None


def http2_context(version: str = "TLSv1.3", cipher: str = "AES-256-GCM"):
    made = context(version, cipher)
    made.set_alpn_protos([b"h2"])
    return made


class Http2Client(Client):
    """`ask` for things, `until` they are there."""

    def __init__(
        self, port: int, *, window: int = 65_535, connection_window: int = 65_535, frame: int = 16_384, auto: bool = True,
        version: str = "TLSv1.3", cipher: str = "AES-256-GCM", receive_buffer: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(port, ctx=http2_context(version, cipher), receive_buffer=receive_buffer)
        assert self.tls.ssl.get_alpn_proto_negotiated() == b"h2"
        self.http = H2Connection(H2Configuration(client_side=True, header_encoding="latin-1"))
        self.http.initiate_connection()
        self.http.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window, SettingCodes.MAX_FRAME_SIZE: frame})
        self.http.max_inbound_frame_size = frame
        if connection_window > 65_535:
            self.http.increment_flow_control_window(connection_window - 65_535)
        self.auto = auto  # windows are opened again as data comes
        self.streams: dict[int, Stream] = {}
        self.goaway: list[tuple[int, int]] = []  # (error code, last stream)
        self.said()

    def said(self) -> None:
        """Send what h2 has to say."""
        self.send(self.http.data_to_send())

    def ask(
        self, target: str, *, method: str = "GET", priority: str | None = None, host: str = "localhost", **fields: str
    ) -> int:
        stream_id = self.http.get_next_available_stream_id()
        lines = [(":method", method), (":scheme", "https"), (":authority", host), (":path", target)]
        lines += [(name.replace("_", "-"), value) for name, value in fields.items()]
        self.http.send_headers(stream_id, lines + ([("priority", priority)] if priority else []), end_stream=True)
        self.streams[stream_id] = Stream()
        self.said()
        return stream_id

    def read(self, most: int = 1 << 18) -> bool:
        """Receive once; False at TCP's end."""
        data = self.sock.recv(most)
        if not data:
            return False
        self.tls.receive(data)
        self.understand()
        return True

    def understand(self) -> None:
        plain, self.tls.plain = bytes(self.tls.plain), bytearray()
        for event in self.http.receive_data(plain):
            if isinstance(event, ConnectionTerminated):
                self.goaway.append((int(event.error_code), event.last_stream_id))
                continue
            stream = self.streams.get(getattr(event, "stream_id", 0))
            if isinstance(event, ResponseReceived):
                stream.headers = dict(event.headers)
                stream.status = int(stream.headers[":status"])
            elif isinstance(event, DataReceived):
                stream.body += event.data
                if self.auto and event.flow_controlled_length:
                    self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, StreamEnded):
                stream.ended = True
            elif isinstance(event, StreamReset):
                stream.reset = int(event.error_code)
        self.said()

    def finish(self, *stream_ids: int) -> list[Stream]:
        """Read until these streams have ended, one way or the other."""
        while any(not self.streams[s].ended and self.streams[s].reset is None for s in stream_ids):
            assert self.read(), "TCP ended"
        return [self.streams[s] for s in stream_ids]

    def fetch(self, target: str, **fields: str) -> Stream:
        return self.finish(self.ask(target, **fields))[0]
