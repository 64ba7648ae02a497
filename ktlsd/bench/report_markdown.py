"""A result's tables for a document: Markdown, the same rows as everywhere."""

from ktlsd.bench import report, words
from ktlsd.bench.report import Group, Row
from ktlsd.bench.result import Result
from ktlsd.bench.stats import Verdict

_HEAD = ("what", "who encrypts", "MB/s", "of the first", "CPU s/GB", "calls/GB", "faults/GB")
_SAID = {Verdict.BETTER: "faster", Verdict.WORSE: "slower", Verdict.OPEN: "can't be told"}


def render(result: Result) -> str:
    """Return one line about the machine and a table for each load."""
    machine = result.machine
    where = ", ".join(filter(None, (machine.system, machine.virtual, machine.cpu)))
    lines = [f"{result.began[:10]}; {words.printable(where)}.", ""]
    for group in report.groups(result):
        lines += [*_table(group), ""]
    return "\n".join(lines)


def _table(group: Group) -> list[str]:
    title = f"**{group.title}**" + (f" ({group.common})" if group.common else "")
    rows = [_line(_HEAD), _line(["---", "---", *["---:"] * (len(_HEAD) - 2)])]
    return [title, "", *rows, *(_line(_cells(row)) for row in group.rows)]


def _cells(row: Row) -> list[str]:
    doubt = " ?" if row.speed and row.speed.unsteady else ""
    return [
        ("! " if row.trouble else "") + row.label,
        words.TLS[row.subject.tls],
        words.figure(row.speed.middle / 1e6 if row.speed else None) + doubt,
        "1" if row.ratio is None else f"{words.between(row.ratio)}, {_SAID[row.verdict]}",
        words.figure(row.cpu.middle if row.cpu else None),
        words.figure(row.calls),
        words.figure(row.faults),
    ]


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
