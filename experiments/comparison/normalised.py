"""One score over all settings: 0 is the baseline, 1 the ceiling."""

from collections.abc import Sequence

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


def score_lines(comparison: Comparison, summaries: Sequence[Summary]) -> list[list[str]]:
    """The table: a heading and a row for each method, best first; empty without a ceiling.

    Settings in which the ceiling is not `LEAST_GAP` above the baseline do not count: there is
    nothing to win.
    """
    gaps = {
        s.setting: s.difference.mean
        for s in summaries
        if s.method == comparison.ceiling and s.difference and s.difference.mean >= LEAST_GAP
    }
    scored: list[tuple[float, list[str]]] = []
    for method in comparison.methods:
        groups = [
            [value / gaps[s.setting] for value in _ahead(s)]
            for s in summaries
            if s.method == method and s.setting in gaps and _ahead(s)
        ]
        if groups:
            every = [score for own in groups for score in own]
            low, high = bootstrap_interval(groups, interquartile_mean)
            score, interval = interquartile_mean(every), f"[{low:z.2f}, {high:z.2f}]"
            counts = str(len(groups)), str(len(every))
            scored.append((score, [method, f"{score:z.2f}", interval, *counts]))
    rows = [row for _, row in sorted(scored, key=lambda one: one[0], reverse=True)]
    headings = ["method", "normalised score", "95 % interval", "settings", "n"]
    return [headings, *rows] if rows else []


def _ahead(summary: Summary) -> Sequence[float]:
    """The differences to the baseline; its own are zero."""
    if summary.method == summary.baseline:
        return [0.0] * len(summary.values)
    return summary.difference.values if summary.difference else []
