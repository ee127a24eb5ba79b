"""Tables, numbers and the picture of what methods cost relative to equal weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments.benchmarks.base import Outcome
from experiments.benchmarks.timing import (
    HIGH,
    LOW,
    Percentiles,
    Readings,
    describe_machine,
    ratio_percentiles,
    seconds,
    this_machine,
)
from experiments.config import ExperimentConfig
from experiments.console import plain_table
from experiments.drawing import drawn, picture
from mtkd_env import Assembly

# Equal weights: what every other way to weight teachers is compared with.
REFERENCE = "aver"


@dataclass(frozen=True)
class Cost:
    """What a method costs by one clock.

    Attributes:
        ratio: Its time over the reference's of the same round.
        milliseconds: Those of one of so many equal units of the work.
        seconds_by_round: Those of all units.
    """

    ratio: Percentiles
    milliseconds: Percentiles
    seconds_by_round: Sequence[float]


# By method and clock.
Costs = Mapping[str, Mapping[str, Cost]]


def costs(readings: Readings, units: int = 1) -> Costs:
    """What all methods cost, with so many units of the work in a reading."""
    found: dict[str, dict[str, Cost]] = {name: {} for name in readings}
    for clock in readings[REFERENCE][0]:
        ratios = ratio_percentiles(readings, REFERENCE, clock)
        for name, counted in seconds(readings, clock).items():
            took = Percentiles.of([1000 * value / units for value in counted])
            found[name][clock] = Cost(ratios[name], took, counted)
    return found


@dataclass(frozen=True)
class TimingReport:
    """Readings of several methods, and how to show them.

    Attributes:
        title: Heading of table and picture.
        readings: The readings; those of `REFERENCE` among them.
        unit: What a step, an epoch, ... is called.
        assembly: What all methods shared.
        config: Configuration of the reference.
        notes: What the reader must know.
        units: How many of them are in one reading.
        amount: What a round holds, where that is not `units` of each.
        extra: Further columns of the table: heading, then text by method.
        values: Further values for the JSON file.
    """

    title: str
    readings: Readings
    unit: str
    assembly: Assembly
    config: ExperimentConfig
    notes: Sequence[str]
    units: int = 1
    amount: str = ""
    extra: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def costs(self) -> Costs:
        """What the methods cost."""
        return costs(self.readings, self.units)

    def outcome(self) -> Outcome:
        """Table, notes, numbers and picture."""
        return Outcome([self._table()], self._notes(), self._values(), self._draw)

    def _table(self) -> Table:
        clocks = list(self.costs[REFERENCE])
        pairs = [(f"{clock}\nratio", f"{clock}\n{LOW}-{HIGH} %") for clock in clocks]
        headings = [*chain(*pairs), f"{clocks[0]}\nms/{self.unit}", *self.extra]
        table = plain_table(self.title, ["method"], headings)
        for name, by_clock in self.costs.items():
            own = [cell for cost in by_clock.values() for cell in ratio_cells(cost.ratio)]
            first = by_clock[clocks[0]].milliseconds.median
            others = [texts[name] for texts in self.extra.values()]
            table.add_row(name, *own, f"{first:.2f}", *others)
        return table

    def _notes(self) -> list[str]:
        absolute = ", ".join(
            f"{cost.milliseconds.median:.2f} ms {clock}"
            for clock, cost in self.costs[REFERENCE].items()
        )
        amount = self.amount or f"{self.units} {self.unit}{'s' if self.units > 1 else ''}"
        return [
            *self.notes,
            f"{len(self.readings[REFERENCE])} rounds of {amount}, methods in turns; every round "
            f"gives one ratio: median, {LOW}th to {HIGH}th percentile",
            f"{REFERENCE}: {absolute} per {self.unit} on {this_machine(self.assembly.env.device)}",
        ]

    def _values(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "unit": self.unit,
            "units_per_round": self.units,
            "rounds": len(self.readings[REFERENCE]),
            "reference": REFERENCE,
            "machine": describe_machine(self.assembly.env.device),
            "teachers": list(self.assembly.env.teacher_names),
            "configuration": self.config.to_yaml(),
            "methods": self.costs,
            **self.values,
        }

    def _draw(self, path: Path) -> None:
        clock = next(iter(self.costs[REFERENCE]))
        label = f"{clock} time of one {self.unit} / {REFERENCE}'s"
        ratios = {name: by_clock[clock].ratio for name, by_clock in self.costs.items()}
        draw_bars(path, ratios, title=self.title, label=label)


def ratio_cells(spread: Percentiles) -> tuple[str, str]:
    """A spread of ratios as two columns of a table."""
    digits = 2 if spread.median >= 0.1 else 4
    return f"{spread.median:.3f}", f"{spread.low:.{digits}f}-{spread.high:.{digits}f}"


def whiskers(spreads: Sequence[Percentiles]) -> tuple[list[float], list[float], list[float]]:
    """Medians, and how far the percentiles are below and above them."""
    return (
        [one.median for one in spreads],
        [one.median - one.low for one in spreads],
        [one.high - one.median for one in spreads],
    )


def draw_bars(path: Path, spreads: Mapping[str, Percentiles], *, title: str, label: str) -> None:
    """Draws a bar for every median, from the lowest to the highest, into a PNG.

    Args:
        path: The file.
        spreads: The numbers by their names, as ratios: a line marks 1.
        title: Heading.
        label: What the numbers are.
    """
    named = dict(sorted(spreads.items(), key=lambda pair: pair[1].median))
    medians, *around = whiskers(list(named.values()))
    with picture(path, (8, 1.2 + 0.32 * len(named))) as figure:
        axes = figure.subplots()
        places = range(len(named))
        bars = axes.barh(places, medians, xerr=around, capsize=3, color="tab:blue", alpha=0.8)
        axes.bar_label(bars, fmt="%.3f", padding=6)
        axes.set_yticks(places, [drawn(name) for name in named])
        axes.axvline(1, color="grey", linestyle=":")
        axes.margins(x=0.12)
        axes.set(title=title, xlabel=label)
        axes.grid(axis="x", alpha=0.3)
