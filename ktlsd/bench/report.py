"""A result, arranged: groups of one load, in them a row for each subject with medians and intervals. Values in, values out.

Text, HTML and plots show these rows and nothing else, so that they agree. The order of rows is the order in which subjects
first appear in the result; the first row of a group is what the others are compared with.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ktlsd.bench import stats, words
from ktlsd.bench.result import Load, Result, Sample, Subject
from ktlsd.bench.stats import Interval, Verdict

LEGEND: Final = (
    "MB is 10^6 bytes, GB 10^9 bytes of payload. Each figure is the median of its samples, user and system each by itself; "
    "peak memory is the largest of all. Ratios are those of samples of one round, taken one after the other."
)
LEGEND_PROMISED: Final = (
    "An interval covers the true value in 95 % of cases if rounds are independent of each other: so of twenty comparisons of "
    "equals, one comes out with a winner."
)
LEGEND_RANGE: Final = (
    "With fewer than six rounds an interval is the range of all rounds without a promise, and a winner is called only if "
    "there are three at least and the interval is further from 1 than it is wide."
)
FAILED: Final = {True: "Failed", False: "Not measured"}  # Failure.wrong -> title


@dataclass(frozen=True, slots=True)
class Row:
    """One subject under one load. All per GB are medians, None where nothing can be told."""

    subject: Subject
    label: str
    samples: tuple[Sample, ...]  # those whose times count
    speed: Interval | None  # bytes per second
    rate: Interval | None  # transfers per second
    cpu: Interval | None  # seconds per GB, user and system
    user: float | None
    system: float | None
    calls: float | None
    switches: float | None
    faults: float | None
    peak: int | None  # bytes
    ratio: Interval | None  # of the first's throughput; None for the first itself
    trouble: str  # "" if the samples are what they say they are

    @property
    def verdict(self) -> Verdict:
        """Against the first row."""
        return stats.verdict(self.ratio)


@dataclass(frozen=True, slots=True)
class Group:
    """All that was measured under one load."""

    load: Load
    title: str
    common: str  # what all rows have in common, "" for nothing
    rows: tuple[Row, ...]


def groups(result: Result) -> list[Group]:
    """Return the groups: conditions in the order in which they appear, in each of them sizes from small to large."""
    subjects = list(dict.fromkeys(sample.subject for sample in result.samples))
    conditions = list(dict.fromkeys(words.condition(sample.load) for sample in result.samples))
    loads = sorted(
        {sample.load for sample in result.samples}, key=lambda load: (conditions.index(words.condition(load)), load.size)
    )
    belonging: defaultdict[tuple[Load, Subject], list[Sample]] = defaultdict(list)
    for sample in result.samples:
        belonging[sample.load, sample.subject].append(sample)
    labels = words.Labels(subjects)
    found = []
    for load in loads:
        present = {s: belonging[load, s] for s in subjects if (load, s) in belonging}
        first = next(iter(present.values()))
        rows = tuple(_row(s, labels.of(s), samples, first) for s, samples in present.items())
        found.append(Group(load, words.load(load), labels.common, rows))
    return found


def _row(subject: Subject, label: str, samples: list[Sample], first: list[Sample]) -> Row:
    counted = [sample for sample in samples if stats.timed(sample)]

    def median(measure: stats.Measure) -> float | None:
        found = stats.interval(stats.measured(counted, measure))
        return found.middle if found else None

    calls = stats.interval(stats.measured(samples, stats.calls_per_gb))
    return Row(
        subject,
        label,
        tuple(sorted(counted, key=lambda sample: sample.round)),
        speed=stats.interval(stats.measured(counted, stats.throughput)),
        rate=stats.interval(stats.measured(counted, stats.rate)),
        cpu=stats.interval(stats.measured(counted, stats.cpu_per_gb)),
        user=median(stats.user_per_gb),
        system=median(stats.system_per_gb),
        calls=calls.middle if calls else None,
        switches=median(stats.switches_per_gb),
        faults=median(stats.faults_per_gb),
        peak=max((sample.peak for sample in counted), default=None),
        ratio=None if samples is first else compared(samples, first),
        trouble=_trouble(subject, samples),
    )


def compared(of: Iterable[Sample], to: Iterable[Sample], measure: stats.Measure = stats.throughput) -> Interval | None:
    """Return the ratio of two subjects' samples under one load, those left out whose times don't count."""
    return stats.interval(stats.ratios(filter(stats.timed, of), filter(stats.timed, to), measure))


def _trouble(subject: Subject, samples: list[Sample]) -> str:
    """Return what is wrong with samples that were not encrypted by whom they say."""
    wrong = sum(sample.in_kernel is (subject.tls != "kernel") for sample in samples)
    if not wrong:
        return ""
    of_all = f"{wrong} of {len(samples)} samples"
    if subject.tls != "kernel":
        return f"the kernel encrypted in {of_all}: not what its name says"
    if subject.protocol == "raw":
        return f"the kernel did not encrypt in {of_all}: not what its name says"
    return f"the kernel encrypted nothing in {of_all}: below the server's hand-over size, or it fell back"


def conditions(found: Iterable[Group]) -> list[list[Group]]:
    """Return the groups that differ in nothing but size, together: what a plot against size shows."""
    together: dict[str, list[Group]] = {}
    for group in found:
        together.setdefault(words.condition(group.load), []).append(group)
    return list(together.values())


def intervals(found: Iterable[Group]) -> str:
    """Return what the intervals in these groups mean: it depends on the number of rounds."""
    counts = {row.speed.count for group in found for row in group.rows if row.speed}
    promised = any(count >= stats.FEWEST for count in counts)
    return " ".join(
        text for text, said in ((LEGEND_PROMISED, promised), (LEGEND_RANGE, min(counts, default=9) < stats.FEWEST)) if said
    )
