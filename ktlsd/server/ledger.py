"""What has been asked on one connection and what became of it: for the access log and the counters."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ktlsd.net.plain import Mode, PlainChannel
from ktlsd.protocol.messages import Ended, Refused, Request
from ktlsd.server.accesslog import AccessLog, Entry, TlsFacts, timestamp
from ktlsd.server.metrics import Metrics

_SIGNATURE: Final = re.compile(rb"([?&]signature=)[^&]*")  # who reads the log shall not be able to fetch what it guards


@dataclass(slots=True)
class _Pending:
    """A request that is being answered."""

    request: Request | Refused
    started: float  # monotonic seconds


class Ledger:
    """Requests by stream; an entry in the log when their response has ended."""

    __slots__ = ("_access_log", "_client", "_counter", "_logs", "_metrics", "_mode", "_pending")

    def __init__(self, access_log: AccessLog, metrics: Metrics, client: str) -> None:
        self._access_log = access_log
        self._metrics = metrics
        self._client = client
        self._pending: dict[int, _Pending] = {}
        self._logs = access_log.enabled
        self._mode: Mode | None = None
        self._counter = ""

    def open(self, request: Request | Refused, now: float) -> None:
        """A request has come, in the turn of the loop that began at `now`."""
        self._pending[request.stream_id] = _Pending(request, now)
        self._metrics.count("requests")
        self._metrics.answering += 1

    def request(self, stream_id: int) -> Request | Refused | None:
        """Return the request a stream began with; None once its response has ended."""
        pending = self._pending.get(stream_id)
        return pending.request if pending is not None else None

    def close(self, ended: Sequence[Ended], channel: PlainChannel) -> None:
        """Responses have ended, on this channel."""
        for each in ended:
            pending = self._pending.pop(each.stream_id, None)
            if pending is None:
                continue
            self._metrics.answering -= 1
            self._metrics.count(f"responses:{each.status}")
            self._metrics.count(self._bytes_name(channel), each.body_bytes)
            if not each.complete:
                self._metrics.count("responses_cut")
            if self._logs:
                self._log(pending, each, channel)
        if not self._pending:
            self._pending = {}  # an emptied one keeps its room

    def answered(self, request: Request, body_bytes: int, channel: PlainChannel, now: float) -> None:
        """A request came in the turn that began at `now` and was answered at once, with 200 and all of its body."""
        counters = self._metrics.counters
        counters["requests"] += 1
        counters["responses:200"] += 1
        counters[self._counter if channel.mode is self._mode else self._bytes_name(channel)] += body_bytes
        if self._logs:
            ended = Ended(request.stream_id, 200, body_bytes, complete=True)
            self._log(_Pending(request, now), ended, channel)

    def cut(self, request: Request, channel: PlainChannel, now: float) -> None:
        """As `answered`, but the connection was lost before that was sent; how much of it went is not known."""
        self.open(request, now)
        self.close([Ended(request.stream_id, 200, 0, complete=False)], channel)

    def _bytes_name(self, channel: PlainChannel) -> str:
        """Return the counter of body bytes; it is made once for each mode."""
        if self._mode is not channel.mode:
            self._mode = channel.mode
            self._counter = f"body_bytes:{channel.mode.value}:{channel.facts.alpn or 'http/1.1'}"
        return self._counter

    def _log(self, pending: _Pending, ended: Ended, channel: PlainChannel) -> None:
        kernel = channel.mode is Mode.KERNEL
        why = None if kernel else channel.why_userspace or "no response of handover_bytes yet"
        facts = channel.facts
        tls = TlsFacts(facts.version_name, facts.cipher_name, facts.resumed, channel.mode.value, why)
        what = {"status": ended.status, "bytes": ended.body_bytes, "complete": ended.complete}
        timing = {"time": timestamp(time.time()), "duration": round(time.monotonic() - pending.started, 6)}
        entry = Entry(**_request_facts(pending.request), **what, **timing, tls=tls, client=self._client)  # type: ignore[arg-type]
        self._access_log.add(entry)


def _request_facts(request: Request | Refused) -> dict[str, str | None]:
    """What the log says of the request itself; latin-1 keeps every byte apart."""
    facts: dict[str, str | None] = {"protocol": "", "host": "", "range": None, "referer": None, "user_agent": None}
    if isinstance(request, Refused):
        method, _, rest = request.request_line.decode("latin-1").partition(" ")
        return facts | {"method": method, "target": rest.partition(" ")[0]}
    for key, name in (("range", b"range"), ("referer", b"referer"), ("user_agent", b"user-agent")):
        value = request.header(name)
        facts[key] = value.decode("latin-1") if value is not None else None
    target, host = _SIGNATURE.sub(b"\\1-", request.target).decode("latin-1"), request.host.decode("latin-1")
    return facts | {"method": request.method, "target": target, "protocol": request.version, "host": host}
