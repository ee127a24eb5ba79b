"""How pictures look, in colours that the colour-blind can tell apart, and become part of a page."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import cycle, pairwise
from typing import Any

from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.drawing import drawn
from experiments.html_report.naming import BASELINE, Setting

# Inches of a plot: two stand side by side on a wide page, and one fits a telephone.
PLOT_WIDTH, PLOT_HEIGHT, LABEL_HEIGHT = 5.6, 3.1, 0.17

# Okabe and Ito without black and yellow, then dark colours of Tol's.
METHOD_COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
    *("#332288", "#882255", "#117733", "#999933", "#661100", "#aa4499", "#44aa99"),
)
# Methods that everything is measured against have the same colour on every page.
FIXED_COLOURS = {BASELINE: "#000000", "none": "#777777"}

# Tol's vibrant scheme.
TEACHER_COLOURS = ("#0077bb", "#ee7733", "#009988", "#ee3377", "#33bbee", "#cc3311", "#888888")

GUIDE_COLOUR = "#666666"

# Of all pictures, to matplotlib.
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "path",
    # Equal pictures are equal files.
    "svg.hashsalt": "mtkd_env",
}


@dataclass(frozen=True)
class Palette:
    """One colour for every method and every teacher, the same in all pictures."""

    methods: Mapping[str, str]
    teachers: Mapping[str, str]


def plot_height(labels: int) -> float:
    """Inches of a plot that has room for a label of every method."""
    return max(PLOT_HEIGHT, LABEL_HEIGHT * labels + 0.7)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str]], palette: Palette) -> None:
    """Writes the names of methods to the right of a plot, each with a line to its point.

    Args:
        axes: The plot, in which everything is drawn.
        ends: Place in the plot, and the method.
        palette: Their colours.
    """
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    gap = LABEL_HEIGHT / (plot_height(len(ends)) - 0.7)
    levels = spread_out([(y - low) / (high - low) for _, y, _ in ends], gap)
    for (x, y, method), level in zip(ends, levels, strict=True):
        axes.annotate(
            drawn(method),
            (x, y),
            xytext=(1.05, level),
            textcoords="axes fraction",
            verticalalignment="center",
            color=palette.methods[method],
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": palette.methods[method], "linewidth": 0.5},
        )


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


def make_palette(methods: Sequence[str], teachers: Sequence[str]) -> Palette:
    """Colours in the order of the names; they begin again where there are more names."""
    others = [method for method in methods if method not in FIXED_COLOURS]
    return Palette(
        FIXED_COLOURS | dict(zip(others, cycle(METHOD_COLOURS), strict=False)),
        dict(zip(teachers, cycle(TEACHER_COLOURS), strict=False)),
    )


# Pictures as parts of the page.

# What a file of its own needs, and a part of a page does not; equal images have equal identifiers.
SURPLUS = re.compile(
    r"<metadata>.*?</metadata>|\s+xmlns(:xlink)?=\"[^\"]*\"|\sid=\"image[^\"]*\"", re.DOTALL
)
IDENTIFIER = re.compile(r"(\bid=\"|url\(#|href=\"#)")


@dataclass(frozen=True)
class Key:
    """An entry of a legend; its mark is a line's style, or the character of a symbol."""

    label: str
    colour: str
    mark: str = "solid"


@dataclass(frozen=True)
class Picture:
    """A picture of one setting, and what else is to be said about it."""

    setting: Setting
    svg: Markup
    note: str = ""


def inline(figure: Figure, name: str, description: str) -> Markup:
    """A figure as an `<svg>` element that stands alone in a page with others.

    Args:
        figure: The figure.
        name: Prefix of the identifiers in it; no other picture of the page has it.
        description: What the picture shows, for those who cannot see it.
    """
    buffer = StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = SURPLUS.sub("", text[text.index("<svg") :]).replace("xlink:href", "href")
    text = IDENTIFIER.sub(rf"\g<1>{name}-", text)
    label = escape(description)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
