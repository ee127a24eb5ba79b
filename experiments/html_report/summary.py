"""What every method came to, with how sure that is; and its cost."""

from collections.abc import Mapping, Sequence
from itertools import chain, islice, pairwise

from matplotlib.figure import Figure

from experiments.comparison.summary import Summary, adjust, summarize, varying_of
from experiments.drawing import drawn
from experiments.html_report.naming import Group, baseline_of
from experiments.html_report.style import GUIDE_COLOUR, Palette

# Inches of the picture of cost, least share of its height between two labels.
COST_SIZE, LABEL_GAP = (8.4, 4.2), 0.055


def summarize_settings(settings: Mapping[str, Sequence[Group]]) -> dict[str, list[Summary]]:
    """A summary of every method of every setting."""
    summaries = {name: _summarize(groups) for name, groups in settings.items()}
    adjusted = iter(adjust(list(chain.from_iterable(summaries.values()))))
    return {name: list(islice(adjusted, len(found))) for name, found in summaries.items()}


def _summarize(groups: Sequence[Group]) -> list[Summary]:
    baseline = baseline_of(groups)
    varying = varying_of(run.result for group in groups for run in group.runs)
    other = {} if baseline is None else baseline.results
    return [
        summarize((group.method, group.setting), group.results, other, varying) for group in groups
    ]


# The picture.


def draw_cost(summaries: Sequence[Summary], palette: Palette) -> Figure:
    """Accuracy against seconds; bars are standard deviations over pools or seeds."""
    figure = Figure(figsize=COST_SIZE, layout="constrained")
    axes = figure.subplots()
    for summary in summaries:
        accuracy, seconds = summary.last, summary.seconds
        axes.errorbar(
            seconds.mean,
            100 * accuracy.mean,
            xerr=seconds.std,
            yerr=None if accuracy.std is None else 100 * accuracy.std,
            fmt="o",
            markersize=6,
            elinewidth=0.8,
            color=palette.methods[summary.method],
        )
    axes.set(xlabel="seconds of the student's training", ylabel="test accuracy [%]")
    axes.margins(0.05, 0.08)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    heights = [(100 * summary.last.mean - low) / (high - low) for summary in summaries]
    for summary, level in zip(summaries, spread_out(heights, LABEL_GAP), strict=True):
        axes.annotate(
            drawn(summary.method),
            (summary.seconds.mean, 100 * summary.last.mean),
            xytext=(1.03, level),
            textcoords="axes fraction",
            verticalalignment="center",
            color=palette.methods[summary.method],
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": GUIDE_COLOUR, "linewidth": 0.4},
        )
    return figure


def spread_out(levels: Sequence[float], gap: float) -> list[float]:
    """Levels in [0, 1] in the same order, moved as little as puts `gap` between any two.

    Where there is no room for all gaps, they are equal and as wide as there is room for.
    """
    gap = min(gap, 1 / max(len(levels) - 1, 1))
    order = sorted(range(len(levels)), key=lambda place: levels[place])
    found = list(levels)
    for lower, place in pairwise(order):
        found[place] = max(found[place], found[lower] + gap)
    ceiling = 1.0
    for place in reversed(order):
        found[place] = min(found[place], ceiling)
        ceiling = found[place] - gap
    return found
