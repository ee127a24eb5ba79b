"""One score over all settings: 0 is the baseline, 1 the ceiling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.comparison.plan import Comparison
from experiments.comparison.statistics import bootstrap_interval, interquartile_mean
from experiments.comparison.summary import Summary

# Of the metric: where ceiling and baseline are nearer, noise would be divided by next to nothing.
LEAST_GAP = 0.005

NOTE = (
    "Normalised score: {baseline} is 0 and {ceiling} 1 in the mean of each setting; interquartile "
    "mean over all settings and draws, and its 95 % stratified bootstrap interval (Agarwal et al., "
    "2021)."
)


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
    comparison: Comparison, summaries: Sequence[Summary]
) -> list[NormalisedScore]:
    """A score of every method with finished runs, best first; none without a ceiling.

    Settings in which the ceiling is not `LEAST_GAP` above the baseline do not count: there is
    nothing to win.
    """
    gaps = {
        s.setting: s.difference.mean
        for s in summaries
        if s.method == comparison.ceiling and s.difference and s.difference.mean >= LEAST_GAP
    }
    found = []
    for method in comparison.methods:
        scores = {
            s.setting: [value / gaps[s.setting] for value in _ahead(s)]
            for s in summaries
            if s.method == method and s.setting in gaps and _ahead(s)
        }
        if scores:
            every = [score for own in scores.values() for score in own]
            interval = bootstrap_interval([*scores.values()], interquartile_mean)
            counts = {setting: len(own) for setting, own in scores.items()}
            found.append(NormalisedScore(method, interquartile_mean(every), interval, counts))
    return sorted(found, key=lambda one: one.score, reverse=True)


def _ahead(summary: Summary) -> Sequence[float]:
    """The differences to the baseline; its own are zero."""
    if summary.method == summary.baseline:
        return [0.0] * len(summary.values)
    return summary.difference.values if summary.difference else []


def score_lines(comparison: Comparison, summaries: Sequence[Summary]) -> list[list[str]]:
    """The table: a heading and a row for each method; empty without a ceiling."""
    rows = [
        [
            one.method,
            f"{one.score:z.2f}",
            f"[{one.interval[0]:z.2f}, {one.interval[1]:z.2f}]",
            str(len(one.settings)),
            str(sum(one.settings.values())),
        ]
        for one in normalised_scores(comparison, summaries)
    ]
    headings = ["method", "normalised score", "95 % interval", "settings", "n"]
    return [headings, *rows] if rows else []
