"""A picture of several numbers beside each other, each with its spread."""

from collections.abc import Mapping
from pathlib import Path

from experiments.benchmarks.timing import Percentiles
from experiments.drawing import drawn, picture


def draw_bars(path: Path, spreads: Mapping[str, Percentiles], *, title: str, label: str) -> None:
    """Draws a bar for every median, from the lowest to the highest, into a PNG.

    Args:
        path: The file.
        spreads: The numbers by their names, as ratios: a line marks 1.
        title: Heading.
        label: What the numbers are.
    """
    named = sorted(spreads.items(), key=lambda pair: pair[1].median)
    places, medians = range(len(named)), [spread.median for _, spread in named]
    whiskers = [
        [spread.median - spread.low for _, spread in named],
        [spread.high - spread.median for _, spread in named],
    ]
    with picture(path, (8, 1.2 + 0.32 * len(named))) as figure:
        axes = figure.subplots()
        axes.barh(places, medians, xerr=whiskers, capsize=3, color="tab:blue", alpha=0.8)
        axes.set_yticks(places, [drawn(name) for name, _ in named])
        axes.axvline(1, color="grey", linestyle=":")
        for place, (_, spread) in enumerate(named):
            axes.annotate(
                f"{spread.median:.3f}",
                (spread.high, place),
                xytext=(6, 0),
                textcoords="offset points",
                verticalalignment="center",
            )
        axes.margins(x=0.12)
        axes.set(title=title, xlabel=label)
        axes.grid(axis="x", alpha=0.3)
