"""What changes over the epochs, with the spread over runs, named as in TensorBoard; and cost."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from experiments.comparison.statistics import spread
from experiments.comparison.summary import Summary
from experiments.drawing import drawn
from experiments.html_report.naming import Group
from experiments.html_report.runs import FinishedRun
from experiments.html_report.style import (
    GUIDE_COLOUR,
    PLOT_WIDTH,
    Palette,
    label_ends,
    plot_height,
)
from experiments.metrics import HEADS
from mtkd_env.action import PARTS

# Inches of the page, of a panel's largest width and of its height; panels beside each other.
PAGE_WIDTH, PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 11.8, 4.4, 1.95, 4

LINES = {"logit": "-", "feature": "--"}
PART_COLOURS = dict(zip(PARTS, ("#0077bb", "#ee7733", "#009988"), strict=True))

# Share of the training that the range of accuracies is taken from: what comes before is far below.
SETTLED = 0.25

Value = Callable[[Mapping[str, Any]], float | None]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Mean and standard deviation, 0 of a single seed, over the seeds that came so far."""

    epochs: Array
    mean: Array
    std: Array


def series(runs: Sequence[FinishedRun], value: Value) -> Series:
    """A number of every row of some runs; rows that lack it are left out."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for row in run.rows:
            number = value(row)
            if number is not None:
                found.setdefault(row["epoch"], []).append(number)
    spreads = [spread(found[epoch]) for epoch in sorted(found)]
    return Series(
        epochs=np.array(sorted(found), dtype=float),
        mean=np.array([each.mean for each in spreads]),
        std=np.array([each.std or 0.0 for each in spreads]),
    )


def entry(name: str, scale: float = 1) -> Value:
    """Reads one number of a row."""
    return lambda row: scale * row[name] if name in row else None


EPOCH = entry("epoch")


def panels(count: int, height: float = PANEL_HEIGHT) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels that share their axes."""
    rows = math.ceil(count / COLUMNS)
    columns = math.ceil(count / rows)
    size = (min(PAGE_WIDTH, PANEL_WIDTH * columns), height * rows + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    for lowest in axes[count - columns : count]:
        lowest.tick_params(labelbottom=True)
    return figure, axes[:count]


def _draw_band(axes: Axes, at: Array, found: Series, colour: str, line: str = "-") -> None:
    # A single epoch is a point.
    mark = "o" if len(at) == 1 else None
    axes.plot(at, found.mean, line, color=colour, marker=mark, markersize=3)
    low, high = found.mean - found.std, found.mean + found.std
    axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


# One number of the student or the agent: all methods in one plot.


def draw_lines(
    groups: Sequence[Group], palette: Palette, x: Value, y: Value, labels: tuple[str, str]
) -> Figure:
    """All methods in one plot, mean and standard deviation over runs, each with its name."""
    figure = Figure(figsize=(PLOT_WIDTH, plot_height(len(groups))), layout="constrained")
    axes = figure.subplots()
    curves = [(group, series(group.runs, x), series(group.runs, y)) for group in groups]
    for group, at, found in curves:
        _draw_band(axes, at.mean, found, palette.methods[group.method])
    limits = settled_range([found for _, _, found in curves])
    axes.set(xlabel=labels[0], ylabel=labels[1], ylim=limits)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ends = [(at.mean[-1], found.mean[-1], group.method) for group, at, found in curves]
    label_ends(axes, ends, palette)
    return figure


def draw_result(groups: Sequence[Group], palette: Palette) -> Figure:
    """The metric over the epochs; what lies far below, as before anything is learnt, is cut off."""
    name = groups[0].runs[0].curve
    return draw_lines(groups, palette, EPOCH, entry(name, 100), ("epoch", f"{name} [%]"))


def draw_by_updates(groups: Sequence[Group], palette: Palette) -> Figure:
    """Agent score against the updates of the policy."""
    labels = "agent/updates", "score"
    figure = draw_lines(groups, palette, _if_updated("agent/updates"), _if_updated("score"), labels)
    axes = figure.axes[0]
    axes.set_xscale("log")
    # The page's texts are no formulas, as powers of ten would be.
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


def _if_updated(name: str) -> Value:
    """A number of epochs by whose end the policy had been updated."""
    return lambda row: row[name] if row.get("agent/updates", 0) > 0 else None


def learns_in_updates(group: Group) -> bool:
    """Whether it was counted how often the policy was updated, and it ever was."""
    return any(row.get("agent/updates", 0) > 0 for run in group.runs for row in run.rows)


def ending(groups: Sequence[Group], name: Callable[[Group], str], scale: float = 1) -> str:
    """What a number comes to at the end, for those who cannot see its curve."""
    ends = [(group, series(group.runs, entry(name(group), scale)).mean) for group in groups]
    return ", ".join(f"{group.method} {mean[-1]:.4g}" for group, mean in ends if len(mean))


def settled_range(curves: Sequence[Series]) -> tuple[float, float]:
    """The range of curves after their first quarter, but for their lowest twentieth; a margin.

    The last epochs are always within it.
    """
    late = [curve.mean[int(SETTLED * len(curve.mean)) :] for curve in curves if len(curve.mean)]
    if not late:
        return 0, 100
    last = min(values[-1] for values in late)
    together = np.concatenate(late)
    low, high = min(float(np.quantile(together, 0.05)), last), float(together.max())
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


# Weights.


def is_uniform(group: Group) -> bool:
    """Whether all teachers count the same in all epochs."""
    names = [f"weights/{head}/{teacher}" for head in HEADS for teacher in group.teachers]
    shares = [row[name] for run in group.runs for row in run.rows for name in names if name in row]
    return all(abs(share - 1 / len(group.teachers)) < 1e-3 for share in shares)


def draw_weights(groups: Sequence[Group], palette: Palette) -> Figure:
    """A panel for every method: the mean weight of each teacher of the first pool, per head."""
    pools = [group.one_pool for group in groups]
    colours = [{name: palette.teachers[name] for name in group.teachers} for group in pools]
    figure, axes = _draw_by_head(pools, "weights", colours)
    for group, panel in zip(pools, axes, strict=True):
        panel.axhline(1 / len(group.teachers), color=GUIDE_COLOUR, linestyle=":", linewidth=1)
    # A band may reach beyond what a weight can be.
    axes[0].set_ylim(0, min(axes[0].get_ylim()[1], 1.03))
    return figure


def _draw_by_head(
    groups: Sequence[Group], kind: str, colours: Sequence[Mapping[str, str]]
) -> tuple[Figure, list[Axes]]:
    """A panel for every method, with the numbers of a kind that have a colour, per head."""
    figure, axes = panels(len(groups))
    for group, own, panel in zip(groups, colours, axes, strict=True):
        for name, colour in own.items():
            for head, line in LINES.items():
                found = series(group.runs, entry(f"{kind}/{head}/{name}"))
                _draw_band(panel, found.epochs, found, colour, line)
        panel.set_title(drawn(group.method))
    figure.supxlabel("epoch", fontsize=8.5)
    figure.supylabel(", ".join(f"{kind}/{head}" for head in LINES), fontsize=8.5)
    axes[0].xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return figure, axes


# Coefficients of the fusion.


def learns_fusion(group: Group) -> bool:
    """Whether the coefficients of the fusion change, in any of the runs."""
    names = [f"fusion/{head}/{part}" for head in HEADS for part in PARTS]
    return any(
        len({row[name] for row in run.rows if name in row}) > 1
        for run in group.runs
        for name in names
    )


def draw_fusion(groups: Sequence[Group], palette: Palette) -> Figure:
    """A panel for every method: the coefficients γ of the fusion, per head."""
    del palette
    return _draw_by_head(groups, "fusion", [PART_COLOURS] * len(groups))[0]


# Cost.


def draw_cost(summaries: Sequence[Summary], palette: Palette) -> Figure:
    """Result against seconds; bars are standard deviations over pools or seeds."""
    figure = Figure(figsize=(PLOT_WIDTH, plot_height(len(summaries))), layout="constrained")
    axes = figure.subplots()
    for summary in summaries:
        reached, seconds = summary.last, summary.seconds
        axes.errorbar(
            seconds.mean,
            100 * reached.mean,
            xerr=seconds.std,
            yerr=None if reached.std is None else 100 * reached.std,
            fmt="o",
            markersize=6,
            elinewidth=0.8,
            color=palette.methods[summary.method],
        )
    axes.set(xlabel="seconds of the training", ylabel=f"{summaries[0].metric} [%]")
    axes.margins(0.05, 0.08)
    ends = [(s.seconds.mean, 100 * s.last.mean, s.method) for s in summaries]
    label_ends(axes, ends, palette)
    return figure
