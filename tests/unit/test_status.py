"""`ktlsd status`: what a metrics page becomes on a terminal, whoever wrote it."""

import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from ktlsd import status
from ktlsd.errors import StartError
from ktlsd.net.channel import HandoverPolicy
from ktlsd.net.handover import CIPHERS, VERSIONS, KernelFacts
from ktlsd.server.board import Board, State
from ktlsd.server.exposition import _Everything
from ktlsd.server.metrics import READ_BUCKETS, Memory, Report

NOW = 1_800_000_000.0
DAY = 86_400
BUILD = 'ktlsd_build_info{version="1",python="3",openssl="O",kernel="6"} 1\n'
WORKS = HandoverPolicy(KernelFacts(dict.fromkeys([(v, c) for v in VERSIONS for c in CIPHERS], "")))


def page(counters=None, *, policy=WORKS, certificates=None, workers=(State.SERVING,), reads=(), **report):
    """The page of a server that has counted this."""
    board = Board()
    supervisor = board.take(1)
    supervisor.state = State.LEAVING
    supervisor.publish(msgspec.json.encode(Report(0, dict(counters or {}), certificates=certificates or {})))
    for number, state in enumerate(workers):
        place = board.take(100 + number)
        place.state, place.connections = state, 3
        made = Report(**{"generation": 1, "reads": list(reads), "memory": Memory(40 << 20, 38 << 20)} | report)
        place.publish(msgspec.json.encode(made))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Everything(board, policy))
    text = generate_latest(registry).decode()
    board.close()
    return text


def told(text):
    """The lines by their labels, each section in one string."""
    sections, label = {}, "head"
    for line in status.report(status.parse(text), NOW):
        assert len(line) <= 80
        assert line.isprintable()
        if line.startswith("  "):
            label = line[2:15].strip() or label
            line = line[15:]
        sections[label] = f"{sections[label]} {line}" if label in sections else line
    return sections


# --- what is told ---------------------------------------------------------------------------------------------------------


def test_a_server_that_has_done_nothing_has_little_to_say():
    sections = told(page())
    assert sections.keys() == {"head", "workers", "encryption", "connections", "requests", "memory"}
    assert sections["head"].startswith("ktlsd ")
    assert sections["workers"] == "1 serving; generation 1"
    assert sections["encryption"] == "by the kernel: everything"
    assert sections["memory"] == "40.0 MiB worker 100, 2.0 MiB more than at its start"


def test_what_matters_most_comes_first():
    text = page(
        {"handshakes:full": 1, "body_bytes:kernel:h2": 9, "worker_deaths:SIGKILL": 1}, reads=[1], certificates={"c": NOW}
    )
    assert list(told(text)) == [
        *("head", "workers", "encryption", "connections", "requests", "bytes sent", "handshakes", "trouble"),
        *("page cache", "disk reads", "memory", "certificates"),
    ]


def test_workers_by_state():
    sections = told(page(workers=(State.SERVING, State.SERVING, State.STARTING)))
    assert sections["workers"] == "2 serving, 1 starting; generation 1"
    assert "NOBODY TAKES NEW CONNECTIONS" in told(page(workers=(State.LEAVING,)))["workers"]


def test_why_the_kernel_does_not_encrypt_and_what_to_do():
    refusals = dict.fromkeys([(v, c) for v in VERSIONS for c in CIPHERS], "")
    none = told(page(policy=HandoverPolicy(KernelFacts(dict.fromkeys(refusals, "TCP_ULP:ENOENT")), off="TCP_ULP:ENOENT")))
    assert none["encryption"].startswith("in userspace (TCP_ULP:ENOENT): everything The kernel has no TLS module loaded")
    assert none["encryption"].count("modprobe tls") == 1
    some = told(page(policy=HandoverPolicy(KernelFacts(refusals | {(VERSIONS[0], CIPHERS[2]): "TLS_TX:EINVAL"}))))
    assert "by the kernel: TLSv1.3 AES-128-GCM, AES-256-GCM; TLSv1.2" in some["encryption"]
    assert "in userspace (TLS_TX:EINVAL): TLSv1.3 CHACHA20-POLY1305" in some["encryption"]
    assert told(page(policy=HandoverPolicy(off="switched off")))["encryption"] == "in userspace (switched off): everything"


def test_shares():
    counters = {"body_bytes:kernel:h2": 3 << 30, "body_bytes:userspace:http/1.1": 1 << 30, "cold_bytes": 1 << 30}
    counters |= {"handshakes:full": 3, "handshakes:resumed": 1, "handovers": 1000, "handover_refusals:TLS_TX:EINVAL": 2}
    sections = told(page(counters | {"cold_reads": 7}))
    assert "4.0 GiB in responses that have ended: 75.0 % encrypted by the kernel, 25.0 % in userspace" in sections["bytes sent"]
    assert "1,000 connections went over to the kernel; 2 could not: 2 TLS_TX:EINVAL" in sections["bytes sent"]
    assert sections["handshakes"] == "3 full, 1 resumed (25.0 %)"
    assert sections["page cache"].startswith("75.0 % of the bytes were in memory; 1.0 GiB came from a disk")


def test_requests_by_their_answers():
    counters = {"requests": 9, "responses:200": 4, "responses:206": 1, "responses:404": 2, "responses:503": 1, "responses:0": 1}
    assert told(page(counters))["requests"] == "0 now, 9 since the start; answers: 1 without one, 5 2xx, 2 4xx, 1 5xx"


@pytest.mark.parametrize(
    ("counter", "line"),
    [
        ("worker_deaths:SIGKILL", "5 workers died and had to be replaced (the log says more): 5 SIGKILL"),
        ("worker_stalls", "5 workers of these killed because there was no sign of life"),
        ("reloads_refused", "5 reloads refused (the log says why, `ktlsd check FILE` too)"),
        ("turned_away:client", "5 times a client was turned away at a limit: 5 limits.connections_per_client"),
        ("accept_paused:descriptors", "5 times no new connections were taken for a while: 5 out of descriptors or memory"),
        ("log_lines_lost", "5 lines of the access log lost"),
        ("ended:Overdue", "5 connections ended by an error: 5 too slow or silent"),
        ("ended:Http2Error:ENHANCE_YOUR_CALM", "5 connections ended by an error: 5 Http2Error:ENHANCE_YOUR_CALM"),
        ("stream_ended:FileTruncated", "5 HTTP/2 streams ended by an error"),
        ("upgrades_refused", "5 upgrades refused"),
        ("responses_cut", "5 responses did not reach the end"),
    ],
)
def test_trouble_is_told_in_plain_words(counter, line):
    assert told(page({counter: 5}))["trouble"].startswith(line)


@pytest.mark.parametrize(
    ("ends", "line"),
    [
        (NOW + 200 * DAY, "200 days left, until 2027-08-03: /c.pem"),
        (NOW + 14.5 * DAY, "14 days left, until 2027-01-29: /c.pem"),
        (NOW + 13.5 * DAY, "13 days left, until 2027-01-28, RENEW IT: /c.pem"),
        (NOW + 1, "0 days left, until 2027-01-15, RENEW IT: /c.pem"),
        (NOW, "EXPIRED on 2027-01-15, renew it: /c.pem"),
        (NOW - 9 * DAY, "EXPIRED on 2027-01-06, renew it: /c.pem"),
        (1e17, "1,157,407,386,574 days left, until a day beyond the calendar: /c.pem"),
    ],
)
def test_certificates(ends, line):
    assert told(page(certificates={"/c.pem": ends}))["certificates"] == line


def test_the_next_certificate_to_end_comes_first():
    sections = told(page(certificates={f"/{days}": NOW + days * DAY for days in (300, 5, 100)}))
    assert (
        sections["certificates"].index("/5") < sections["certificates"].index("/100") < sections["certificates"].index("/300")
    )


def test_of_many_only_some_are_shown():
    sections = told(page(workers=[State.SERVING] * 500, certificates={f"/{n}": NOW + n for n in range(100)}))
    assert sections["memory"].endswith("and 495 workers; 19.5 GiB all together")
    assert sections["certificates"].endswith("and 95 more")
    counters = {f"ended:Reason{number}": 10 - number for number in range(9)}
    assert told(page(counters))["trouble"].endswith("5 Reason5, 9 others")


@pytest.mark.parametrize(
    ("reads", "line"),
    [
        ([0] * 7 + [100], "half took up to 75 ms, 99 of 100 up to 99.5 ms"),
        ([99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], "half took up to 0.253 ms, 99 of 100 up to 0.5 ms"),
        ([1] + [0] * 12 + [9], "half took up to more than is measured, 99 of 100 up to more than is measured"),
    ],
)
def test_how_long_reads_took(reads, line):
    assert len(reads) <= len(READ_BUCKETS) + 1
    assert told(page(reads=reads))["disk reads"] == line


def test_the_facts_for_scripts():
    facts = status.summarise(status.parse(page({"requests": 3, "turned_away:client": 2}, certificates={"c": NOW + DAY})), NOW)
    plain = msgspec.to_builtins(facts)
    assert plain["counts"]["requests"] == 3
    assert plain["reasons"]["turned_away"] == {"client": 2}
    assert plain["certificates"] == [{"file": "c", "ends": NOW + DAY, "days": 1.0}]
    assert plain["encryption"][0] == {
        "version": "TLSv1.3", "cipher": "AES-128-GCM", "kernel": True, "reason": None, "remedy": None
    }  # fmt: skip


# --- pages of others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "ok\n",
        "<!doctype html><title>It works</title>",
        "# HELP go_goroutines Number\n# TYPE go_goroutines gauge\ngo_goroutines 7\n",
        "ktlsd_requests_total 5\n",
        "ktlsd_build_info{",
        'ktlsd_build_info{version="1} 1',
        'ktlsd_build_info{ ="1"} 1',
        'ktlsd_build_info{version="1"} one',
        "# TYPE",
        "# TYPE x\n",
        BUILD + "x" * 9_000,
        BUILD + 'ktlsd_x{a="' + '\\"' * 400_000 + '"} 1',
    ],
)  # fmt: skip
def test_what_is_no_page_of_ours_is_refused_in_one_line(text):
    with pytest.raises(StartError) as refused:
        status.parse(text, "http://there/metrics")
    assert str(refused.value).startswith("http://there/metrics: not the metrics of a ktlsd: ")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 200


def test_a_page_of_ours_with_nothing_else_on_it_is_told():
    assert told(BUILD)["workers"] == "none NOBODY TAKES NEW CONNECTIONS: the log of ktlsd says why"


@pytest.mark.parametrize("character", ["\x1b[31m", "\x07", "\x9b31m", "\r", "\x00", "\u202e", "\u2028", "\ud7ff\x7f"])
def test_what_is_not_printable_does_not_reach_the_terminal(character):
    text = BUILD.replace('"O"', f'"O{character}"')
    for name, label in (
        ("workers", "state"), ("worker_resident_bytes", "worker"), ("certificate_expiry_seconds", "cert"),
        ("kernel_tls", "reason"), ("kernel_tls", "cipher"), ("worker_deaths_total", "status"),
        ("body_bytes_total", "mode"), ("responses_total", "code"), ("handshake_failures_total", "reason"),
    ):  # fmt: skip
        text += f'ktlsd_{name}{{{label}="a{character}b"}} 5\n'
    assert "a?" in told(text)["trouble"]  # told looks at every line
    facts = msgspec.json.encode(status.summarise(status.parse(text), NOW)).decode()
    assert facts.isprintable()


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "-5", "1e308", "9" * 400, "-" + "9" * 4000, "0x10", "1_000"])
def test_values_beyond_reason_are_told_or_refused(value):
    names = [line.rpartition(" ")[0] for line in page(certificates={"c": NOW}, reads=[1]).splitlines() if line[0] != "#"]
    text = "".join(f"{name} {value}\n" for name in names)
    try:
        assert told(text)
    except StartError:
        assert value in ("0x10", "1_000", "NaN")


def test_a_huge_page_is_told_on_one_screen_and_soon():
    """1 MiB, what `fetch` reads at most."""
    rows = ["kernel_tls{{version=\"{0}\",cipher=\"{0}\",reason=\"{0}\"}} 0", "workers{{state=\"{0}\"}} {0}"]  # fmt: skip
    rows += ["worker_generation{{worker=\"{0}\"}} {0}", "certificate_expiry_seconds{{cert=\"{0}\"}} {0}"]  # fmt: skip
    rows += ["connections_ended_total{{reason=\"{0}\"}} {0}", "read_ahead_seconds_bucket{{le=\"{0}\"}} {0}"]  # fmt: skip
    text = BUILD
    for number in range(3_000):
        text += "".join(f"ktlsd_{row.format(number)}\n" for row in rows)
    text += 'ktlsd_worker_deaths_total{status="' + "long " * 1_000 + '"} 5\n'
    text += 'ktlsd_handover_refusals_total{reason="' + "long" * 2_000 + '"} 5\n'
    begun = time.process_time()
    lines = status.report(status.parse(text), NOW)
    assert len(lines) < 150
    assert max(map(len, lines)) <= 80
    assert time.process_time() - begun < 20


LABELS = st.dictionaries(
    st.sampled_from(["le", "state", "reason", "cert", "worker", "mode", "code", "kind"]), st.text(max_size=9)
)
NAMES = [line.split()[2] for line in page(reads=[1]).splitlines() if line.startswith("# TYPE")] + [
    "ktlsd_read_ahead_seconds_bucket", "ktlsd_read_ahead_seconds_count",
]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(NAMES), LABELS, st.floats() | st.integers()), max_size=12))
def test_any_sample_is_told_or_refused(samples):
    text = BUILD
    for name, labels, value in samples:
        quoted = [v.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for v in labels.values()]
        selector = ",".join(f'{label}="{shown}"' for label, shown in zip(labels, quoted, strict=True))
        text += f"{name}{{{selector}}} {value!r}\n"
    told(text)


@given(st.text())
def test_any_text_is_told_or_refused(text):
    for each in (text, BUILD + text, BUILD + "ktlsd_x{" + text, BUILD + 'ktlsd_workers{state="' + text + '"} 1'):
        try:
            told(each)
        except StartError:
            continue
