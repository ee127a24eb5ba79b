"""A picture of several numbers beside each other, each with its spread."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from experiments.benchmarks.timing import Spread
from mtkd_env.files import write_atomically


def draw_bars(path: Path, spreads: Mapping[str, Spread], *, title: str, label: str) -> None:
    """Draws a bar for every median, from the lowest to the highest, into a PNG.

    Args:
        path: The file.
        spreads: The numbers by their names, as ratios: a line marks 1.
        title: Heading.
        label: What the numbers are.
    """
    names = sorted(spreads, key=lambda name: spreads[name].median)
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    medians = [spreads[name].median for name in names]
    whiskers = [
        [spreads[name].median - spreads[name].low for name in names],
        [spreads[name].high - spreads[name].median for name in names],
    ]
    axes.barh(names, medians, xerr=whiskers, capsize=3, color="tab:blue", alpha=0.8)
    axes.axvline(1, color="grey", linestyle=":")
    for place, name in enumerate(names):
        axes.annotate(
            f"{medians[place]:.3f}",
            (spreads[name].high, place),
            xytext=(6, 0),
            textcoords="offset points",
            verticalalignment="center",
        )
    axes.margins(x=0.12)
    axes.set(title=title, xlabel=label)
    axes.grid(axis="x", alpha=0.3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
