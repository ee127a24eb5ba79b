"""Tables of the page that are texts alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from experiments.comparison.summary import NOTHING

# Headings of columns that hold texts; all others hold numbers.
TEXTS = frozenset({"algorithm", "method", "our method", "setting", "software", "teacher"})
VERSIONS = "version (number of runs)"

# Fewer columns leave room beside them.
WIDE = 7


@dataclass(frozen=True)
class PageTable:
    """Headings of columns, and their texts row by row."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]

    @property
    def classes(self) -> list[str]:
        """How each column is set."""
        return ["name" if name in {*TEXTS, VERSIONS} else "" for name in self.headings]

    @property
    def narrow(self) -> bool:
        """Whether it leaves room beside it."""
        return len(self.headings) < WIDE


def number(value: float) -> str:
    """A weight or a score; nothing for NaN."""
    return NOTHING if math.isnan(value) else f"{value:z.3f}"
