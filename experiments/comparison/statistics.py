"""What several seeds say together: mean and spread, and the paired difference of two methods."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap, trim_mean

CONFIDENCE = 0.95
RESAMPLES = 9999


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
    """How far one method is ahead of another on the seeds that both were run with.

    Attributes:
        mean: Mean of the differences, seed by seed.
        interval: Bootstrap interval of the mean; none from a single seed.
        n: Number of the seeds.
    """

    mean: float
    interval: tuple[float, float] | None
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation (ddof = 1)."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None)
    return Spread(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)))


def interquartile_mean(values: Any, axis: int = -1) -> Any:
    """Mean of what is left without the lowest and the highest quarter (IQM).

    The quarters are rounded down: fewer than four numbers are all kept.
    """
    return trim_mean(values, 0.25, axis=axis)


def bootstrap_interval(
    values: Sequence[float], statistic: Callable[..., Any] = np.mean
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean; none of a single number.

    From three to five values it is too narrow: it never leaves their range, and covers the true
    mean far less often than its name says. The same values always give the same interval.

    Args:
        values: The numbers.
        statistic: What the interval is of, instead of the mean; takes an array and an `axis`.
    """
    if len(values) < 2:
        return None
    if min(values) == max(values):
        return values[0], values[0]
    found = bootstrap(
        (np.asarray(values),),
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> Difference | None:
    """The mean of `values − baseline` over their common seeds, which share start and data order.

    Args:
        values: One number a seed.
        baseline: The other method's, likewise.

    Returns:
        Mean and 95 % bootstrap interval (see `bootstrap_interval` for what it is worth with few
        seeds), or none without a common seed.
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if not differences:
        return None
    mean = spread(differences).mean
    return Difference(mean, bootstrap_interval(differences), len(differences))
