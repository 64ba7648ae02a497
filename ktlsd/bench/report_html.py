"""A result as one page: no script, nothing to fetch, for light, dark and paper; every sample at its end."""

from importlib import resources
from typing import Final

import jinja2
from markupsafe import Markup

from ktlsd.bench import charts, copies, report, report_text, svg, verdicts, words
from ktlsd.bench.report import Row
from ktlsd.bench.result import Result, Sample
from ktlsd.bench.stats import Verdict

_TEMPLATE: Final = "report.html"


def render(result: Result) -> str:
    """Return the page."""
    source = resources.files("ktlsd.bench").joinpath(_TEMPLATE).read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    found = report.groups(result)
    return environment.from_string(source).render(
        result=result,
        findings=verdicts.findings(result),
        cautions=verdicts.cautions(result),
        conditions=[
            {
                "title": words.condition(together[0].load),
                "chart": charts.against_size(together),
                "groups": [
                    {
                        "title": group.title,
                        "common": group.common,
                        "charts": [(chart, svg.bars(chart)) for chart in (charts.throughput(group), charts.cpu(group))],
                        "rows": [_cells(row) for row in group.rows],
                    }
                    for group in together
                ],
            }
            for together in report.conditions(found)
        ],
        legend=f"{report.LEGEND} {report.intervals(found)}",
        copies=copies.told(row.subject for group in found for row in group.rows),
        facts=report_text.machine_facts(result.machine),
        programs=list(dict.fromkeys(s.subject.program for s in result.samples if s.subject.program)),
        samples=result.samples,
        failed=report.FAILED,
        colours=charts.COLOURS,
        dark=charts.COLOURS_DARK,
        lines=_lines,
        load=words.load,
        tls=words.TLS,
        sample=_sample,
    )


def _lines(chart: charts.LineChart) -> Markup:
    return svg.lines(chart)


def _cells(row: Row) -> dict[str, str]:
    """Return a row of a group's table, as text."""
    shown = words.figure
    ratio = "1, the first" if row.speed else words.NOTHING
    if row.ratio:
        outcome = "can't be told" if row.verdict is Verdict.OPEN else words.SPEED[row.verdict]
        ratio = f"{words.between(row.ratio)}, {outcome}"
    known = copies.of(row.subject)
    return {
        "label": row.label,
        "tls": words.TLS[row.subject.tls],
        "verdict": row.verdict.name.lower() if row.ratio else "",
        "speed": (shown(row.speed.middle / 1e6) if row.speed else words.NOTHING)
        + (", unsteady" if row.speed and row.speed.unsteady else ""),
        "rounds": str(row.ratio.count if row.ratio else len(row.samples)),
        "rate": shown(row.rate.middle if row.rate else None),
        "ratio": ratio,
        "user": shown(row.user),
        "system": shown(row.system),
        "calls": shown(row.calls),
        "switches": shown(row.switches),
        "faults": shown(row.faults),
        "copies": known.copies + (" + enc." if known.encryptions else "") if known else words.NOTHING,
        "peak": shown(None if row.peak is None else row.peak / 1e6),
        "trouble": row.trouble,
    }


def _sample(sample: Sample) -> list[str]:
    """Return a line of the table of all samples, as text: what was measured, not rounded."""
    subject = sample.subject
    names = [subject.name, *(part for part in (subject.protocol, subject.version, subject.cipher) if part and part != "raw")]
    kernel = {True: "yes", False: "no", None: "not known"}[sample.in_kernel]
    return [
        words.load(sample.load), " ".join(names), words.TLS[subject.tls], str(sample.round), f"{sample.seconds:g}",
        str(sample.bytes), str(sample.transfers), f"{sample.user:g}", f"{sample.system:g}", str(sample.switches),
        str(sample.minor_faults), str(sample.major_faults), str(sample.peak),
        words.NOTHING if sample.calls is None else str(sample.calls), kernel,
    ]  # fmt: skip
