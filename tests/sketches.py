"""Pictures of runs, composed but not drawn: drawing takes as long as a tiny run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg


def sketched(draw: Callable[..., None]) -> Callable[..., None]:
    """What takes the place of a canvas's `print_png`: says the title and how long a line is."""

    @wraps(draw)
    def sketch(canvas: FigureCanvasAgg, path: Path, **_: Any) -> None:
        lines = canvas.figure.axes[0].lines
        length = len(lines[0].get_xdata()) if lines else 0
        Path(path).write_bytes(b"\x89PNG " + f"{canvas.figure.get_suptitle()}: {length}".encode())

    return sketch


def draw_pictures(patch: pytest.MonkeyPatch) -> None:
    """Draws pictures as users get them, until the patch is undone."""
    draw = FigureCanvasAgg.print_png
    # They may be drawn already.
    patch.setattr(FigureCanvasAgg, "print_png", getattr(draw, "__wrapped__", draw))


@contextmanager
def pictures() -> Iterator[None]:
    """Draws pictures in a block."""
    with pytest.MonkeyPatch.context() as during:
        draw_pictures(during)
        yield
