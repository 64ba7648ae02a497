"""What Prometheus, probes and `ktlsd status` are told: /metrics, /healthz and /readyz, summed over all workers.

Any worker can answer: it reads the others' reports off the board, at most a second old. Counters of workers that have ended
are in the supervisor's report, so none ever goes back.
"""

import platform
import ssl
import time
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ktlsd import __version__
from ktlsd.errors import RequestError
from ktlsd.files import plan
from ktlsd.net import handover
from ktlsd.net.channel import HandoverPolicy
from ktlsd.protocol import semantics
from ktlsd.protocol.messages import Refused, Request, Response
from ktlsd.server.board import Board, State
from ktlsd.server.later import Later
from ktlsd.server.metrics import READ_BUCKETS, Report, read_report
from ktlsd.server.services import Answers

_FRESH: Final = 5.0  # seconds
# Counters: the name we count under -> (name, what it is, labels: the parts behind the colons).
_COUNTERS: Final[dict[str, tuple[str, str, tuple[str, ...]]]] = {
    "connections": ("connections", "Connections that were let in.", ()),
    "connections_http2": ("http2_connections", "Connections that speak HTTP/2.", ()),
    "handshakes": ("handshakes", "TLS handshakes that came to their end.", ("kind",)),
    "handshake_failures": ("handshake_failures", "TLS handshakes that failed.", ("reason",)),
    "handovers": ("handovers", "Connections whose keys went to the kernel.", ()),
    "handover_refusals": ("handover_refusals", "Connections that stayed in userspace, when they ended.", ("reason",)),
    "key_updates": ("key_updates", "KeyUpdate messages from clients.", ()),
    "requests": ("requests", "Requests.", ()),
    "responses": ("responses", "Responses that have ended; code 0 if none was begun.", ("code",)),
    "responses_cut": ("responses_cut", "Responses that ended before their end.", ()),
    "body_bytes": ("body_bytes", "Bytes of response bodies, by who encrypted.", ("mode", "protocol")),
    "cold_bytes": ("cold_bytes", "Bytes that had to be read from a disk before they could be sent.", ()),
    "cold_reads": ("cold_reads", "Times a download had to wait for a disk.", ()),
    "mapping_hits": ("mapping_hits", "Pieces of HTTP/2 downloads sent from mapped pages.", ()),
    "mapping_misses": ("mapping_misses", "Pieces of HTTP/2 downloads that were not mapped.", ()),
    "closed_idle": ("closed_idle", "Connections closed because nothing was asked any more.", ()),
    "closed_by_client": ("closed_by_client", "Connections that clients left between requests.", ()),
    "ended": ("connections_ended", "Connections that ended because of an error.", ("reason",)),
    "stream_ended": ("streams_ended", "HTTP/2 streams that ended because of an error, the connection going on.", ("reason",)),
    "turned_away": ("turned_away", "Connections and requests that went beyond a limit.", ("limit",)),
    "accept_paused": ("accept_paused", "Times no new connections were accepted for a while.", ("reason",)),
    "log_lines_lost": ("log_lines_lost", "Lines of the access log that could not be written.", ()),
    "worker_deaths": ("worker_deaths", "Workers that ended unasked, and were replaced.", ("status",)),
    "worker_stalls": ("worker_stalls", "Workers killed because they showed no sign of life.", ()),
    "reloads": ("reloads", "Configurations taken over.", ()),
    "reloads_refused": ("reloads_refused", "Configurations that were no good.", ()),
    "certificates_renewed": ("certificates_renewed", "Certificates taken over without a reload.", ()),
    "upgrades": ("upgrades", "Times another version of the program took over.", ()),
    "upgrades_refused": ("upgrades_refused", "Times another version would not start.", ()),
}
# Counters with labels that are there from the start: what begins with its first value has not increased, for Prometheus.
_FROM_ZERO: Final = (
    *("handshakes:full", "handshakes:resumed"),
    *(f"body_bytes:{mode}:{protocol}" for mode in ("kernel", "userspace") for protocol in ("h2", "http/1.1")),
    *("turned_away:client", "turned_away:subnet", "turned_away:handshakes", "turned_away:responses"),
    *("accept_paused:connections", "accept_paused:descriptors"),
    *("worker_deaths:SIGKILL", "worker_deaths:SIGSEGV", "worker_deaths:status 1"),
)


class MetricsPage(Answers):
    """Answers requests at the metrics listener."""

    def __init__(self, board: Board, policy: HandoverPolicy) -> None:
        self._board = board
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Everything(board, policy))

    def respond(self, request: Request | Refused, now: float) -> Response | Later:
        """Return the page that was asked for."""
        if isinstance(request, Refused):
            return self.refuse(request, request.error)
        path = request.target.partition(b"?")[0]
        if request.method not in ("GET", "HEAD"):
            return self.refuse(request, RequestError(405, "There is only GET here."))
        if path == b"/metrics":
            return _page(200, CONTENT_TYPE_LATEST, generate_latest(self._registry))
        if path in (b"/healthz", b"/readyz"):
            return self._probe(ready=path == b"/readyz")
        return self.refuse(request, RequestError(404, "There are /metrics, /healthz and /readyz."))

    def _probe(self, *, ready: bool) -> Response:
        """Healthy: somebody lives, which the answer shows. Ready: somebody takes new connections."""
        fresh = time.monotonic() - _FRESH
        serving = any(p.state is State.SERVING and p.last_beat > fresh for p in self._board.places())
        if ready and not serving:
            return _page(503, "text/plain; charset=utf-8", b"no worker takes connections\n")
        return _page(200, "text/plain; charset=utf-8", b"ok\n")

    def refuse(self, request: Request | Refused, error: RequestError) -> Response:
        """Return the response that says why there is no other."""
        asked = request if isinstance(request, Request) else None
        response = plan.plan_error(error.status, error.detail, asked)
        response.headers.insert(0, (b"Date", semantics.http_date(int(time.time()))))
        return response


def _page(status: int, content_type: str, body: bytes) -> Response:
    headers = [
        (b"Date", semantics.http_date(int(time.time()))),
        (b"Content-Type", content_type.encode()),
        (b"Cache-Control", b"no-store"),
    ]
    return Response(status, headers, [body], content_length=len(body))


class _Everything(Collector):
    """All metrics, made anew for every scrape."""

    def __init__(self, board: Board, policy: HandoverPolicy) -> None:
        self._board = board
        self._policy = policy

    def collect(self) -> Iterable[Metric]:
        reports: dict[int, tuple[int, State, int, Report]] = {}
        for places in self._board.settled():
            reports = {}
            for place in places:
                report = read_report(place.report())
                if report is not None:
                    reports[place.number] = place.pid, place.state, place.connections, report
        yield from _counters([report for *_, report in reports.values()])
        yield from _reads([report for *_, report in reports.values()])
        yield from _gauges(list(reports.values()))
        yield from self._facts()

    def _facts(self) -> Iterator[Metric]:
        facts = GaugeMetricFamily(
            "ktlsd_build_info", "What runs, in its labels; always 1.", labels=["version", "python", "openssl", "kernel"]
        )
        facts.add_metric([__version__, platform.python_version(), ssl.OPENSSL_VERSION, platform.release()], 1)
        yield facts
        taken = GaugeMetricFamily(
            "ktlsd_kernel_tls", "Whether the kernel encrypts, by version and cipher.", labels=["version", "cipher", "reason"]
        )
        for combination in product(handover.VERSIONS, handover.CIPHERS):
            version, cipher = handover.combination_name(combination).split(" ", 1)
            reason = self._policy.facts.refusals.get(combination, "") or self._policy.off  # switched off, it was not asked
            taken.add_metric([version, cipher, reason], not reason)
        yield taken


def _counters(reports: list[Report]) -> Iterator[Metric]:
    totals = dict.fromkeys((*(name for name, (_, _, labels) in _COUNTERS.items() if not labels), *_FROM_ZERO), 0)
    for report in reports:
        for name, value in report.counters.items():
            totals[name] = totals.get(name, 0) + value
    families = {
        name: CounterMetricFamily(f"ktlsd_{shown}", about, labels=labels) for name, (shown, about, labels) in _COUNTERS.items()
    }
    for name, value in sorted(totals.items()):
        base, _, reasons = name.partition(":")
        if base in families:
            labels = _COUNTERS[base][2]
            parts = reasons.split(":", len(labels) - 1) if labels else []
            families[base].add_metric([*parts, *[""] * (len(labels) - len(parts))], value)
    yield from families.values()


def _reads(reports: list[Report]) -> Iterator[Metric]:
    """How long reading ahead took, as a histogram: each bucket has all that took no longer."""
    counts = [0] * (len(READ_BUCKETS) + 1)
    for report in reports:
        for number, count in enumerate(report.reads[: len(counts)]):
            counts[number] += count
    below, buckets = 0, []
    for bound, count in zip([*map(str, READ_BUCKETS), "+Inf"], counts, strict=True):
        below += count
        buckets.append((bound, below))
    reads = HistogramMetricFamily("ktlsd_read_ahead_seconds", "How long reads from a disk took that downloads waited for.")
    reads.add_metric([], buckets, sum(report.read_seconds for report in reports))
    yield reads


def _gauges(places: list[tuple[int, State, int, Report]]) -> Iterator[Metric]:
    workers = [place for place in places if place[3].generation]
    by_worker = {
        name: GaugeMetricFamily(f"ktlsd_{name}", about, labels=["worker"])
        for name, about in (
            ("worker_resident_bytes", "Memory that a worker occupies, mapped files included."),
            ("worker_resident_growth_bytes", "How much more memory a worker occupies than when it started."),
            ("worker_generation", "Which configuration a worker serves."),
        )
    }
    faults = CounterMetricFamily("ktlsd_worker_page_faults", "Page faults of a worker.", labels=["worker", "kind"])
    for pid, _, _, report in workers:
        memory, label = report.memory, [str(pid)]
        by_worker["worker_resident_bytes"].add_metric(label, memory.resident)
        by_worker["worker_resident_growth_bytes"].add_metric(label, memory.resident - memory.resident_at_start)
        by_worker["worker_generation"].add_metric(label, report.generation)
        faults.add_metric([*label, "minor"], memory.minor_faults)
        faults.add_metric([*label, "major"], memory.major_faults)
    yield from (*by_worker.values(), faults)
    states = GaugeMetricFamily("ktlsd_workers", "Workers, by what they do.", labels=["state"])
    # A worker that starts has no report yet; the supervisor never has a generation.
    there = [place for place in places if place[3].generation or place[1] is State.STARTING]
    for state in (State.STARTING, State.SERVING, State.LEAVING):
        states.add_metric([state.name.lower()], sum(place[1] is state for place in there))
    yield states
    yield GaugeMetricFamily(
        "ktlsd_connections_open",
        "Connections there are now, those at the metrics listener included.",
        sum(place[2] for place in places),
    )
    answering = sum(report.answering for *_, report in places)
    yield GaugeMetricFamily("ktlsd_requests_in_progress", "Requests being answered now.", answering)
    started = max((report.started for *_, report in places), default=0.0)
    yield GaugeMetricFamily("ktlsd_start_time_seconds", "When ktlsd was started, since the epoch.", started)
    ends = GaugeMetricFamily("ktlsd_certificate_expiry_seconds", "When a certificate ends, since the epoch.", labels=["cert"])
    for *_, report in places:
        for cert, moment in report.certificates.items():
            ends.add_metric([cert], moment)
    yield ends
