"""The statistics on data whose truth is known. Seeds are fixed: what passes here passes everywhere."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktlsd.bench import stats
from ktlsd.bench.result import Load, Sample, Subject
from ktlsd.bench.stats import Interval, Verdict

RUNS = 1_000
OURS, THEIRS = Subject("ours", "kernel"), Subject("theirs", "userspace")


def sample(subject=OURS, *, number=0, speed=1e9, **more):
    facts = {"seconds": 1.0, "transfers": 4, "user": 0.25, "system": 0.5, "switches": 10, "minor_faults": 30, "major_faults": 2}
    return Sample(subject, Load(1 << 20), number, bytes=round(speed), peak=1 << 20, **facts | more)


def lognormal(source, sigma=0.2):
    return math.exp(source.gauss(0, sigma))


def two_servers(source, rounds, *, truth=1.0, common=lambda number: 1.0):
    """Rounds of two servers of which ours is `truth` times as fast, on a machine that is `common` times as fast as it was."""
    ours = [sample(OURS, number=n, speed=1e9 * truth * common(n) * lognormal(source)) for n in range(rounds)]
    theirs = [sample(THEIRS, number=n, speed=1e9 * common(n) * lognormal(source)) for n in range(rounds)]
    return ours, theirs


def judged(ours, theirs):
    return stats.verdict(stats.interval(stats.ratios(ours, theirs, stats.throughput)))


# --- intervals ---


@pytest.mark.parametrize("rounds", [6, 7, 9, 15])
@pytest.mark.parametrize("truth", [0.5, 1.0, 1.3])
def test_the_interval_covers_the_true_ratio(rounds, truth):
    source, covered = random.Random(rounds), 0
    for _ in range(RUNS):
        found = stats.interval(stats.ratios(*two_servers(source, rounds, truth=truth), stats.throughput))
        covered += found.low <= truth <= found.high
    assert covered / RUNS >= 0.93


def test_the_interval_needs_no_normal_noise():
    source, covered = random.Random(1), 0
    for _ in range(RUNS):  # one round in ten stalls on either side
        values = [lognormal(source, 0.05) * source.choices((1, 0.1, 10), (8, 1, 1))[0] for _ in range(9)]
        found = stats.interval(values)
        covered += found.low <= 1 <= found.high
    assert covered / RUNS >= 0.93


@pytest.mark.parametrize(("count", "rank"), [(1, 0), (5, 0), (6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (20, 6), (100, 40)])
def test_ranks_are_those_of_the_sign_tests_tables(count, rank):
    assert stats._rank(count) == rank


def test_fewer_than_six_values_give_their_range_and_promise_nothing():
    found = stats.interval([3.0, 1.0, 2.0, 9.0, 4.0])
    assert (found.low, found.middle, found.high) == (1.0, 3.0, 9.0)
    assert not found.promised
    assert stats.interval([2.0]) == Interval(2.0, 2.0, 2.0, 1)
    assert stats.interval([]) is None


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40))
def test_an_interval_lies_around_its_median_and_in_the_values(values):
    found = stats.interval(values)
    assert found.low <= found.middle <= found.high
    assert {found.low, found.high} <= set(values)
    assert stats.interval(reversed(values)) == found
    assert found.promised is (len(values) >= 6)


def test_a_wide_interval_is_called_unsteady():
    assert not stats.interval([100, 101, 102, 104, 105, 106]).unsteady
    assert stats.interval([100, 101, 102, 104, 105, 160]).unsteady  # a sample that is far off is not left out
    assert stats.interval([0, 0, 0]).unsteady is False
    assert stats.interval([0, 1, 1]).unsteady


# --- verdicts ---


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5, 6, 9, 15])
def test_equals_have_no_winner(rounds):
    source = random.Random(rounds)
    winners = sum(judged(*two_servers(source, rounds)) is not Verdict.OPEN for _ in range(RUNS))
    assert winners / RUNS <= 0.05


@pytest.mark.parametrize("rounds", [3, 6, 9])
def test_a_machine_that_slows_down_makes_no_winner_and_hides_none(rounds):
    source = random.Random(rounds)
    slowing = {"common": lambda n: 3.0 ** (-n / rounds)}
    assert sum(judged(*two_servers(source, rounds, **slowing)) is not Verdict.OPEN for _ in range(RUNS)) / RUNS <= 0.05
    assert sum(judged(*two_servers(source, rounds, truth=4, **slowing)) is Verdict.BETTER for _ in range(RUNS)) / RUNS >= 0.9


def test_without_pairs_that_drift_would_hide_the_winner():
    ours, theirs = two_servers(random.Random(5), 9, truth=1.6, common=lambda n: 5.0 ** (-n / 9))
    one, other = (stats.interval(stats.measured(samples, stats.throughput)) for samples in (ours, theirs))
    assert stats.verdict(stats.unpaired(one, other)) is Verdict.OPEN
    assert judged(ours, theirs) is Verdict.BETTER


@pytest.mark.parametrize("stalled", range(9))
def test_a_stalled_round_does_not_change_the_verdict_of_nine(stalled):
    values = [1.5, 1.4, 1.6, 1.45, 1.55, 1.5, 1.4, 1.6, 1.5]
    values[stalled] = 0.01
    assert stats.verdict(stats.interval(values)) is Verdict.BETTER
    even = [1.02, 0.98, 1.01, 0.97, 1.05, 0.99, 1.0, 1.03, 0.96]
    even[stalled] = 0.01
    assert stats.verdict(stats.interval(even)) is Verdict.OPEN


@pytest.mark.parametrize("rounds", [3, 4, 5, 6, 7, 8])
def test_a_stalled_round_of_few_makes_it_open_never_the_other_way_round(rounds):
    assert stats.verdict(stats.interval([1.5] * rounds)) is Verdict.BETTER
    assert stats.verdict(stats.interval([1.5] * (rounds - 1) + [0.01])) is Verdict.OPEN


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], Verdict.OPEN),  # one pair says nothing
        ([3.0, 3.0], Verdict.OPEN),
        ([3.0, 3.1, 3.2], Verdict.BETTER),
        ([1.1, 1.5, 2.0], Verdict.OPEN),  # all on one side, as one time in four by chance
        ([0.3, 0.31, 0.32], Verdict.WORSE),
        ([0.5, 0.7, 0.9], Verdict.OPEN),
        ([0.0, 0.0, 0.0], Verdict.WORSE),  # nothing arrived
        ([1.0] * 9, Verdict.OPEN),
        ([1.01] * 9, Verdict.BETTER),
    ],
)
def test_winners_of_few_pairs_must_be_clear(values, expected):
    assert stats.verdict(stats.interval(values)) is expected


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=30))
def test_no_interval_around_one_has_a_winner_and_the_other_side_sees_the_opposite(values):
    found = stats.interval(values)
    ours = stats.verdict(found)
    if found.low <= 1 <= found.high:
        assert ours is Verdict.OPEN
    opposite = {Verdict.BETTER: Verdict.WORSE, Verdict.WORSE: Verdict.BETTER, Verdict.OPEN: Verdict.OPEN}
    assert stats.verdict(found, less_is_better=True) is opposite[ours]


def test_nothing_to_compare_has_no_winner():
    assert stats.verdict(None) is Verdict.OPEN


# --- samples ---


def test_what_a_sample_costs():
    one = sample(speed=500_000_000, seconds=2.0, transfers=10, calls=1_000)
    assert stats.throughput(one) == 250_000_000
    assert stats.rate(one) == 5
    assert stats.user_per_gb(one) == 0.5
    assert stats.system_per_gb(one) == 1.0
    assert stats.cpu_per_gb(one) == 1.5
    assert stats.calls_per_gb(one) == 2_000
    assert stats.switches_per_gb(one) == 20
    assert stats.faults_per_gb(one) == 64


def test_what_a_sample_can_not_tell():
    assert stats.throughput(sample(seconds=0.0)) is None
    assert stats.calls_per_gb(sample()) is None
    nothing = sample(speed=0)
    assert stats.throughput(nothing) == 0  # it counts: nothing arrived
    assert stats.cpu_per_gb(nothing) is None


def test_times_that_were_taken_while_calls_were_counted_do_not_count():
    assert stats.timed(sample())
    assert not stats.timed(sample(calls=0))


def test_pairs_are_of_one_round():
    ours = [sample(OURS, number=n, speed=s) for n, s in ((2, 300), (0, 100), (1, 200), (1, 400), (7, 9))]
    theirs = [sample(THEIRS, number=n, speed=s) for n, s in ((0, 100), (1, 100), (2, 100), (5, 1))]
    assert stats.ratios(ours, theirs, stats.throughput) == [1, 3, 3]  # round 1 has two of ours: their median
    assert stats.ratios(ours, [sample(THEIRS, number=0, speed=0)], stats.throughput) == []
    assert stats.measured(ours, stats.throughput) == [100, 200, 400, 300, 9]


def test_the_ratio_of_two_runs_takes_the_extremes_of_both():
    assert stats.unpaired(Interval(4, 2, 6, 9), Interval(2, 1, 4, 7)) == Interval(2, 0.5, 6, 7)
    assert stats.unpaired(Interval(4, 2, 6, 9), Interval(2, 0, 4, 7)) is None


# --- drift and stalls ---


def test_drift_is_found_with_its_size():
    source = random.Random(3)
    values = [lognormal(source, 0.05) * (1 if n < 5 else 0.5) for n in range(10)]
    assert stats.drift(values) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("rounds", [8, 9, 15])
def test_noise_is_no_drift(rounds):
    source = random.Random(rounds)
    assert sum(stats.drift([lognormal(source) for _ in range(rounds)]) is not None for _ in range(RUNS)) / RUNS <= 0.05


def test_what_is_no_drift():
    assert stats.drift([]) is None
    assert stats.drift([1, 1, 1, 2, 2, 2]) is None  # six can fall so by chance
    assert stats.drift([1.0] * 5 + [1.05] * 5) is None  # not worth a word
    assert stats.drift([1.0] * 5 + [0.0] * 5) is None
    assert stats.drift([1.0] * 5 + [2.0] * 5) == 2


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 3), (4, 5), (10, 10)])
def test_orders_are_all_counted(m, n):
    ways = stats._ways(m, n)
    assert sum(ways) == math.comb(m + n, m)
    assert ways == ways[::-1]


def test_the_chance_of_two_halves():
    assert stats._chance([1, 2, 3], [4, 5, 6]) == pytest.approx(0.1)  # 2 of 20 orders
    assert stats._chance([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)
    assert stats._chance([1, 4], [2, 3]) == 1


def test_stalls_are_counted_and_left_in():
    values = [100, 101, 99, 100, 20]
    assert stats.stalls(values) == 1
    assert stats.interval(values).low == 20
    assert stats.stalls([]) == 0
