"""What a method came to in a setting: one summary for terminal, CSV, Markdown, picture and page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from experiments.comparison.statistics import (
    CONFIDENCE,
    Difference,
    Seeds,
    Spread,
    holm,
    independent,
    paired_difference,
    spread,
    t_interval,
)
from experiments.running.result import RunResult

NOTHING = "–"

Results = Mapping[Seeds, RunResult]

POOLS, SEEDS = "pools", "seeds"


@dataclass(frozen=True)
class Summary:
    """What a method came to in a setting, over its finished runs. The metric is a share of 1.

    Numbers are over pools of teachers where there are several, each the mean of its runs, and over
    runs where there is one.

    Attributes:
        method: Label of the method.
        setting: Label of the setting.
        algo: Name of the algorithm behind the method; empty where there is none.
        metric: Name of what the method is judged by.
        varying: What the numbers are over, and n is the number of: pools or seeds.
        values: The metric at the end, of every pool or run.
        last: Mean and standard deviation of `values`.
        interval: 95 % t interval of their mean; see `t_interval`.
        best: The value of each run in its best epoch; see `RunResult`.
        baseline: Label of the method that it is compared with; empty without one.
        difference: Paired difference to the baseline; none for itself and without it.
        score: Agent score; none where teachers are not weighted.
        weights: Mean weight of every teacher.
        seconds: Seconds of a run.
        slowness: Seconds as a ratio to the baseline's with the same pools and seeds.
        paper: The published figure in %.
        adjusted_p: The difference's p after Holm's correction over all differences that are shown
            together.
    """

    method: str
    setting: str
    algo: str
    metric: str
    varying: str
    values: Sequence[float]
    last: Spread
    interval: tuple[float, float] | None
    best: Spread
    baseline: str
    difference: Difference | None
    score: Spread | None
    weights: Mapping[str, float]
    seconds: Spread
    slowness: float | None
    paper: Spread | None
    adjusted_p: float | None = None

    @property
    def is_certain(self) -> bool:
        """Whether the difference is other than zero, by Holm's correction."""
        return self.adjusted_p is not None and self.adjusted_p < 1 - CONFIDENCE


def summarize(
    groups: Mapping[tuple[str, str], Results],
    baselines: Mapping[str, str],
    paper: Mapping[tuple[str, str], Spread] = {},
) -> dict[tuple[str, str], Summary]:
    """What methods came to that are shown together; p is corrected for all their differences.

    Args:
        groups: Results by method and setting.
        baselines: By setting, the method that the others are compared with; may be missing.
        paper: Published figures in %, by method and setting.
    """
    pools = {pool for results in groups.values() for pool, _ in results}
    found = {
        pair: _summary(
            pair,
            results,
            groups.get((baselines.get(pair[1], ""), pair[1]), {}),
            POOLS if len(pools) > 1 else SEEDS,
            paper.get(pair),
        )
        for pair, results in groups.items()
    }
    known = {
        pair: s.difference.p
        for pair, s in found.items()
        if s.difference is not None and s.difference.p is not None
    }
    corrected = dict(zip(known, holm(list(known.values())), strict=True))
    return {pair: replace(s, adjusted_p=corrected.get(pair)) for pair, s in found.items()}


def _summary(
    labels: tuple[str, str],
    results: Results,
    baseline: Results,
    varying: str,
    paper: Spread | None,
) -> Summary:
    first = next(iter(results.values()))
    by_pool = varying == POOLS

    def over(value: Callable[[Any], float]) -> list[float]:
        return independent({seeds: value(each) for seeds, each in results.items()}, by_pool)

    values = over(lambda result: result.last)
    own, other = ({n: each.last for n, each in group.items()} for group in (results, baseline))
    weights: Mapping[str, float] = getattr(first, "weights", {})
    return Summary(
        *labels,
        algo=getattr(first, "algo", ""),
        metric=first.metric,
        varying=varying,
        values=values,
        last=spread(values),
        interval=t_interval(values),
        best=spread(over(lambda result: result.best)),
        baseline=next((result.method for result in baseline.values()), ""),
        difference=None if baseline == results else paired_difference(own, other, by_pool=by_pool),
        score=spread(over(lambda result: result.score)) if hasattr(first, "score") else None,
        weights={name: fmean(over(_weight_of(name))) for name in weights},
        seconds=spread(over(lambda result: result.seconds)),
        slowness=_slowness(results, baseline),
        paper=paper,
    )


def _weight_of(teacher: str) -> Callable[[Any], float]:
    return lambda result: float(result.weights[teacher])


def _slowness(results: Results, baseline: Results) -> float | None:
    common = results.keys() & baseline.keys()
    if not common:
        return None
    own, other = (sum(group[seeds].seconds for seeds in common) for group in (results, baseline))
    return own / other if other > 0 else None


# Texts.


def text_of(value: Spread, digits: int = 2, scale: float = 1) -> str:
    """Mean ± standard deviation."""
    std = "" if value.std is None else f" ± {scale * value.std:.{digits}f}"
    return f"{scale * value.mean:z.{digits}f}{std}"


def interval_text(interval: tuple[float, float] | None, form: str = "z.2f") -> str:
    """An interval of fractions in %; empty if there is none."""
    if interval is None:
        return ""
    low, high = interval
    return f"[{100 * low:{form}}, {100 * high:{form}}]"


def difference_text(summary: Summary) -> str:
    """The difference in points with its interval, and of how many pairs, if not of all runs."""
    if (difference := summary.difference) is None:
        return NOTHING
    text = f"{100 * difference.mean:+z.2f} {interval_text(difference.interval, '+z.2f')}".strip()
    n = len(difference.values)
    return text if n == len(summary.values) else f"{text} (n = {n})"


def p_text(p: float | None) -> str:
    """An adjusted p."""
    return NOTHING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
