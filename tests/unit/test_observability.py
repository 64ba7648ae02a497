"""docs/metrics.md, the dashboard and the alerts name what the code exposes: every metric, every label."""

import json
import re
from pathlib import Path

import msgspec
import pytest

from ktlsd.net.channel import HandoverPolicy
from ktlsd.net.handover import CIPHERS, VERSIONS, KernelFacts
from ktlsd.server import exposition
from ktlsd.server.board import Board, State
from ktlsd.server.metrics import READ_BUCKETS, Memory, Report

DOCS = Path(__file__).parents[2] / "docs"
TARGET = {"job", "instance"}  # what Prometheus adds itself
FOREIGN = {"up": set()}  # Prometheus' own metrics
# Of the samples of a family.
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}


def exposed(policy=None, reports=(), states=()):
    """Everything on the page: samples by family."""
    board = Board()
    board.take(1).state = State.LEAVING  # the supervisor's
    for number, report in enumerate(reports):
        place = board.take(100 + number)
        place.state = states[number] if states else State.SERVING
        if report is not None:
            place.publish(msgspec.json.encode(report))
    families = list(exposition._Everything(board, policy or HandoverPolicy(off="switched off")).collect())
    board.close()
    return families


def seeded():
    """A report in which every counter has a sample."""
    counters = {name + "".join(f":{label}" for label in labels): 1 for name, (_, _, labels) in exposition._COUNTERS.items()}
    return Report(1, counters, [1] * (len(READ_BUCKETS) + 1), 1.0, Memory(9, 8, 7, 6), 1, {"/cert.pem": 1.0})


FAMILIES = exposed(reports=[seeded()])
# Every name a query may have, and its labels.
NAMES = {
    family.name + suffix: {name for sample in family.samples for name in sample.labels}
    for family in FAMILIES
    for suffix in SUFFIXES[family.type]
}


def value(families, sample_name, **labels):
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == sample_name and labels.items() <= sample.labels.items()
    )


# --- the page -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_are_as_prometheus_wants_them(family):
    assert re.fullmatch(r"ktlsd_[a-z][a-z0-9_]*", family.name)
    assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))
    assert family.documentation.endswith(".")
    assert not family.documentation.startswith("Of these"), "it is read alone"
    assert family.samples
    labels = [frozenset(sample.labels.items()) for sample in family.samples if sample.name == family.samples[0].name]
    assert len(labels) == len(set(labels)), "each series is there once"


def test_every_counter_is_reported_with_its_labels():
    for base, (shown, _, labels) in exposition._COUNTERS.items():
        assert value(FAMILIES, f"ktlsd_{shown}_total", **{label: label for label in labels}) == 1, base


def test_an_error_may_occur_for_the_first_time():
    """A counter that begins with 1 has not increased, for Prometheus: what alerts are about is there from the start."""
    there = {sample.name for family in exposed() for sample in family.samples}
    for name in ("worker_deaths", "accept_paused", "turned_away", "reloads_refused", "log_lines_lost", "body_bytes"):
        assert f"ktlsd_{name}_total" in there


def test_counts_are_summed_over_the_workers():
    families = exposed(reports=[seeded(), seeded()])
    assert value(families, "ktlsd_requests_total") == 2
    assert value(families, "ktlsd_read_ahead_seconds_count") == 2 * (len(READ_BUCKETS) + 1)
    assert value(families, "ktlsd_read_ahead_seconds_bucket", le="0.001") == 4
    assert value(families, "ktlsd_requests_in_progress") == 2


def test_a_worker_that_starts_is_counted_before_its_first_report():
    families = exposed(reports=[None, Report(1)], states=[State.STARTING, State.SERVING])
    states = {state: value(families, "ktlsd_workers", state=state) for state in ("starting", "serving", "leaving")}
    assert states == {"starting": 1, "serving": 1, "leaving": 0}, "the supervisor is no worker"


def test_it_is_told_for_every_combination_why_the_kernel_does_not_encrypt():
    everything = len(VERSIONS) * len(CIPHERS)
    off = exposed(HandoverPolicy(off="switched off"))
    assert value(off, "ktlsd_kernel_tls") == 0
    assert len([s for f in off for s in f.samples if s.labels.get("reason") == "switched off"]) == everything
    refusals = {(version, cipher): "" for version in VERSIONS for cipher in CIPHERS}
    refusals[VERSIONS[0], CIPHERS[0]] = "TLS_TX:EINVAL"
    some = exposed(HandoverPolicy(KernelFacts(refusals)))
    assert value(some, "ktlsd_kernel_tls", reason="") == everything - 1
    assert [s.value for f in some for s in f.samples if s.labels.get("reason") == "TLS_TX:EINVAL"] == [0]


# --- what is built on it --------------------------------------------------------------------------------------------------


def check_query(query):
    """Names and labels of a PromQL expression exist."""
    used = set()
    for name, selector in re.findall(r"\b(ktlsd_\w+|up)\b(?:\{(.*?)\})?", re.sub(r"label_values\((.*), \w+\)", r"\1", query)):
        labels = {**NAMES, **FOREIGN}.get(name)
        assert labels is not None, f"{name} is not exposed: {query}"
        asked = set(re.findall(r"(\w+) ?(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', selector)))
        assert asked <= labels | TARGET, f"{name} has no {asked - labels - TARGET}: {query}"
        used.add(name)
    assert used, f"asks for nothing: {query}"
    known = TARGET.union(*({**NAMES, **FOREIGN}[name] for name in used))
    for _, listed in re.findall(r"\b(by|on|without|ignoring) ?\(([^)]*)\)", query):
        grouped = {label.strip() for label in listed.split(",")}
        assert grouped <= known, f"nothing there has {grouped - known}: {query}"
    assert query.count("(") == query.count(")"), query
    return used, known


def dashboard():
    return json.loads((DOCS / "grafana-dashboard.json").read_text())


def test_the_dashboard_asks_for_what_is_there():
    seen = set()
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            used, known = check_query(target["expr"])
            seen |= used
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known
    families = {f.name for f in FAMILIES if not any(f.name + suffix in seen for suffix in SUFFIXES[f.type])}
    assert not families, "these can't be seen on the dashboard"


def test_the_dashboard_can_be_imported():
    board = dashboard()
    assert board["schemaVersion"] >= 38, "Grafana 10"
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert variables["DS_PROMETHEUS"]["type"] == "datasource"
    for name in ("job", "instance"):
        check_query(variables[name]["query"]["query"])
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    titles = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert titles == ["Traffic", "TLS", "Files and cache", "Limits and errors", "Processes"]
    cells = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not own & cells, f"{panel['title']} lies on another one"
        assert place["x"] + place["w"] <= 24
        cells |= own
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"]
        assert {each["datasource"]["uid"] for each in (panel, *panel["targets"])} == {"${DS_PROMETHEUS}"}
        assert all("$job" in each["expr"] and "$instance" in each["expr"] for each in panel["targets"])


def alerts():
    """Each rule's lines. The file is YAML of a simple kind: a rule begins with "- alert:", an expr is one line in quotes."""
    _, *rules = re.split(r"^      - alert: ", (DOCS / "alerts.yml").read_text(), flags=re.MULTILINE)
    return {rule.partition("\n")[0]: rule for rule in rules}


@pytest.mark.parametrize("name", alerts())
def test_alerts_ask_for_what_is_there_and_say_what_to_do(name):
    rule = alerts()[name]
    assert re.fullmatch(r"Ktlsd\w+", name)
    (query,) = re.findall(r"^        expr: '([^'\n]*)'$", rule, re.MULTILINE)
    _, known = check_query(query)
    assert set(re.findall(r"\$labels\.(\w+)", rule)) <= known
    grouped = [set(re.split(", ?", labels)) for labels in re.findall(r"\bby \(([^)]*)\)", query)]
    assert all(group >= TARGET for group in grouped), "each is about one server"
    assert re.search(r"^        labels: \{severity: (page|ticket)\}$", rule, re.MULTILINE)
    assert re.search(r'^          summary: ".{20,}"$', rule, re.MULTILINE)
    description = rule.partition("description: >-\n")[2].partition("\n\n")[0]
    assert len(description.split()) > 15, "it says what to do"
    assert all(line.startswith("            ") for line in description.splitlines())
    assert max(map(len, description.splitlines())) <= 140


def test_alerts_are_about_all_that_matters():
    text = "".join(alerts().values())
    for name in (
        *("workers", "worker_deaths_total", "reloads_refused_total", "certificate_expiry_seconds", "body_bytes_total"),
        *("accept_paused_total", "turned_away_total", "log_lines_lost_total", "read_ahead_seconds_bucket"),
        "worker_resident_growth_bytes",
    ):
        assert f"ktlsd_{name}" in text


# --- docs/metrics.md ------------------------------------------------------------------------------------------------------


def test_every_metric_is_documented_with_its_labels():
    text = (DOCS / "metrics.md").read_text()
    rows = re.findall(r"^\| `(ktlsd_\w+)` \| (.*?) \| ?(.*?) \|$", text.replace("| |", "|  |"), re.MULTILINE)
    documented = {name: (set(re.findall(r"`(\w+)`", labels)), meaning) for name, labels, meaning in rows}
    assert len(documented) == len(rows), "each is there once"
    shown = {family.name + ("_total" if family.type == "counter" else ""): family for family in FAMILIES}
    assert documented.keys() == shown.keys()
    for name, family in shown.items():
        labels, meaning = documented[name]
        assert labels == {label for sample in family.samples for label in sample.labels} - {"le"}, name
        assert meaning.startswith(family.documentation), f"{name}: {family.documentation}"


def test_values_of_labels_are_documented():
    text = (DOCS / "metrics.md").read_text()
    for name in exposition._FROM_ZERO:
        for part in name.split(":")[1:]:
            assert f"`{part}`" in text or part == "status 1" or part == "SIGSEGV", part
