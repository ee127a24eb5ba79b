"""One score over all settings: 0 is the baseline, 1 the ceiling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.comparison.plan import Comparison
from experiments.comparison.statistics import (
    Seeds,
    bootstrap_interval,
    independent,
    interquartile_mean,
    spread,
)
from experiments.running.result import RunResult

# Of the metric: where ceiling and baseline are nearer, noise would be divided by next to nothing.
LEAST_GAP = 0.005

NOTE = (
    "Normalised score: {baseline} is 0 and {ceiling} 1 in the mean of each setting; interquartile "
    "mean over all settings and draws, and its 95 % stratified bootstrap interval (Agarwal et al., "
    "2021)."
)

# Metric by pair of seeds, by method and setting.
Values = Mapping[tuple[str, str], Mapping[Seeds, float]]


@dataclass(frozen=True)
class NormalisedScore:
    """What a method came to over all settings.

    Attributes:
        method: Its label.
        score: Interquartile mean of its normalised scores.
        interval: 95 % interval of that.
        settings: The settings that count, with the number of scores in each.
    """

    method: str
    score: float
    interval: tuple[float, float]
    settings: Mapping[str, int]


def normalised_scores(
    comparison: Comparison, finished: Sequence[RunResult]
) -> list[NormalisedScore]:
    """A score of every method with finished runs, best first; none without a ceiling.

    Settings in which the ceiling is not `LEAST_GAP` above the baseline do not count: there is
    nothing to win.
    """
    values: dict[tuple[str, str], dict[Seeds, float]] = {}
    for result in finished:
        values.setdefault((result.method, result.setting), {})[result.seeds] = result.last
    gaps = _gaps(comparison, values)
    found = []
    for method in comparison.methods:
        groups = {
            setting: _differences(values, (method, setting), (str(comparison.baseline), setting))
            for setting in gaps
        }
        scores = {s: [d / gaps[s] for d in own] for s, own in groups.items() if own}
        if scores:
            every = [score for own in scores.values() for score in own]
            interval = bootstrap_interval([*scores.values()], interquartile_mean)
            counts = {setting: len(own) for setting, own in scores.items()}
            found.append(NormalisedScore(method, interquartile_mean(every), interval, counts))
    return sorted(found, key=lambda one: one.score, reverse=True)


def _gaps(comparison: Comparison, values: Values) -> dict[str, float]:
    if comparison.baseline is None or comparison.ceiling is None:
        return {}
    pairs = {
        setting: _differences(values, (comparison.ceiling, setting), (comparison.baseline, setting))
        for setting in comparison.settings
    }
    gaps = {setting: spread(own).mean for setting, own in pairs.items() if own}
    return {setting: gap for setting, gap in gaps.items() if gap >= LEAST_GAP}


def _differences(values: Values, method: tuple[str, str], baseline: tuple[str, str]) -> list[float]:
    """Differences of what was drawn independently of each other."""
    own, other = values.get(method, {}), values.get(baseline, {})
    common = {seeds: own[seeds] - other[seeds] for seeds in own if seeds in other}
    return independent(common, by_pool=len({pool for pool, _ in common}) > 1)


def score_lines(comparison: Comparison, finished: Sequence[RunResult]) -> list[list[str]]:
    """The table: a heading and a row for each method; empty without a ceiling."""
    scores = normalised_scores(comparison, finished)
    if not scores:
        return []
    rows = [["method", "normalised score", "95 % interval", "settings", "n"]]
    return rows + [
        [
            one.method,
            f"{one.score:z.2f}",
            f"[{one.interval[0]:z.2f}, {one.interval[1]:z.2f}]",
            str(len(one.settings)),
            str(sum(one.settings.values())),
        ]
        for one in scores
    ]
