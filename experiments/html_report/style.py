"""How pictures look: colours that the colour-blind can tell apart, and settings for print."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from experiments.drawing import literal_text
from experiments.html_report.naming import BASELINE

# Okabe and Ito without black and yellow, then dark colours of Tol's.
METHOD_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#332288",
    "#882255",
    "#117733",
    "#999933",
    "#661100",
    "#aa4499",
    "#44aa99",
)
# Methods that everything is measured against have the same colour on every page.
FIXED_COLOURS = {BASELINE: "#000000", "none": "#777777"}

# Tol's vibrant scheme.
TEACHER_COLOURS = ("#0077bb", "#ee7733", "#009988", "#ee3377", "#33bbee", "#cc3311", "#888888")

CONTEXT_COLOUR = "#c8c8c8"
GUIDE_COLOUR = "#666666"

SETTINGS: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
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


def drawing() -> AbstractContextManager[None]:
    """The settings of all pictures, until the context ends."""
    return literal_text(SETTINGS)


@dataclass(frozen=True)
class Palette:
    """One colour for every method and every teacher, the same in all pictures.

    Attributes:
        methods: Colours by method.
        teachers: Colours by teacher.
    """

    methods: Mapping[str, str]
    teachers: Mapping[str, str]


def make_palette(methods: Sequence[str], teachers: Sequence[str]) -> Palette:
    """Colours in the order of the names; they begin again where there are more names."""
    others = [method for method in methods if method not in FIXED_COLOURS]
    return Palette(
        FIXED_COLOURS | _cycle(others, METHOD_COLOURS), _cycle(teachers, TEACHER_COLOURS)
    )


def _cycle(names: Sequence[str], colours: Sequence[str]) -> dict[str, str]:
    return {name: colours[i % len(colours)] for i, name in enumerate(names)}
