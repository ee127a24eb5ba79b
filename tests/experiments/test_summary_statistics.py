import math
import statistics

import numpy as np
import pytest
from scipy.stats import bootstrap

from experiments.comparison.statistics import (
    Difference,
    Spread,
    bootstrap_interval,
    paired_difference,
    spread,
)


def test_spread_has_one_less_than_n_in_the_denominator() -> None:
    assert spread([1.0, 2.0, 6.0]) == Spread(3.0, math.sqrt((4 + 1 + 9) / 2))
    values = [0.1, 0.7, 0.35, 0.2]
    found = spread(values)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.std == pytest.approx(statistics.stdev(values))


def test_a_single_number_has_no_spread_and_no_interval() -> None:
    assert spread([0.5]) == Spread(0.5, None)
    assert bootstrap_interval([0.5]) is None


def test_an_interval_is_scipys_percentile_bootstrap_of_the_mean() -> None:
    values = [0.3, -0.1, 0.4, 0.2, 0.25]
    expected = bootstrap(
        (values,), np.mean, method="percentile", random_state=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap_interval(values) == (expected.low, expected.high)


def test_an_interval_is_the_same_every_time_and_stays_within_the_values() -> None:
    values = [0.0, 1.0, 5.0]
    low, high = bootstrap_interval(values) or (math.nan, math.nan)
    assert bootstrap_interval(values) == (low, high)
    # Each end is drawn with probability 1/27, which is more than 2.5 %.
    assert (low, high) == (0.0, 5.0)


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert bootstrap_interval([0.1, 0.1, 0.1]) == (0.1, 0.1)


def test_differences_are_taken_seed_by_seed() -> None:
    found = paired_difference({0: 0.5, 1: 0.75, 7: 0.9}, {1: 0.5, 0: 0.5, 3: 0.1})
    assert found == Difference(0.125, (0.0, 0.25), 2)


def test_a_difference_that_is_the_same_for_all_seeds_is_certain() -> None:
    found = paired_difference({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5})
    assert found == Difference(0.25, (0.25, 0.25), 2)


def test_one_common_seed_gives_a_difference_without_an_interval() -> None:
    assert paired_difference({0: 0.5, 1: 1.0}, {0: 0.25}) == Difference(0.25, None, 1)


def test_without_a_common_seed_there_is_no_difference() -> None:
    assert paired_difference({0: 0.5}, {1: 0.25}) is None
    assert paired_difference({0: 0.5}, {}) is None
