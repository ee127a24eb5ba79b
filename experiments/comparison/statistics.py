"""What several runs say together: mean and spread, paired differences, and how sure they are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from scipy.stats import trim_mean, ttest_1samp

CONFIDENCE = 0.95

# How often a bootstrap draws all groups anew, with replacement.
DRAWS = 2000

# Of a run: the seed of its pool of teachers, and its own.
Seeds = tuple[int, int]

# Standard deviation of shares below which they differ by rounding alone.
EQUAL = 1e-9


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a few numbers.

    Attributes:
        mean: Their mean.
        std: Their standard deviation, with n − 1 in the denominator; none of a single number.
    """

    mean: float
    std: float | None


@dataclass(frozen=True)
class Difference:
    """How far one method is ahead of another on the pools and seeds that both were run with.

    Attributes:
        values: The independent differences: of pools, or of the seeds of a single pool.
        mean: Their mean.
        interval: 95 % t interval of the mean; see `t_interval`.
        p: Two-sided p of the t test of no difference, below 0.05 where the interval excludes zero;
            none without an interval.
    """

    values: Sequence[float]
    mean: float
    interval: tuple[float, float] | None
    p: float | None


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation (ddof = 1)."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % t interval of the mean, of normally distributed values.

    With three to five values a percentile bootstrap is no substitute: it never leaves their range,
    and covers the true mean in 75 % (n = 3) to 85 % (n = 5) of all cases.

    Returns:
        The interval; none of a single number, nor of equal ones, which leave their spread unknown
        (few test images make that likely).
    """
    return _t_test(values)[0]


def _t_test(values: Sequence[float]) -> tuple[tuple[float, float] | None, float | None]:
    """The interval, and p of the test that the mean is zero."""
    # Differences of rounded shares are not spread.
    if len(values) == 1 or stdev(values) < EQUAL:
        return None, None
    test = ttest_1samp(values, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return (float(interval.low), float(interval.high)), float(test.pvalue)


def independent(values: Mapping[Seeds, float], by_pool: bool) -> list[float]:
    """What was drawn independently of each other, in the order of the seeds.

    Runs with the same pool are alike, as its teachers are: of several pools, each counts once.

    Args:
        values: One number a run.
        by_pool: Whether there are several pools.

    Returns:
        The mean over the runs of each pool, or, of a single pool, all values.
    """
    pools: dict[int | Seeds, list[float]] = {}
    for seeds in sorted(values):
        pools.setdefault(seeds[0] if by_pool else seeds, []).append(values[seeds])
    return [spread(own).mean for own in pools.values()]


def paired_difference(
    values: Mapping[Seeds, float], baseline: Mapping[Seeds, float], *, by_pool: bool = False
) -> Difference | None:
    """The mean of `values − baseline` over runs with the same teachers, start and data order.

    Args:
        values: One number a run.
        baseline: The other method's, likewise.
        by_pool: Whether there are several pools.

    Returns:
        Mean, 95 % t interval and p, or none without a common pool and seed.
    """
    common = {seeds: values[seeds] - baseline[seeds] for seeds in values if seeds in baseline}
    differences = independent(common, by_pool)
    if not differences:
        return None
    return Difference(differences, fmean(differences), *_t_test(differences))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p for having looked at several differences (Holm, Scand. J. Statist. 6, 1979).

    Whatever is true, the probability that any true hypothesis gets less than 0.05 is at most 0.05.

    Returns:
        The adjusted p, in the order of what was given.
    """
    adjusted, highest = list(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def interquartile_mean(values: Sequence[float]) -> float:
    """Mean of the middle half (Agarwal et al., NeurIPS 2021): few outliers cannot move it."""
    return float(trim_mean(values, 0.25))


def bootstrap_interval(
    groups: Sequence[Sequence[float]], statistic: Callable[[Sequence[float]], float]
) -> tuple[float, float]:
    """95 % percentile interval of a statistic of several groups, each drawn from by itself.

    Args:
        groups: What was drawn independently, by task.
        statistic: Of all values together.
    """
    random = np.random.default_rng(0)
    found = [
        statistic([value for own in groups for value in random.choice(own, len(own))])
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
