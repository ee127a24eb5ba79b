"""What every method came to, with how sure that is; and its cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.figure import Figure

from experiments.comparison.statistics import (
    Difference,
    Spread,
    paired_difference,
    spread,
    t_interval,
)
from experiments.drawing import drawn
from experiments.experiment import Result
from experiments.html_report.naming import Group, baseline_of
from experiments.html_report.style import GUIDE_COLOUR, Palette

NOTHING = "–"

# Inches of the picture of cost, least share of its height between two labels.
COST_SIZE, LABEL_GAP = (8.4, 4.2), 0.055


@dataclass(frozen=True)
class Summary:
    """What a method came to in a setting. Accuracies are fractions.

    Attributes:
        group: Its runs.
        accuracy: Accuracy after the last epoch.
        interval: 95 % t interval of its mean; see `t_interval`.
        difference: Paired difference to the baseline; none for itself and without common seeds.
        score: Agent score of the last epoch.
        seconds: Seconds of the student's training.
    """

    group: Group
    accuracy: Spread
    interval: tuple[float, float] | None
    difference: Difference | None
    score: Spread
    seconds: Spread

    @property
    def is_ahead(self) -> bool | None:
        """Whether the method is ahead of the baseline, behind it (False), or neither (None)."""
        low, high = (self.difference and self.difference.interval) or (0, 0)
        return True if low > 0 else False if high < 0 else None


def summarize(groups: Sequence[Group]) -> list[Summary]:
    """A summary of every method of a setting."""
    baseline = baseline_of(groups)
    return [_summarize(group, baseline) for group in groups]


def _summarize(group: Group, baseline: Group | None) -> Summary:
    accuracies = _accuracies(group)
    values = list(accuracies.values())
    other = {} if baseline is None or group is baseline else _accuracies(baseline)
    return Summary(
        group=group,
        accuracy=spread(values),
        interval=t_interval(values),
        difference=paired_difference(accuracies, other),
        score=_spread(group, lambda result: result.score),
        seconds=_spread(group, lambda result: result.seconds),
    )


def _accuracies(group: Group) -> dict[int, float]:
    return {seed: run.result.last for seed, run in group.by_seed.items()}


def _spread(group: Group, value: Callable[[Result], float]) -> Spread:
    return spread([value(run.result) for run in group.runs])


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


# The picture.


def draw_cost(summaries: Sequence[Summary], palette: Palette) -> Figure:
    """Accuracy against seconds; bars are standard deviations over seeds."""
    figure = Figure(figsize=COST_SIZE, layout="constrained")
    axes = figure.subplots()
    for summary in summaries:
        accuracy, seconds = summary.accuracy, summary.seconds
        axes.errorbar(
            seconds.mean,
            100 * accuracy.mean,
            xerr=seconds.std,
            yerr=None if accuracy.std is None else 100 * accuracy.std,
            fmt="o",
            markersize=6,
            elinewidth=0.8,
            color=palette.methods[summary.group.method],
        )
    axes.set(xlabel="seconds of the student's training", ylabel="test accuracy [%]")
    axes.margins(0.05, 0.08)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    heights = [(100 * summary.accuracy.mean - low) / (high - low) for summary in summaries]
    for summary, level in zip(summaries, spread_out(heights, LABEL_GAP), strict=True):
        axes.annotate(
            drawn(summary.group.method),
            (summary.seconds.mean, 100 * summary.accuracy.mean),
            xytext=(1.03, level),
            textcoords="axes fraction",
            verticalalignment="center",
            color=palette.methods[summary.group.method],
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
