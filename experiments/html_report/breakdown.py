"""Mean weights by class, and by whether the teacher is right."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.classes import ClassTable, class_table, draw_classes
from experiments.drawing import drawn
from experiments.html_report.curves import is_uniform, panels
from experiments.html_report.naming import Group
from experiments.html_report.style import GUIDE_COLOUR, Palette
from experiments.html_report.table import PageTable, number
from experiments.metrics import HEADS

Array = NDArray[np.float64]

# Inches of a teacher and of what stands around them.
TEACHER_HEIGHT, FRAME = 0.24, 0.75

# Symbols of a teacher that is right and of one that is wrong, per head.
SYMBOLS = {"logit": ("o", "●", "○"), "feature": ("s", "■", "□")}


def has_breakdown(group: Group) -> bool:
    """Whether any of the runs has recorded what its mean weights are made of."""
    return any(run.breakdown is not None for run in group.runs)


def tells_right(group: Group) -> bool:
    """Whether any of the runs has recorded weights of labelled images: who is right of others?"""
    return has_breakdown(group) and any(pooled(group, "class")[1])


def pooled(group: Group, kind: str) -> tuple[Array, Array]:
    """Mean weights of the last epoch over all samples of all seeds that have recorded them.

    Args:
        group: The runs.
        kind: `class`, or `right` or `wrong` for the samples that a teacher has so.

    Returns:
        Weights by head (2, M), or (2, C, M) of `class`, NaN where there is no sample; and the
        numbers of samples (M) or (C).
    """
    parts = [run.breakdown[kind] for run in group.runs if run.breakdown is not None]
    counts = np.array([part["count"] for part in parts], dtype=float)
    # None becomes NaN; it counts nothing.
    means = np.array([[part[head] for head in HEADS] for part in parts], dtype=float)
    shape = (len(parts), 1, counts.shape[1]) + (1,) * (means.ndim - 3)
    share = counts.reshape(shape)
    total = share.sum(0)
    with np.errstate(invalid="ignore"):
        return np.where(share > 0, means * share, 0).sum(0) / total, counts.sum(0)


# By class.


def classes_of(groups: Sequence[Group]) -> ClassTable:
    """Who knows which class, and whom each method asks, with the first pool of teachers."""
    pools = [group.one_pool for group in groups if has_breakdown(group.one_pool)]
    lines = {
        group.method: [run.breakdown for run in group.runs if run.breakdown] for group in pools
    }
    weighted = [group for group in pools if not is_uniform(group)]
    return class_table(lines, {g.method: pooled(g, "class")[0] for g in weighted})


def knows_classes(group: Group) -> bool:
    """Whether its runs have recorded who was asked, or who knows what."""
    lines = [run.breakdown for run in group.one_pool.runs if run.breakdown]
    return any("accuracy" in line for line in lines) or bool(lines and not is_uniform(group))


def draw_by_class(groups: Sequence[Group], palette: Palette) -> Figure:
    """The picture of `classes_of`."""
    del palette
    table = classes_of(groups)
    figure = Figure(figsize=table.size, layout="constrained")
    draw_classes(figure, table)
    return figure


# By correctness.


def draw_by_correctness(groups: Sequence[Group], palette: Palette) -> Figure:
    """A panel for every method: the weights of each teacher where it is right and wrong."""
    count = max(len(group.teachers) for group in groups)
    figure, axes = panels(len(groups), TEACHER_HEIGHT * count + FRAME)
    for group, panel in zip(groups, axes, strict=True):
        _draw_correctness(panel, group, palette)
    axes[0].set_ylim(count - 0.5, -0.5)
    axes[0].set_xlim(left=0)
    figure.supxlabel("mean weight", fontsize=8.5)
    return figure


def _draw_correctness(axes: Axes, group: Group, palette: Palette) -> None:
    right, wrong = (pooled(group, kind)[0] for kind in ("right", "wrong"))
    for place, teacher in enumerate(group.teachers):
        colour = palette.teachers[teacher]
        for head, (symbol, _, _) in SYMBOLS.items():
            row = HEADS.index(head)
            level = place + (row - 0.5) * 0.4
            ends = right[row, place], wrong[row, place]
            axes.plot(ends, [level, level], "-", color=colour, linewidth=0.8)
            axes.plot(ends[0], level, symbol, color=colour, markersize=4.5)
            axes.plot(ends[1], level, symbol, color=colour, markersize=4.5, fillstyle="none")
    axes.axvline(1 / len(group.teachers), color=GUIDE_COLOUR, linestyle=":", linewidth=1)
    axes.set_title(drawn(group.method))
    axes.tick_params(labelleft=False, left=False)
    axes.grid(visible=False, axis="y")


def correctness_table(groups: Sequence[Group]) -> PageTable:
    """The numbers of `draw_by_correctness`."""
    kinds = [f"{head} weight, {kind}" for head in HEADS for kind in ("right", "wrong")]
    rows: list[list[str]] = []
    for group in filter(tells_right, groups):
        (right, rights), (wrong, wrongs) = (pooled(group, kind) for kind in ("right", "wrong"))
        shares = rights / (rights + wrongs)
        weights = np.stack([right, wrong], axis=1)
        for place, teacher in enumerate(group.teachers):
            counts = [f"{100 * shares[place]:.1f} %", str(int(wrongs[place]))]
            own = [number(weight) for weight in weights[..., place].flat]
            rows.append([group.method, teacher, *counts, *own])
    return PageTable(["method", "teacher", "images right", "images wrong", *kinds], rows)
