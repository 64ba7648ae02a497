"""What samples say and what they don't: medians, ratios of pairs, intervals, a verdict. Values in, values out.

Rules of this module. No sample is ever left out because it looks wrong. What is compared was measured in the same round, one
after the other, so that what slows the whole machine down cancels out. A median comes with an interval that assumes nothing
about the noise except that rounds are independent of each other: the order statistics of the sign test (W. J. Conover,
Practical Nonparametric Statistics, §3.2). Where noise lasts longer than a round, an interval is too narrow; `drift` tells.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ktlsd.bench.result import Sample

GB: Final = 1_000_000_000
CONFIDENCE: Final = 0.95
FEWEST: Final = 6  # values for which smallest to largest covers the true median in 95 % of cases: 1 - 2 / 2^6
FEWEST_FOR_A_WINNER: Final = 3
UNSTEADY: Final = 1.5  # an interval whose ends differ by more says little more than the order of magnitude
_STALL: Final = 0.5  # of the median: a round that was slower has been held up by something
_DRIFT: Final = 1.1  # halves that differ by less are not worth a word
_CHANCE: Final = 0.05

Measure = Callable[[Sample], float | None]  # None: this sample can't tell


class Verdict(Enum):
    """Whether one is better than the other."""

    BETTER = "better"
    WORSE = "worse"
    OPEN = "no difference can be told"


@dataclass(frozen=True, slots=True)
class Interval:
    """The median of `count` values, and within what the true one lies: low <= middle <= high.

    From six values on, `low` to `high` covers the true median in at least 95 % of cases. With fewer it is the range of the
    values, and nothing is promised (`promised` is False).
    """

    middle: float
    low: float
    high: float
    count: int

    @property
    def promised(self) -> bool:
        """Whether there were enough values for 95 %."""
        return self.count >= FEWEST

    @property
    def unsteady(self) -> bool:
        """Whether the ends are so far apart that the middle means little."""
        return self.high > UNSTEADY * self.low


def interval(values: Iterable[float]) -> Interval | None:
    """Return the median with its interval, None for no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    rank = _rank(len(ordered)) or 1
    return Interval(statistics.median(ordered), ordered[rank - 1], ordered[-rank], len(ordered))


def _rank(count: int) -> int:
    """Return the largest k for which the k-th smallest to the k-th largest of `count` values cover the median in 95 %; 0: none.

    The true median is below the k-th smallest value if fewer than k of `count` throws of a coin are heads.
    """
    rank, outside = 0, 0.0  # outside: the probability on one side
    while (outside := outside + math.comb(count, rank) / 2**count) <= (1 - CONFIDENCE) / 2:
        rank += 1
    return rank


def verdict(ratio: Interval | None, *, less_is_better: bool = False) -> Verdict:
    """Judge the ratio of two. Never for a winner if the interval contains 1, or with fewer than three pairs.

    With three to five pairs all of them can be on one side by chance (one time in four for three). Then the interval must also
    be further from 1 than it is wide (as logarithms): for noise that is near to lognormal, that happens by chance in fewer
    than 5 % of cases. This one is a rule of thumb, not a property of every distribution.
    """
    if ratio is None or ratio.count < FEWEST_FOR_A_WINNER or ratio.low <= 1 <= ratio.high:
        return Verdict.OPEN
    if not ratio.promised:
        near, far = (ratio.low, ratio.high) if ratio.low > 1 else (ratio.high, ratio.low)
        # near / 1 against far / near, without logarithms: a ratio can be 0.
        if (near * near <= far) if near > 1 else (near * near >= far and near > 0):
            return Verdict.OPEN
    return Verdict.BETTER if (ratio.low > 1) != less_is_better else Verdict.WORSE


# --- what a sample says ---


def timed(sample: Sample) -> bool:
    """Whether a sample's times count: counting calls slows down, so a sample with calls tells its calls and nothing else."""
    return sample.calls is None


def throughput(sample: Sample) -> float | None:
    """Return bytes of payload per second; 0 if none arrived, None if no time passed."""
    return sample.bytes / sample.seconds if sample.seconds > 0 else None


def rate(sample: Sample) -> float | None:
    """Return transfers per second."""
    return sample.transfers / sample.seconds if sample.seconds > 0 else None


def user_per_gb(sample: Sample) -> float | None:
    """Return CPU seconds outside the kernel per 10^9 bytes of payload."""
    return _per_gb(sample, sample.user)


def system_per_gb(sample: Sample) -> float | None:
    """Return CPU seconds in the kernel per 10^9 bytes of payload."""
    return _per_gb(sample, sample.system)


def cpu_per_gb(sample: Sample) -> float | None:
    """Return CPU seconds, user and system, per 10^9 bytes of payload."""
    return _per_gb(sample, sample.user + sample.system)


def calls_per_gb(sample: Sample) -> float | None:
    """Return system calls per 10^9 bytes of payload, None where they were not counted."""
    return None if sample.calls is None else _per_gb(sample, sample.calls)


def switches_per_gb(sample: Sample) -> float | None:
    """Return context switches per 10^9 bytes of payload."""
    return _per_gb(sample, sample.switches)


def faults_per_gb(sample: Sample) -> float | None:
    """Return page faults, minor and major, per 10^9 bytes of payload."""
    return _per_gb(sample, sample.minor_faults + sample.major_faults)


def _per_gb(sample: Sample, amount: float) -> float | None:
    return amount / sample.bytes * GB if sample.bytes > 0 else None


# --- what samples say ---


def measured(samples: Iterable[Sample], measure: Measure) -> list[float]:
    """Return what each sample says, in the order of the rounds, without those that can't tell."""
    ordered = sorted(samples, key=lambda sample: sample.round)
    return [value for sample in ordered if (value := measure(sample)) is not None]


def ratios(of: Iterable[Sample], to: Iterable[Sample], measure: Measure) -> list[float]:
    """Return `of` / `to` for each round that has both, in the order of the rounds. All samples have the same load.

    A round with several samples of one side counts once, with their median. A round in which `to` is 0 has no ratio.
    """
    ours, theirs = _by_round(of, measure), _by_round(to, measure)
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys()) if theirs[number] > 0]


def _by_round(samples: Iterable[Sample], measure: Measure) -> dict[int, float]:
    found: defaultdict[int, list[float]] = defaultdict(list)
    for sample in samples:
        if (value := measure(sample)) is not None:
            found[sample.round].append(value)
    return {number: statistics.median(values) for number, values in found.items()}


def unpaired(of: Interval, to: Interval) -> Interval | None:
    """Return the ratio of two medians that were not measured together, between the extremes of both; None if `to` can be 0.

    Covers what the two intervals cover: that both machines stayed as they were is up to the reader.
    """
    if to.low <= 0:
        return None
    return Interval(of.middle / to.middle, of.low / to.high, of.high / to.low, min(of.count, to.count))


def stalls(values: Sequence[float]) -> int:
    """Return how many of these speeds are below half of their median."""
    return sum(value < _STALL * statistics.median(values) for value in values) if values else 0


def drift(values: Sequence[float]) -> float | None:
    """Return what the second half of a run is of the first (medians), None if that is near 1, may be chance, or can't be told.

    `values` in the order of the rounds. Chance: Mann and Whitney's test of the two halves, exact, 5 %; fewer than eight values
    never pass it.
    """
    if len(values) < 2:
        return None
    first, second = values[: len(values) // 2], values[len(values) // 2 :]
    before, after = statistics.median(first), statistics.median(second)
    if before <= 0 or after <= 0 or 1 / _DRIFT < after / before < _DRIFT or _chance(first, second) > _CHANCE:
        return None
    return after / before


def _chance(first: Sequence[float], second: Sequence[float]) -> float:
    """Return how probable it is that halves in any order differ in ranks at least as much as these: two-sided, exact."""
    higher = sum((a < b) + (a == b) / 2 for a in first for b in second)
    extreme = min(higher, len(first) * len(second) - higher)
    ways = _ways(len(first), len(second))
    return min(1.0, 2 * sum(ways[: math.floor(extreme) + 1]) / sum(ways))


def _ways(m: int, n: int) -> list[int]:
    """Return for each U in 0..m*n in how many orders of m and n values it comes out: Gauss's binomial coefficient of q."""
    ways = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for power in range(m * n, n + i - 1, -1):  # times 1 - q^(n+i)
            ways[power] -= ways[power - n - i]
        for power in range(i, m * n + 1):  # over 1 - q^i
            ways[power] += ways[power - i]
    return ways
