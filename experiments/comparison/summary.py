"""What a method came to in a setting: one summary for terminal, CSV, Markdown, picture and page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.comparison.statistics import (
    CONFIDENCE,
    Difference,
    Spread,
    holm,
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
        adjusted_p: The difference's p after Holm's correction over all differences that are shown
            together; see `adjust`.
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
    adjusted_p: float | None = None

    @property
    def is_certain(self) -> bool:
        """Whether the difference is other than zero, by Holm's correction."""
        return self.adjusted_p is not None and self.adjusted_p < 1 - CONFIDENCE


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


def adjust(summaries: Sequence[Summary]) -> list[Summary]:
    """Corrects p for the number of differences among summaries that are shown together."""
    p_values = [None if s.difference is None else s.difference.p for s in summaries]
    corrected = iter(holm([p for p in p_values if p is not None]))
    return [
        summary if p is None else replace(summary, adjusted_p=next(corrected))
        for summary, p in zip(summaries, p_values, strict=True)
    ]


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
    return text if difference.n == len(summary.values) else f"{text} (n = {difference.n})"


def p_text(p: float | None) -> str:
    """An adjusted p."""
    return NOTHING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def teachers_of(summaries: Sequence[Summary]) -> list[str]:
    """All teachers' names, each once."""
    return list(dict.fromkeys(name for summary in summaries for name in summary.weights))
