"""Pictures in files: names in them are text, whatever is written in them."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mtkd_env.files import write_atomically

# Characters of a name in a picture, of which long ones would leave nothing for the rest.
LENGTH = 36


@contextmanager
def literal_text(settings: Mapping[Any, Any] = {}) -> Iterator[None]:
    """Lets matplotlib draw texts as they are until the context ends, dollar signs included.

    Formulas are none then, as powers of ten of a logarithmic axis would be.

    Args:
        settings: Further settings of matplotlib.
    """
    with mpl.rc_context({**settings, "text.parse_math": False}), warnings.catch_warnings():
        # A name in letters that the font lacks is drawn as boxes; the text beside it has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def drawn(name: str, length: int = LENGTH) -> str:
    """A name as it stands in a picture: in one line, and cut where it is too long.

    A space keeps matplotlib from hiding what begins with an underscore.
    """
    line = "".join(letter if letter.isprintable() else " " for letter in name)
    short = line if len(line) <= length else f"{line[: length - 1]}…"
    return f" {short}" if short.startswith("_") else short


@contextmanager
def picture(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure to draw into, which is written when the context ends.

    Args:
        path: The file, a PNG.
        size: Width and height [inches].
    """
    with literal_text():
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        yield figure
        # Unlike `savefig`, which draws twice where there is a layout.
        write_atomically(path, FigureCanvasAgg(figure).print_png)
