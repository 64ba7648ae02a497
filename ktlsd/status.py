"""`ktlsd status`: what a running server's metrics say, for a person.

`parse`, `summarise` and `report` take any page, a hostile one too: nothing that can't be printed gets past `parse`. Only
`fetch` goes to the network.
"""

import math
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPException
from itertools import pairwise
from textwrap import wrap
from typing import Final
from urllib.error import URLError

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from ktlsd.errors import StartError
from ktlsd.files.listing import human_size
from ktlsd.net import handover

_TIMEOUT: Final = 5.0  # seconds
_MAX: Final = 1 << 20  # bytes of a page; 512 workers make some 200,000
_LINE_MAX: Final = 8_192  # characters; the parser's time grows with a line's square
_VALUE_MAX: Final = float(1 << 62)
_COLUMNS: Final = 80
_INDENT: Final = 15
_SHOWN: Final = 6  # of what there may be many
_GLUE: Final = "\xa0"  # between a number and what it counts; shown as a space
_DAY: Final = 86_400
_SOON: Final = 14  # days
_BOUND: Final = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?|\+Inf", re.ASCII)

Families = Mapping[str, list[tuple[dict[str, str], float]]]  # by name of the sample: labels and value


class Combination(msgspec.Struct, frozen=True):
    """Whether the kernel encrypts one version and cipher, and if not, why and what to do."""

    version: str
    cipher: str
    kernel: bool
    reason: str | None
    remedy: str | None


class Memory(msgspec.Struct, frozen=True):
    """What a worker occupies. Bytes."""

    worker: str
    resident: int
    growth: int  # since it started


class Certificate(msgspec.Struct, frozen=True):
    """When one ends: seconds since the epoch, and days from now (negative: expired)."""

    file: str
    ends: float
    days: float


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A page's facts. Counts begin with the server; dictionaries have what is not zero, the most first."""

    version: str
    kernel: str
    openssl: str
    python: str
    workers: dict[str, int]  # now, by state
    generations: dict[str, int]  # workers, by the configuration they serve
    encryption: list[Combination]
    connections_open: int  # now
    requests_in_progress: int  # now
    counts: dict[str, int]  # every counter, summed over its labels; names without ktlsd_ and _total
    reasons: dict[str, dict[str, int]]  # counters that have a reason, a kind, a code..., by it
    page_cache_hits: float | None  # part of the bytes sent for which no disk was read
    reads: int  # from a disk, ahead of downloads
    read_median: float | None  # seconds; None if there were no reads, or beyond the last bucket
    read_p99: float | None
    memory: list[Memory]  # the largest first
    certificates: list[Certificate]  # the next to end first


# --- getting the page -----------------------------------------------------------------------------------------------------


def fetch(url: str) -> str:
    """Return what is at `url`, which is http. No proxy is asked, no redirect followed. Raises StartError."""
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.HTTPHandler())
    until = time.monotonic() + _TIMEOUT
    page = b""
    try:
        with opener.open(url, timeout=_TIMEOUT) as response:
            while response.status == 200 and len(page) <= _MAX and (piece := response.read1(_MAX)):
                page += piece
                if time.monotonic() > until:
                    raise TimeoutError
    except (OSError, HTTPException, ValueError) as exc:
        cause = exc.reason if isinstance(exc, URLError) else exc
        if not isinstance(cause, OSError):
            raise foreign(url, "it speaks no HTTP") from exc
        why = cause.strerror or "no answer in time"
        raise StartError(f"{url}: {why}; start ktlsd with that as metrics.listen, or say by --url where it is") from exc
    if response.status != 200:
        raise foreign(url, f"it answers with status {response.status}")
    if len(page) > _MAX:
        raise foreign(url, f"it is longer than {human_size(_MAX)}")
    if response.length:
        raise foreign(url, "it breaks off")
    return page.decode("utf-8", "replace")


def foreign(where: str, why: str) -> StartError:
    """Return the error about a page that is not ktlsd's."""
    return StartError(f"{where}: not the metrics of a ktlsd: {why}; give the address that is its metrics.listen")


# --- reading it -----------------------------------------------------------------------------------------------------------


def parse(text: str, where: str = "this page") -> Families:
    """Read a page in Prometheus' text format. Raises StartError, naming `where`, if it isn't one, or not one of ktlsd.

    Label values have "?" for what can't be printed (control characters, changes of direction); values that are no number
    are left out, the others are made to fit 63 bits.
    """
    if any(len(line) > _LINE_MAX for line in text.split("\n")):
        raise foreign(where, f"a line has more than {_LINE_MAX:,} characters")
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    try:
        for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
            if sample.name.startswith("ktlsd_") and sample.value == sample.value:  # NaN is not
                labels = {name: "".join(c if c.isprintable() else "?" for c in shown) for name, shown in sample.labels.items()}
                value = float(max(-_VALUE_MAX, min(sample.value, _VALUE_MAX)))
                found.setdefault(sample.name, []).append((labels, value))
    except (ValueError, IndexError, KeyError) as exc:  # the parser's; its messages quote the page
        raise foreign(where, "it is not in Prometheus' format") from exc
    if "ktlsd_build_info" not in found:
        raise foreign(where, "there is no ktlsd_build_info in it")
    return found


# Counters that are told apart by a label.
_REASONS: Final = {
    "handshakes": "kind", "handshake_failures": "reason", "handover_refusals": "reason", "responses": "code",
    "body_bytes": "mode", "connections_ended": "reason", "streams_ended": "reason", "turned_away": "limit",
    "accept_paused": "reason", "worker_deaths": "status",
}  # fmt: skip


def summarise(families: Families, now: float) -> Status:
    """Return what the page says. `now` is seconds since the epoch."""
    build = families["ktlsd_build_info"][0][0]
    counters = [name for name in families if name.endswith("_total")]
    counts = {name.removeprefix("ktlsd_").removesuffix("_total"): _sum(families, name) for name in counters}
    cold, sent = counts.get("cold_bytes", 0), counts.get("body_bytes", 0)
    return Status(
        **{name: build.get(name, "?") for name in ("version", "kernel", "openssl", "python")},
        workers=_by(families, "ktlsd_workers", "state"),
        generations=dict(Counter(str(int(value)) for _, value in families.get("ktlsd_worker_generation", ()))),
        encryption=_combinations(families),
        connections_open=_sum(families, "ktlsd_connections_open"),
        requests_in_progress=_sum(families, "ktlsd_requests_in_progress"),
        counts=counts,
        reasons={name: _by(families, f"ktlsd_{name}_total", label) for name, label in _REASONS.items()},
        page_cache_hits=max(0.0, 1 - cold / sent) if sent > 0 else None,
        reads=_sum(families, "ktlsd_read_ahead_seconds_count"),
        read_median=_quantile(0.5, families),
        read_p99=_quantile(0.99, families),
        memory=_memory(families),
        certificates=_certificates(families, now),
    )


def _sum(families: Families, name: str) -> int:
    return max(0, int(sum(value for _, value in families.get(name, ()))))


def _by(families: Families, name: str, label: str) -> dict[str, int]:
    """Return the sums by a label's values, the greatest first, without those that are nothing."""
    sums: dict[str, float] = {}
    for labels, value in families.get(name, ()):
        key = labels.get(label, "?")
        sums[key] = sums.get(key, 0.0) + value
    return {key: int(value) for key, value in sorted(sums.items(), key=lambda item: (-item[1], item[0])) if value >= 1}


def _combinations(families: Families) -> list[Combination]:
    found = []
    for labels, value in families.get("ktlsd_kernel_tls", ()):
        version, cipher, why = (labels.get(name, "") for name in ("version", "cipher", "reason"))
        found.append(Combination(version, cipher, value == 1, why or None, handover.remedy(why) or None))
    return found


def _memory(families: Families) -> list[Memory]:
    growth = {labels.get("worker"): int(value) for labels, value in families.get("ktlsd_worker_resident_growth_bytes", ())}
    found = [(labels.get("worker", "?"), int(value)) for labels, value in families.get("ktlsd_worker_resident_bytes", ())]
    return [Memory(worker, size, growth.get(worker, 0)) for worker, size in sorted(found, key=lambda each: (-each[1], each[0]))]


def _certificates(families: Families, now: float) -> list[Certificate]:
    found = [(ends, labels.get("cert", "?")) for labels, ends in families.get("ktlsd_certificate_expiry_seconds", ())]
    return [Certificate(file, ends, (ends - now) / _DAY) for ends, file in sorted(found)]


def _quantile(part: float, families: Families) -> float | None:
    """Return what `part` of the reads did not take longer than, as Prometheus reckons it: straight within a bucket."""
    rows = families.get("ktlsd_read_ahead_seconds_bucket", ())
    bounds = sorted((float(labels["le"]), count) for labels, count in rows if _BOUND.fullmatch(labels.get("le", "")))
    rank = part * bounds[-1][1] if bounds else 0.0
    for (lower, below), (upper, count) in pairwise([(0.0, 0.0), *bounds]):
        if 0 < rank <= count:
            inside = upper != math.inf and count > below
            return lower + (upper - lower) * (rank - below) / (count - below) if inside else None
    return None


# --- telling it -----------------------------------------------------------------------------------------------------------


def report(families: Families, now: float) -> list[str]:
    """Return the lines for a terminal of 80 columns, what matters most first; `now` is seconds since the epoch.

    What there is nothing to say about is left out.
    """
    status = summarise(families, now)
    lines = _wrapped(f"ktlsd {status.version} on Linux {status.kernel}, Python {status.python}, {status.openssl}", _COLUMNS)
    for label, paragraphs in _sections(status):
        wrapped = [line for text in _limited(list(paragraphs), 2 * _SHOWN) for line in _wrapped(text, _COLUMNS - _INDENT)]
        lines += [f"  {'' if number else label:<{_INDENT - 3}} {line}" for number, line in enumerate(wrapped)]
    return lines


def _wrapped(text: str, columns: int) -> list[str]:
    lines = wrap(text, columns, max_lines=_SHOWN, placeholder=" ...", break_on_hyphens=False)
    return [line.replace(_GLUE, " ") for line in lines]


def _sections(status: Status) -> Iterator[tuple[str, Iterable[str]]]:
    counts = status.counts
    yield "workers", _workers(status)
    yield "encryption", _encryption(status.encryption)
    http2 = f", {counts['http2_connections']:,} of them with HTTP/2" if counts.get("http2_connections") else ""
    yield (
        "connections",
        [f"{status.connections_open:,} now with this one, {counts.get('connections', 0):,} since the start{http2}"],
    )
    yield "requests", [f"{status.requests_in_progress:,} now, {counts.get('requests', 0):,} since the start{_answers(status)}"]
    yield "bytes sent", _sent(status)
    yield "handshakes", _handshakes(status)
    yield "trouble", _trouble(status)
    if status.page_cache_hits is not None:
        cold = counts.get("cold_bytes", 0)
        waits = (
            f"; {human_size(cold)} came from a disk, downloads waited {_count(counts.get('cold_reads', 0), 'time')}"
            if cold
            else ""
        )
        yield "page cache", [f"{_percent(status.page_cache_hits)} of the bytes were in memory{waits}"]
    if status.reads:
        yield "disk reads", [f"half took up to {_time(status.read_median)}, 99 of 100 up to {_time(status.read_p99)}"]
    yield "memory", _memory_lines(status.memory)
    yield "certificates", _limited([_certificate_line(each) for each in status.certificates], _SHOWN)


def _workers(status: Status) -> Iterator[str]:
    states = [f"{count:,} {state}" for state, count in status.workers.items()]
    several = len(status.generations) > 1
    serve = [f"{number} ({_count(count, 'worker')})" if several else number for number, count in status.generations.items()]
    yield ", ".join(states[:_SHOWN] or ["none"]) + (f"; generation{'s' * several} {', '.join(serve[:_SHOWN])}" if serve else "")
    if not status.workers.get("serving"):
        yield "NOBODY TAKES NEW CONNECTIONS: the log of ktlsd says why"


def _encryption(combinations: list[Combination]) -> Iterator[str]:
    groups: dict[str, list[Combination]] = {}
    for each in sorted(combinations, key=lambda each: not each.kernel):
        how = "by the kernel" if each.kernel else f"in userspace ({each.reason or 'nobody knows why'})"
        groups.setdefault(how, []).append(each)
    for how, group in groups.items():
        names: dict[str, list[str]] = {}
        for each in group:
            names.setdefault(each.version, []).append(each.cipher)
        listed = "; ".join(f"{version} {', '.join(ciphers)}" for version, ciphers in names.items())
        yield f"{how}: {'everything' if len(groups) == 1 else listed}"
    yield from dict.fromkeys(each.remedy for each in combinations if each.remedy)


def _answers(status: Status) -> str:
    kinds: dict[str, int] = {}
    for code, count in sorted(status.reasons["responses"].items()):
        kind = "without one" if code == "0" else f"{code[:1]}xx"
        kinds[kind] = kinds.get(kind, 0) + count
    return f"; answers: {_listed(kinds)}" if kinds else ""


def _sent(status: Status) -> Iterator[str]:
    modes = status.reasons["body_bytes"]
    total = sum(modes.values())
    if total:
        parts = [f"{_percent(count / total)} {_WORDS.get(mode, mode)}" for mode, count in modes.items()]
        yield f"{human_size(total)} in responses that have ended: {', '.join(parts[:_SHOWN])}"
    refused, over = status.reasons["handover_refusals"], status.counts.get("handovers", 0)
    if over or refused:
        why = f"; {sum(refused.values()):,} could not: {_listed(refused)}" if refused else ""
        yield f"{_count(over, 'connection')} went over to the kernel{why}"


def _handshakes(status: Status) -> Iterator[str]:
    full, resumed = (status.reasons["handshakes"].get(kind, 0) for kind in ("full", "resumed"))
    if full or resumed:
        yield f"{full:,} full, {resumed:,} resumed ({_percent(resumed / (full + resumed))})"
    if failed := status.reasons["handshake_failures"]:
        yield f"{sum(failed.values()):,} failed: {_listed(failed)}"


# What can go wrong, the worst first: counter, what of, and what happened or is to be done.
_TROUBLE: Final = (
    ("worker_deaths", "worker", "died and had to be replaced (the log says more)"),
    ("worker_stalls", "worker", "of these killed because there was no sign of life"),
    ("reloads_refused", "reload", "refused (the log says why, `ktlsd check FILE` too)"),
    ("upgrades_refused", "upgrade", "refused (the log says why)"),
    ("accept_paused", "time", "no new connections were taken for a while"),
    ("turned_away", "time", "a client was turned away at a limit"),
    ("log_lines_lost", "line", "of the access log lost (disk full? reader stuck?)"),
    ("responses_cut", "response", "did not reach the end"),
    ("connections_ended", "connection", "ended by an error"),
    ("streams_ended", "HTTP/2 stream", "ended by an error, the connection went on"),
)
# Labels in plain words: class names of ktlsd/errors.py, and what is counted in ktlsd/server.
_WORDS: Final = {
    "kernel": "encrypted by the kernel", "userspace": "in userspace", "plain": "in the clear",
    "Overdue": "too slow or silent", "PeerTruncated": "left without a goodbye", "PeerAlert": "sent an alert",
    "HandshakeFailed": "no TLS came about", "PlainHttp": "spoke plain HTTP", "RecordError": "sent a broken record",
    "UnexpectedMessage": "sent what is not allowed", "FileTruncated": "a file became shorter or unreadable",
    "shut": "cut by us", "bug": "a bug of ours", "ProxyHeaderError": "no good PROXY header",
    "client": "limits.connections_per_client", "subnet": "limits.connections_per_subnet",
    "handshakes": "limits.handshakes", "responses": "limits.responses", "connections": "limits.connections",
    "descriptors": "out of descriptors or memory (raise LimitNOFILE)",
}  # fmt: skip


def _trouble(status: Status) -> Iterator[str]:
    for name, what, happened in _TROUBLE:
        if count := status.counts.get(name, 0):
            reasons = status.reasons.get(name)
            yield f"{_count(count, what)} {happened}{f': {_listed(reasons)}' if reasons else ''}"


def _memory_lines(memory: list[Memory]) -> list[str]:
    shown = [f"{human_size(each.resident)} worker {each.worker}{_growth(each.growth)}" for each in memory]
    return _limited(shown, _SHOWN, f"workers; {human_size(sum(each.resident for each in memory))} all together")


def _growth(growth: int) -> str:
    return f", {human_size(abs(growth))} {'more' if growth > 0 else 'less'} than at its start" if growth else ""


def _certificate_line(certificate: Certificate) -> str:
    try:
        date = time.strftime("%Y-%m-%d", time.gmtime(certificate.ends))
    except (ValueError, OverflowError, OSError):
        date = "a day beyond the calendar"
    if certificate.days <= 0:
        return f"EXPIRED on {date}, renew it: {certificate.file}"
    renew = ", RENEW IT" if certificate.days < _SOON else ""
    return f"{_count(int(certificate.days), 'day')} left, until {date}{renew}: {certificate.file}"


def _limited(lines: list[str], most: int, more: str = "more") -> list[str]:
    return lines if len(lines) <= most else [*lines[: most - 1], f"and {len(lines) - most + 1:,} {more}"]


def _listed(counts: Mapping[str, int]) -> str:
    parts = [f"{count:,}{_GLUE}{_WORDS.get(name, name)}" for name, count in list(counts.items())[:_SHOWN]]
    others = sum(list(counts.values())[_SHOWN:])
    return ", ".join([*parts, f"{others:,} others"] if others else parts)


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _percent(part: float) -> str:
    return f"{100 * part:.1f}{_GLUE}%"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "more than is measured"
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
