"""What a method came to in a setting: one summary for terminal, CSV, Markdown, picture and page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.comparison.statistics import (
    Difference,
    Spread,
    paired_difference,
    spread,
    t_interval,
)
from experiments.running.result import RunResult

NOTHING = "–"

# By seed.
Results = Mapping[int, RunResult]


@dataclass(frozen=True)
class Summary:
    """What a method came to in a setting, over its finished seeds. The metric is a share of 1.

    Attributes:
        method: Label of the method.
        setting: Label of the setting.
        algo: Name of the algorithm behind the method; empty where there is none.
        metric: Name of what the method is judged by.
        values: The metric at the end, by seed.
        last: Mean and standard deviation of `values`.
        interval: 95 % t interval of their mean; see `t_interval`.
        best: The highest value of each run, chosen on the same images.
        difference: Paired difference to the baseline; none for itself and without it.
        score: Agent score; none where teachers are not weighted.
        weights: Mean weight of every teacher.
        seconds: Seconds of a run.
        slowness: Seconds as a ratio to the baseline's with the same seeds.
        paper: The published figure in %.
    """

    method: str
    setting: str
    algo: str
    metric: str
    values: Mapping[int, float]
    last: Spread
    interval: tuple[float, float] | None
    best: Spread
    difference: Difference | None
    score: Spread | None
    weights: Mapping[str, float]
    seconds: Spread
    slowness: float | None
    paper: Spread | None

    @property
    def is_ahead(self) -> bool | None:
        """Whether the method is ahead of the baseline, behind it (False), or neither (None)."""
        low, high = (self.difference and self.difference.interval) or (0, 0)
        return True if low > 0 else False if high < 0 else None


def summarize(
    labels: tuple[str, str], results: Results, baseline: Results, paper: Spread | None = None
) -> Summary:
    """What a method came to.

    Args:
        labels: Method and setting.
        results: Its results, by seed.
        baseline: Those of what it is compared with, which may be the same; empty for none.
        paper: The published figure in %.
    """
    first = next(iter(results.values()))
    values = _by_seed(results)
    numbers = list(values.values())
    weights: Mapping[str, float] = getattr(first, "weights", {})
    return Summary(
        *labels,
        algo=getattr(first, "algo", ""),
        metric=first.metric,
        values=values,
        last=spread(numbers),
        interval=t_interval(numbers),
        best=_spread(results, lambda result: result.best),
        difference=None if baseline == results else paired_difference(values, _by_seed(baseline)),
        score=_spread(results, lambda result: result.score) if hasattr(first, "score") else None,
        weights={name: _spread(results, _weight_of(name)).mean for name in weights},
        seconds=_spread(results, lambda result: result.seconds),
        slowness=_slowness(results, baseline),
        paper=paper,
    )


def _by_seed(results: Results) -> dict[int, float]:
    return {seed: results[seed].last for seed in sorted(results)}


def _spread(results: Results, value: Callable[[Any], float]) -> Spread:
    return spread([value(results[seed]) for seed in sorted(results)])


def _weight_of(teacher: str) -> Callable[[Any], float]:
    return lambda result: float(result.weights[teacher])


def _slowness(results: Results, baseline: Results) -> float | None:
    common = results.keys() & baseline.keys()
    if not common:
        return None
    own, other = (sum(group[seed].seconds for seed in common) for group in (results, baseline))
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


def difference_text(difference: Difference | None) -> str:
    """A difference in points with its interval."""
    if difference is None:
        return NOTHING
    return f"{100 * difference.mean:+z.2f} {interval_text(difference.interval, '+z.2f')}".strip()


def teachers_of(summaries: Sequence[Summary]) -> list[str]:
    """All teachers' names, each once."""
    return list(dict.fromkeys(name for summary in summaries for name in summary.weights))
