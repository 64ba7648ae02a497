"""A result for a terminal: plain text of 80 columns or more, the verdict at the end, where the eye is when it is done."""

from collections.abc import Iterable, Sequence
from itertools import chain
from textwrap import wrap
from typing import Final

import msgspec

from ktlsd.bench import copies, report, stats, verdicts, words
from ktlsd.bench.report import Group, Row
from ktlsd.bench.result import Load, Machine, Result, Sample, Subject
from ktlsd.bench.stats import Verdict

_NARROWEST: Final = 80
_WIDE: Final = 104  # from here on there is room for more columns and longer words
_MARKS: Final = {Verdict.BETTER: ">", Verdict.WORSE: "<", Verdict.OPEN: "~"}
_MARKS_LEGEND: Final = (
    "> faster than the first row, < slower, ~ no difference can be told; ? so unsteady that the figure means little; "
    "! not encrypted by whom it says (see below)."
)
_APART: Final = (
    "Measured at different times, so nothing that slowed the machine down cancels: b/a is the ratio of two medians, and its "
    "interval takes the extremes of both. Ratios of such runs prove little on a noisy machine unless the intervals are far "
    "apart; ~ is where they are not apart. > is more throughput or less CPU time, < the other way round."
)

Cells = Sequence[str]


def render(result: Result, width: int = _NARROWEST) -> str:
    """Return the whole report, lines of at most `width` characters (80 if it is less) unless a word is longer."""
    width = max(width, _NARROWEST)
    found = report.groups(result)
    lines = [*_heading(result, width)]
    for group in found:
        lines += ["", *_fill(f"{group.title}" + (f" ({group.common})" if group.common else ""), width), *_table(group, width)]
    if found:
        lines += ["", *_fill(f"{_MARKS_LEGEND} {report.LEGEND} {report.intervals(found)}", width), *_copies(found, width)]
    else:
        lines += ["", "Nothing was measured."]
    for wrong, title in report.FAILED.items():
        lines += _list(title, [f"{_named(f.subject)}: {f.why}" for f in result.failures if f.wrong == wrong], width)
    lines += _list("Beware", verdicts.cautions(result), width)
    lines += _list("Notes", result.notes, width)
    for finding in verdicts.findings(result):
        lines += ["", *_fill(finding.question, width), *_fill(finding.answer, width, indent="  ")]
        lines += chain.from_iterable(_fill(point, width, indent="    ", first="  - ") for point in finding.points)
    return _text(lines)


def compare(a: Result, b: Result, width: int = _NARROWEST) -> str:
    """Return how `b` differs from `a` for subjects and loads that are in both, programs' versions aside."""
    width = max(width, _NARROWEST)
    lines = [f"a: {a.began}, {a.machine.system}", f"b: {b.began}, {b.machine.system}", "", *_fill(_APART, width)]
    before, after = _by_key(a), _by_key(b)
    shared = [key for key in before if key in after]
    labels = words.Labels([subject for _, subject in shared])
    for load in dict.fromkeys(load for load, _ in shared):
        rows = [_difference(labels.of(k[1]), before[k], after[k]) for k in shared if k[0] == load]
        heads = [("what", ""), ("TLS", ""), ("a", "MB/s"), ("b", "MB/s"), ("b/a", ""), ("b/a CPU", "per byte")]
        lines += ["", words.load(load), *_columns(heads, rows, width)]
    if not shared:
        lines += ["", "They have no subject and load in common."]
    lines += _list("Machines and programs that differ", [*_differences(a, b)], width)
    for one, other, name in ((before, after, "a"), (after, before, "b")):
        alone: dict[str, list[str]] = {}
        for load, subject in (key for key in one if key not in other):
            alone.setdefault(_named(subject), []).append(words.load(load))
        lines += _list(f"Only in {name}", [f"{who}: {'; '.join(loads)}" for who, loads in alone.items()], width)
    return _text(lines)


# --- parts of the report ---


def _heading(result: Result, width: int) -> Iterable[str]:
    machine = result.machine
    yield f"ktlsd bench, {result.began}"
    yield from chain.from_iterable(
        _fill(f"{about}: {text}", width, indent="  ", first="") for about, text in machine_facts(machine)
    )
    programs = dict.fromkeys(s.subject.program for s in result.samples if s.subject.program)
    if programs:
        yield from _fill(f"Programs: {'; '.join(programs)}", width)
    yield from _fill(f"Command: {' '.join(result.command)}", width)


def machine_facts(machine: Machine) -> list[tuple[str, str]]:
    """Return what there is to say about a machine, as (about what, text)."""
    kernel = [name for name, why in machine.kernel_tls.items() if not why]
    refused = [f"{name} ({why})" for name, why in machine.kernel_tls.items() if why]
    if not machine.kernel_tls:
        tls = "not asked"
    elif not refused:
        tls = f"all {len(kernel)} versions and ciphers tried"
    elif not kernel:  # commonly all for the same reason
        tls = f"none of {len(refused)} versions and ciphers tried ({', '.join(dict.fromkeys(machine.kernel_tls.values()))})"
    else:
        tls = f"{', '.join(kernel)}; not {', '.join(refused)}"
    return [
        ("system", machine.system),
        ("virtual", machine.virtual or "not known to be virtual"),
        ("processor", f"{machine.cpu}, {machine.cpus} CPU{'s' if machine.cpus != 1 else ''} used"),
        ("memory", words.size(machine.memory)),
        ("AES-GCM in the kernel", machine.crypto or "driver of gcm(aes) unknown"),
        ("TLS in the kernel", tls),
        ("versions", f"Python {machine.python}, {machine.openssl}, ktlsd {machine.ktlsd}"),
    ]


def _table(group: Group, width: int) -> list[str]:
    heads = [
        ("what", ""), ("TLS", ""), ("MB/s", ""), ("of the first", ""), ("user", "s/GB"), ("sys", "s/GB"),
        ("calls", "/GB"), ("switch", "/GB"), ("faults", "/GB"), ("peak", "MB"),
    ]  # fmt: skip
    if width >= _WIDE:
        heads.insert(3, ("sent", "per s"))
    return _columns(heads, [_cells(row, width) for row in group.rows], width)


def _cells(row: Row, width: int) -> Cells:
    wide = width >= _WIDE
    number = words.figure if wide else words.short
    doubt = "?" if row.speed and row.speed.unsteady else ""
    cells = [
        ("! " if row.trouble else "") + row.label,
        words.TLS_SHORT[row.subject.tls],
        number(row.speed.middle / 1e6 if row.speed else None) + doubt,
        _ratio(row, wide=wide),
        *(words.NOTHING if cpu is None else f"{cpu:.2f}" if cpu < 99.995 else number(cpu) for cpu in (row.user, row.system)),
        *(number(value) for value in (row.calls, row.switches, row.faults)),
        words.NOTHING if row.peak is None else f"{row.peak / 1e6:,.0f}",
    ]
    if wide:
        cells.insert(3, number(row.rate.middle if row.rate else None))
    return cells


def _ratio(row: Row, *, wide: bool) -> str:
    if row.ratio is None:
        return "1 (first) " if row.speed else words.NOTHING
    return f"{words.between(row.ratio, to=' to ' if wide else '-')}{_MARKS[row.verdict]}"


def _copies(found: list[Group], width: int) -> Iterable[str]:
    ways = copies.told(row.subject for group in found for row in group.rows)
    if ways:
        yield ""
        yield "Copies of each byte by the sender's CPU (known, not measured):"
    for name, tls, known in ways:
        passes = " + encryption" if known.encryptions else ""
        yield from _fill(f"{name}, {words.TLS[tls]}: {known.copies}{passes}: {known.why}.", width, indent="    ", first="  ")


def _list(title: str, items: Iterable[str], width: int) -> list[str]:
    lines = list(chain.from_iterable(_fill(item, width, indent="    ", first="  - ") for item in items))
    return ["", f"{title}:", *lines] if lines else []


def _named(subject: Subject) -> str:
    parts = [subject.name, words.TLS[subject.tls], subject.protocol, subject.version, subject.cipher]
    return ", ".join(part for part in parts if part and part != "raw")


# --- parts of the comparison ---


def _by_key(result: Result) -> dict[tuple[Load, Subject], list[Sample]]:
    """Return the samples by load and subject as the tables have them; the program, with its version, is not in the key."""
    found: dict[tuple[Load, Subject], list[Sample]] = {}
    for group in report.groups(result):
        for row in group.rows:
            found.setdefault((group.load, msgspec.structs.replace(row.subject, program="")), []).extend(row.samples)
    return found


def _difference(label: str, before: list[Sample], after: list[Sample]) -> Cells:
    tls = words.TLS_SHORT[(before + after)[0].subject.tls] if before + after else ""
    cells = [label, tls]
    ratios = []
    for measure, less_is_better in ((stats.throughput, False), (stats.cpu_per_gb, True)):
        one, other = (stats.interval(stats.measured(samples, measure)) for samples in (before, after))
        if measure is stats.throughput:
            cells += [words.figure(i.middle / 1e6) if i else words.NOTHING for i in (one, other)]
        ratio = stats.unpaired(other, one) if one and other else None
        mark = {"better": ">", "worse": "<"}.get(stats.verdict(ratio, less_is_better=less_is_better).value, "~")
        ratios.append(f"{words.between(ratio, to='-')}{mark}" if ratio else words.NOTHING)
    return [*cells, *ratios]


def _differences(a: Result, b: Result) -> Iterable[str]:
    for (about, one), (_, other) in zip(machine_facts(a.machine), machine_facts(b.machine), strict=True):
        if one != other:
            yield f"{about}: {one} | {other}"
    for key, programs in _programs(a).items():
        if programs != (others := _programs(b).get(key, programs)):
            yield f"{key}: {', '.join(programs) or 'nothing'} | {', '.join(others) or 'nothing'}"
    if a.command != b.command:
        yield f"command: {' '.join(a.command)} | {' '.join(b.command)}"


def _programs(result: Result) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for subject in dict.fromkeys(sample.subject for sample in result.samples):
        found.setdefault(_named(subject), []).append(subject.program)
    return found


# --- layout ---


def _columns(heads: list[tuple[str, str]], rows: list[Cells], width: int) -> list[str]:
    """Return a table of heads of two lines and rows; the first column takes what is left, and wraps, the second is text."""
    cells = [[head[0] for head in heads], [head[1] for head in heads], *rows]
    gap = "  " if width >= _WIDE else " "
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    widths[0] = max(min(12, widths[0]), min(widths[0], width - sum(widths[1:]) - len(gap) * (len(heads) - 1)))
    lines = []
    for number, row in enumerate(cells):
        names = _name(row[0], widths[0])
        rest = [row[1].ljust(widths[1]), *(text.rjust(w) for text, w in zip(row[2:], widths[2:], strict=True))]
        lines.append(gap.join([names[0].ljust(widths[0]), *rest]).rstrip())
        lines += names[1:]
        if number == 1:
            lines.append("-" * min(width, sum(widths) + len(gap) * (len(heads) - 1)))
    return lines


def _name(text: str, width: int) -> list[str]:
    """Return the lines of a name: broken behind "+" too, where it has no space."""
    return [line.replace("+ ", "+") for line in wrap(text.replace("+", "+ "), width)] if len(text) > width else [text]


def _fill(text: str, width: int, *, indent: str = "", first: str | None = None) -> list[str]:
    return wrap(
        text, width, initial_indent=indent if first is None else first, subsequent_indent=indent, break_on_hyphens=False
    )  # fmt: skip


def _text(lines: Iterable[str]) -> str:
    return "".join(words.printable(line) + "\n" for line in lines)
