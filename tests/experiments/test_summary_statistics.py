import math
import statistics

import numpy as np
import pytest
import scipy.stats

from experiments.comparison.statistics import (
    Difference,
    Spread,
    bootstrap_interval,
    holm,
    independent,
    interquartile_mean,
    paired_difference,
    spread,
    t_interval,
)


def test_spread_has_one_less_than_n_in_the_denominator() -> None:
    assert spread([1.0, 2.0, 6.0]) == Spread(3.0, math.sqrt((4 + 1 + 9) / 2))
    values = [0.1, 0.7, 0.35, 0.2]
    found = spread(values)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.std == pytest.approx(statistics.stdev(values))


def test_a_single_number_has_no_spread_and_no_interval() -> None:
    assert spread([0.5]) == Spread(0.5, None)
    assert t_interval([0.5]) is None


def test_equal_numbers_leave_their_interval_unknown() -> None:
    assert t_interval([0.1, 0.1, 0.1]) is None
    # Equal but for rounding.
    assert t_interval([0.9 - 0.8, 0.6 - 0.5, 0.4 - 0.3]) is None


def test_an_interval_is_scipys_t_interval() -> None:
    values = [0.3, -0.1, 0.4, 0.2, 0.25]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((expected.low, expected.high), rel=1e-12)


@pytest.mark.parametrize("n", [3, 5])
def test_95_of_100_intervals_cover_the_mean(n: int) -> None:
    draws = np.random.default_rng(0).normal(1.0, 2.0, size=(4000, n)).tolist()
    intervals = [t_interval(values) or (math.nan, math.nan) for values in draws]
    covered = statistics.mean(low < 1.0 < high for low, high in intervals)
    # Three standard errors.
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.05 * 0.95 / 4000))


def test_differences_are_those_of_scipys_paired_test() -> None:
    ours, others = (
        {(0, 0): 0.5, (0, 1): 0.75, (0, 7): 0.9, (0, 8): 0.7},
        {(0, 8): 0.4, (0, 1): 0.5, (0, 0): 0.5, (0, 3): 0.1},
    )
    test = scipy.stats.ttest_rel([0.5, 0.75, 0.7], [0.5, 0.5, 0.4])
    interval = test.confidence_interval(0.95)
    found = paired_difference(ours, others)
    assert found is not None
    assert (found.mean, len(found.values)) == (pytest.approx(0.55 / 3), 3)
    assert found.interval == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(test.pvalue)


def test_a_difference_that_is_the_same_for_all_seeds_says_nothing_of_its_spread() -> None:
    found = paired_difference({(0, 0): 0.5, (0, 1): 0.75}, {(0, 0): 0.25, (0, 1): 0.5})
    assert found == Difference([0.25, 0.25], 0.25, None, None)


def test_one_common_seed_gives_a_difference_without_an_interval() -> None:
    assert paired_difference({(0, 0): 0.5, (0, 1): 1.0}, {(0, 0): 0.25}) == Difference(
        [0.25], 0.25, None, None
    )


def test_without_a_common_seed_there_is_no_difference() -> None:
    assert paired_difference({(0, 0): 0.5}, {(0, 1): 0.25}) is None
    assert paired_difference({(0, 0): 0.5}, {}) is None


def test_of_several_pools_each_is_the_mean_of_its_runs() -> None:
    values = {(1, 0): 0.5, (0, 0): 0.25, (1, 5): 0.75, (0, 3): 0.75}
    assert independent(values, by_pool=True) == [0.5, 0.625]
    assert independent(values, by_pool=False) == [0.25, 0.75, 0.5, 0.75]


def test_differences_are_paired_by_pool_and_seed() -> None:
    ours = {(0, 0): 0.5, (0, 1): 0.75, (1, 0): 1.0, (2, 0): 0.5}
    # Neither another pool's run nor another seed's is a partner.
    others = {(0, 0): 0.5, (0, 1): 0.25, (1, 0): 0.25, (1, 1): 0.1, (3, 0): 0.9}
    found = paired_difference(ours, others, by_pool=True)
    assert found is not None
    assert (found.mean, len(found.values)) == (0.5, 2)
    assert found.interval == t_interval([0.25, 0.75])


def test_seeds_of_a_pool_do_not_make_it_more_certain() -> None:
    """Two students of each pool, which mostly share its effect: 95 of 100 intervals are right."""
    random = np.random.default_rng(0)
    covered = []
    for pools, noise in zip(
        random.normal(size=(2000, 5)), 0.1 * random.normal(size=(2000, 5, 2)), strict=True
    ):
        runs = {(p, s): float(pools[p] + noise[p, s]) for p in range(5) for s in range(2)}
        low, high = t_interval(independent(runs, by_pool=True)) or (0, 0)
        narrow, wide = t_interval(independent(runs, by_pool=False)) or (0, 0)
        assert wide - narrow < high - low
        covered.append(low < 0 < high)
    assert statistics.mean(covered) == pytest.approx(0.95, abs=3 * math.sqrt(0.05 * 0.95 / 2000))


# Several differences.


def test_holms_adjustment_is_that_of_a_worked_example() -> None:
    # 4 × 0.005, 3 × 0.01, 2 × 0.03, and 0.04, which must not be less than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_an_adjusted_p_is_at_most_1_and_a_single_one_is_left_alone() -> None:
    assert holm([0.6, 0.5, 0.9]) == [1.0, 1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_of_true_hypotheses_one_in_twenty_tables_finds_a_difference() -> None:
    tables = np.random.default_rng(0).uniform(size=(2000, 13)).tolist()
    found = statistics.mean(min(holm(table)) < 0.05 for table in tables)
    assert found == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / 2000))


def test_the_interquartile_mean_is_that_of_the_middle_half() -> None:
    assert interquartile_mean([100.0, 1.0, 2.0, -50.0]) == 1.5
    assert interquartile_mean([3.0]) == 3.0


def test_a_bootstrap_draws_within_every_group() -> None:
    # Without spread inside the groups there is none between draws of them.
    low, high = bootstrap_interval([[0.0, 0.0], [1.0, 1.0]], interquartile_mean)
    assert low == high == 0.5


def test_a_bootstrap_interval_of_a_mean_is_nearly_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(size=400).tolist()
    low, high = bootstrap_interval([values], lambda drawn: spread(drawn).mean)
    half = 1.96 * spread(values).std / math.sqrt(400)
    assert low == pytest.approx(spread(values).mean - half, abs=0.02)
    assert high == pytest.approx(spread(values).mean + half, abs=0.02)
