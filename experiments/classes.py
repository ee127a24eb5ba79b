"""Who knows which class, and who was asked about it: a table of a run's end, and its picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.drawing import drawn, picture
from experiments.metrics import HEADS

Array = NDArray[np.float64]

# Inches of a class, of a column and of what stands around them; no panel is higher than HIGHEST.
CLASS_HEIGHT, COLUMN_WIDTH, FRAME, HIGHEST = 0.2, 0.34, 1.0, 6.0

# Letters of a title above a column.
LETTERS = 5

# Most classes whose names and numbers have room.
MOST_NAMES, MOST_NUMBERS = 40, 30


@dataclass(frozen=True)
class ClassTable:
    """Shares of 1 by class, NaN where there is no image of it.

    Attributes:
        names: Names of the classes (C).
        teachers: Each teacher's accuracy on the test images (C,); empty if it is not known.
        students: That of each method's student, likewise.
        weights: Mean weight (C,) of each teacher over the labelled training images of the last
            epoch and both heads, of each method.
    """

    names: Sequence[str]
    teachers: Mapping[str, Array]
    students: Mapping[str, Array]
    weights: Mapping[str, Mapping[str, Array]]

    @property
    def size(self) -> tuple[float, float]:
        """Inches of the picture."""
        columns = [*self.teachers, *self.students]
        panels = bool(columns) + len(self.weights)
        columns += [name for each in self.weights.values() for name in each]
        names = 0.075 * max(len(drawn(name)) for name in columns)
        height = min(CLASS_HEIGHT * len(self.names), HIGHEST) + FRAME + names
        return FRAME + COLUMN_WIDTH * len(columns) + 0.3 * panels, height

    @property
    def asked(self) -> str:
        """Which teacher has the largest weight on each class, for those who cannot see it."""
        texts = []
        for method, weights in self.weights.items():
            by_class = np.stack(list(weights.values()), axis=1)
            known = [n for n, shares in enumerate(by_class) if not np.isnan(shares).any()]
            best = {n: list(weights)[by_class[n].argmax()] for n in known}
            pairs = [f"{best[n]} about {self.names[n]}" for n in known]
            texts.append(f"{method} asks {', '.join(pairs[:MOST_NAMES])}")
        return "; ".join(texts)


def class_table(
    lines: Mapping[str, Sequence[Mapping[str, Any]]], weights: Mapping[str, Array]
) -> ClassTable:
    """The table of several methods, each the mean of runs with the same teachers.

    Args:
        lines: Last lines of the breakdowns of each method's runs.
        weights: Mean weights (2, C, M) by head of the methods whose weights are to be shown.
    """
    first = next(iter(lines.values()))[0]
    teachers: dict[str, Array] = {}
    students: dict[str, Array] = {}
    for method, own in lines.items():
        found = [line["accuracy"] for line in own if "accuracy" in line]
        if found:
            students[method] = np.array([each["student"] for each in found], float).mean(0)
            known = np.array(found[0]["teachers"], float)
            teachers |= zip(own[0]["teachers"], known, strict=True)
    return ClassTable(
        names=first.get("classes") or [str(n) for n in range(len(first["class"]["count"]))],
        teachers=teachers,
        students=students,
        weights={
            method: dict(zip(lines[method][0]["teachers"], each.mean(0).T, strict=True))
            for method, each in weights.items()
        },
    )


def write_classes(line: Mapping[str, Any], path: Path, method: str) -> None:
    """Draws the table of one run into a PNG.

    Args:
        line: The last line of its breakdown.
        path: The file.
        method: Label of its method.
    """
    weights = np.array([line["class"][head] for head in HEADS], dtype=float)
    table = class_table({method: [line]}, {method: weights})
    with picture(path, table.size) as figure:
        draw_classes(figure, table)


def draw_classes(figure: Figure, table: ClassTable) -> None:
    """Classes down; what teachers and students have right, then what every method weights how."""
    knowing = {**table.teachers, **table.students}
    panels = [
        *([("right [%]", "Blues", knowing)] if knowing else []),
        *((f"asked by {drawn(m)} [%]", "Oranges", found) for m, found in table.weights.items()),
    ]
    ratios = [len(columns) for _, _, columns in panels]
    axes = figure.subplots(
        1, len(panels), sharey=True, squeeze=False, gridspec_kw={"width_ratios": ratios}
    )[0]
    for panel, (title, colours, columns) in zip(axes, panels, strict=True):
        _draw_panel(panel, columns, colours)
        lines = wrap(title, LETTERS * len(columns), break_long_words=False)
        panel.set_title("\n".join(lines), fontsize=9)
    if len(table.names) <= MOST_NAMES:
        axes[0].set_yticks(range(len(table.names)), [drawn(name, 16) for name in table.names])
    if knowing:
        axes[0].axvline(len(table.teachers) - 0.5, color="white", linewidth=4)


def _draw_panel(axes: Axes, columns: Mapping[str, Array], colours: str) -> None:
    values = 100 * np.stack(list(columns.values()), axis=1)
    axes.imshow(values, aspect="auto", cmap=colours, vmin=0, vmax=100, interpolation="nearest")
    axes.set_xticks(range(len(columns)), [drawn(name) for name in columns], rotation=90)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    if len(values) > MOST_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = "white" if value > 60 else "black"
            axes.text(column, row, f"{value:.0f}", color=ink, fontsize=7, ha="center", va="center")
