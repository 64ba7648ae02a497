"""A result in words: does kernel TLS help here, how does ktlsd stand against others, and what to beware of.

Who is compared with whom: the fastest of one kind with the fastest of the other, under the same load, with the same protocol,
version and cipher; ways of sending among themselves, a server in kernel mode with itself in userspace mode.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from ktlsd.bench import report, stats, words
from ktlsd.bench.report import Group, Row
from ktlsd.bench.result import Machine, Result
from ktlsd.bench.stats import Interval, Verdict
from ktlsd.net import handover

QUESTION: Final = "Does kernel TLS help on this machine?"
US: Final = "ktlsd"
_TOO_FEW: Final = "too few rounds to call it"


@dataclass(frozen=True, slots=True)
class Finding:
    """A question, its answer in a sentence or two, and what it rests on."""

    question: str
    answer: str
    points: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Match:
    """Two subjects under one load: ratios are those of `ours` to `theirs`, None where there was nothing to compare."""

    size: int
    ours: Row
    theirs: Row
    speed: Interval | None
    cpu: Interval | None

    @property
    def outcome(self) -> Verdict:
        """By throughput."""
        return stats.verdict(self.speed)

    @property
    def undecided(self) -> bool:
        """Whether all rounds say the same and are too few to say it."""
        return self.outcome is Verdict.OPEN and self.speed is not None and not self.speed.low <= 1 <= self.speed.high

    @property
    def saves(self) -> Verdict:
        """By CPU time for the same bytes."""
        return stats.verdict(self.cpu, less_is_better=True)


def findings(result: Result) -> list[Finding]:
    """Return what can be said, the question about kernel TLS first."""
    found = report.groups(result)
    return [_kernel_tls(result.machine, found), *_against_peers(found)]


# --- does kernel TLS help? ---


def _kernel_tls(machine: Machine, found: list[Group]) -> Finding:
    refused = {name: why for name, why in machine.kernel_tls.items() if why}
    points: list[str] = []
    if machine.kernel_tls and len(refused) == len(machine.kernel_tls):
        whys = dict.fromkeys(refused.values())
        remedies = [remedy for why in whys if (remedy := handover.remedy(why))]
        answer = f"That can't be measured yet: its kernel does not encrypt TLS ({', '.join(whys)})."
        return Finding(QUESTION, " ".join([answer, *remedies, "Then run this again."]), tuple(_limit(found)))
    unknown = [f"The kernel does not encrypt {name} ({why}). {handover.remedy(why)}".rstrip() for name, why in refused.items()]
    matches = [(about, matched) for about, matched in _pools(found) if matched]
    if not matches:
        return Finding(
            QUESTION, "Not measured: no kernel way and userspace way had the same load and cipher.", (*_limit(found), *unknown)
        )
    answers = []
    for (condition, about), matched in matches:
        where = f"{condition}{f', {about}' if about else ''}: " if len(matches) > 1 else ""
        subject = matched[0].ours.subject
        other = "the fastest userspace way" if subject.protocol == "raw" else f"{subject.name}'s userspace mode"
        answers.append(where + _answer(matched, other))
        if len(runs := _runs(matched, other)) > 1:  # else the answer says it all
            points += [where + point for point in runs]
    return Finding(QUESTION, answers[0], (*answers[1:], *points, *_limit(found), *unknown))


def _pools(found: list[Group]) -> list[tuple[tuple[str, str], list[Match]]]:
    """Return for each condition and pool of comparable subjects the matches of kernel against userspace, by size."""
    pools: dict[tuple[str, str], list[Match]] = {}
    for group in found:
        together: dict[str, list[Row]] = {}
        for row in group.rows:
            s = row.subject
            if s.tls != "none" and not row.trouble:
                name = "" if s.protocol == "raw" else f"{s.name} {s.protocol}"
                together.setdefault(" ".join(filter(None, (name, s.version, s.cipher))), []).append(row)
        for name, rows in together.items():
            ours, theirs = ([row for row in rows if row.subject.tls == tls] for tls in ("kernel", "userspace"))
            if match := _match(group, ours, theirs):
                pools.setdefault((words.condition(group.load), name), []).append(match)
    return list(pools.items())


def _match(group: Group, ours: list[Row], theirs: list[Row]) -> Match | None:
    one, other = _fastest(ours), _fastest(theirs)
    if one is None or other is None:
        return None
    speed, cpu = (report.compared(one.samples, other.samples, m) for m in (stats.throughput, stats.cpu_per_gb))
    return Match(group.load.size, one, other, speed, cpu)


def _fastest(rows: Iterable[Row]) -> Row | None:
    return max((row for row in rows if row.speed), key=lambda row: row.speed.middle if row.speed else 0, default=None)


def _answer(matched: list[Match], other: str) -> str:
    """Return yes, no, it depends, or nobody can tell, with the figures of the largest size that says so."""
    better = [m for m in matched if m.outcome is Verdict.BETTER]
    worse = [m for m in matched if m.outcome is Verdict.WORSE]
    saving = [m for m in matched if m.outcome is Verdict.OPEN and m.saves is Verdict.BETTER]
    if better and worse:
        but = f"but {_times(worse[-1].speed)} for {words.size(worse[-1].size)}"
        return f"It depends on the size: {_figures(better[-1], other)}; {but}."
    if better:
        return f"Yes: {_figures(better[-1], other)}{_below(matched, better)}."
    if worse:
        return f"No, it is slower: {_figures(worse[-1], other)}."
    if saving:
        return f"It is not faster, but saves CPU time: {_figures(saving[-1], other)}."
    return f"No difference can be told: {_figures(matched[-1], other)}."


def _below(matched: list[Match], better: list[Match]) -> str:
    """Return up to which size nothing can be told, if everything above it is better."""
    rest = [m for m in matched if m not in better]
    if rest and rest[-1].size < better[0].size:
        return f"; below about {words.size(better[0].size)}: no difference can be told"
    return ""


def _figures(match: Match, other: str, *, size: bool = True) -> str:
    """Return "2.10 times (1.90 to 2.40) the throughput of …, with 0.45 times (…) its CPU time per byte, for 256 MiB"."""
    parts = [f"{_times(match.speed)} the throughput of {other}"]
    if match.cpu:
        doubt = " (no difference can be told)" if match.saves is Verdict.OPEN else ""
        parts.append(f"with {_times(match.cpu)} its CPU time per byte{doubt}")
    if size:
        parts.append(f"for {words.size(match.size)}")
    return ", ".join(parts)


def _times(ratio: Interval | None) -> str:
    if ratio is None:
        return "an unknown multiple of"
    if ratio.count == 1:
        return f"{words.times(ratio.middle)} times (one pair)"
    return f"{words.times(ratio.middle)} times ({words.times(ratio.low)} to {words.times(ratio.high)})"


def _runs(matched: list[Match], other: str) -> list[str]:
    """Return a sentence for each run of neighbouring sizes with the same outcome: its ends and its largest size's figures."""
    sentences = []
    for (outcome, _), run in groupby(matched, key=lambda m: (m.outcome, m.saves)):
        sizes = list(run)
        last = sizes[-1]
        ends = " to ".join(dict.fromkeys(words.size(m.size) for m in (sizes[0], last)))
        figures = _figures(last, other, size=len(sizes) > 1)
        sentences.append(f"{ends}: {words.SPEED[outcome]}; {figures} ({_names(last)}).")
    return sentences


def _names(match: Match) -> str:
    """Return who was compared with whom, once what both have in common."""
    ours, theirs = (words.TLS[row.subject.tls] for row in (match.ours, match.theirs))
    if match.ours.label == match.theirs.label:
        return f"{match.ours.label}: {ours} against {theirs}"
    return f"{match.ours.label}, {ours}, against {match.theirs.label}"


def _limit(found: list[Group]) -> Iterable[str]:
    """Yield what encrypting costs at the largest size of each condition: the fastest encrypted way against plain sending."""
    for together in report.conditions(found):
        group = together[-1]
        rows = [row for row in group.rows if row.subject.protocol == "raw" and not row.trouble]
        match = _match(group, [r for r in rows if r.subject.tls != "none"], [r for r in rows if r.subject.tls == "none"])
        if match and match.speed:
            yield (
                f"What encryption costs, {group.title}: the fastest encrypted way ({match.ours.label}, "
                f"{words.TLS[match.ours.subject.tls]}) has {_times(match.speed)} the throughput of the fastest in the clear "
                f"({match.theirs.label}). Kernel TLS can't be faster than that one."
            )


# --- ktlsd against others ---


def _against_peers(found: list[Group]) -> list[Finding]:
    served = [row.subject for group in found for row in group.rows if row.subject.protocol != "raw"]
    pairs = dict.fromkeys((s.name, s.protocol) for s in served if s.name != US)
    return [finding for name, protocol in pairs if (finding := _against(found, name, protocol))]


def _against(found: list[Group], peer: str, protocol: str) -> Finding | None:
    """Return how ktlsd stands against one server, each in its fastest configuration for the load."""
    by_condition: dict[str, list[Match]] = {}
    for group in found:
        rows = [row for row in group.rows if row.subject.protocol == protocol]
        ours, theirs = [r for r in rows if r.subject.name == US], [r for r in rows if r.subject.name == peer]
        if match := _match(group, ours, theirs):
            by_condition.setdefault(words.condition(group.load), []).append(match)
    question = f"How does ktlsd stand against {peer}, {protocol}?"
    every = [match for matched in by_condition.values() for match in matched]
    if not every:
        with_us = any(row.subject.name == US for _, row in _rows(found))
        return Finding(question, "They had no load in common.") if with_us else None
    points = []
    for condition, matched in by_condition.items():
        where = f"{condition}: " if len(by_condition) > 1 else ""
        points += [where + _with_its_tls(match, peer) for match in matched]
    return Finding(question, _score(every), tuple(points))


def _with_its_tls(match: Match, peer: str) -> str:
    outcome = _TOO_FEW if match.undecided else words.SPEED[match.outcome]
    said = f"{words.size(match.size)}: {outcome}; {_times(match.speed)} the throughput of {peer}"
    if match.cpu and match.saves is not Verdict.OPEN:
        said += f", with {_times(match.cpu)} its CPU time per byte"
    ours, theirs = match.ours.subject, match.theirs.subject
    modes = words.TLS[ours.tls]
    modes = f"both {modes}" if ours.tls == theirs.tls else f"{modes} against {words.TLS[theirs.tls]}"
    ciphers = "" if ours.cipher == theirs.cipher else f"; {ours.cipher or 'no cipher'} against {theirs.cipher or 'no cipher'}"
    return f"{said} ({modes}{ciphers})."


def _score(every: list[Match]) -> str:
    """Return where it loses, first, then where it wins, then the rest."""
    named = {Verdict.WORSE: "ktlsd loses", Verdict.BETTER: "ktlsd wins", Verdict.OPEN: words.SPEED[Verdict.OPEN]}
    sizes: dict[str, list[str]] = {said: [] for said in (*named.values(), _TOO_FEW)}
    for match in every:
        sizes[_TOO_FEW if match.undecided else named[match.outcome]].append(words.size(match.size))
    parts = [f"{said} for {', '.join(dict.fromkeys(those))}" for said, those in sizes.items() if those]
    text = "; ".join(parts) + "."
    return text if text.startswith(US) else text[0].upper() + text[1:]


# --- what to beware of ---


def cautions(result: Result) -> list[str]:
    """Return what makes the figures say less than they seem to."""
    found = report.groups(result)
    said = [*virtual(result.machine.virtual)]
    said += [f"{_who(group, row)}: {row.trouble}." for group, row in _rows(found) if row.trouble]
    for ask, what in _DOUBTS:
        said += _summed(found, what, ask)
    untimed = [_who(group, row) for group, row in _rows(found) if not row.samples]
    if untimed:
        said.append(f"System calls were counted but times not taken: {'; '.join(untimed)}.")
    return said


def virtual(kind: str) -> Iterable[str]:
    """Yield what measuring in a virtual machine of this kind (`Machine.virtual`) does to the figures."""
    if "user mode linux" in kind.lower() or kind.lower() == "uml":
        yield (
            f"Measured under {kind}: system calls, page faults and copies between user and kernel cost several times what "
            "they cost on hardware, so the gain of kernel TLS is overstated, and all CPU time counts as system time. Ratios of "
            "bulk transfers carry over in their order; absolute figures and rates of small requests don't."
        )
    elif kind:
        yield f"Measured in {kind}: neighbours share the machine, and its network and clock may not be what hardware has."


def _rows(found: list[Group]) -> Iterable[tuple[Group, Row]]:
    return ((group, row) for group in found for row in group.rows)


def _who(group: Group, row: Row) -> str:
    return f"{row.label} ({words.TLS[row.subject.tls]}), {group.title}"


def _summed(found: list[Group], what: str, ask: Callable[[Group, Row], str]) -> Iterable[str]:
    """Yield one sentence for all rows about which `ask` has something to say, the first three by name."""
    said = [f"{_who(group, row)}: {about}" for group, row in _rows(found) if (about := ask(group, row))]
    if said:
        more = f"; and {len(said) - 3} more" if len(said) > 3 else ""
        yield f"{len(said)} of {sum(1 for _ in _rows(found))} rows {what}. {'; '.join(said[:3])}{more}."


def _unsteady(_: Group, row: Row) -> str:
    speed = row.speed
    return f"{words.figure(speed.low / 1e6)} to {words.figure(speed.high / 1e6)} MB/s" if speed and speed.unsteady else ""


def _stalled(_: Group, row: Row) -> str:
    values = stats.measured(row.samples, stats.throughput)
    count = stats.stalls(values)
    return f"{count} of {len(values)}" if count else ""


def _drifted(_: Group, row: Row) -> str:
    return _half(stats.measured(row.samples, stats.throughput))


def _drifted_apart(group: Group, row: Row) -> str:
    return _half(stats.ratios(row.samples, group.rows[0].samples, stats.throughput)) if row.ratio else ""


def _half(values: Sequence[float]) -> str:
    moved = stats.drift(values)
    return f"second half {words.times(moved)} times the first" if moved else ""


_DOUBTS: Final = (
    (_unsteady, "are so unsteady that the figure means little"),
    (_stalled, "had rounds at less than half of their median speed, which count like all others"),
    (_drifted, "changed their speed from the first half of the run to the second (ratios are of pairs: what all have in common "
     "cancels)"),
    (_drifted_apart, "changed against the first of their table during the run, so the interval is too narrow"),
)  # fmt: skip
