"""Tables, numbers and the picture of how the cost of a step grows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, NullFormatter
from rich.table import Table

from experiments.benchmarks.base import Outcome
from experiments.benchmarks.timing import (
    HIGH,
    LOW,
    Percentiles,
    Reading,
    describe_machine,
    ratio_percentiles,
    seconds,
    this_machine,
)
from experiments.benchmarks.timing_report import REFERENCE, ratio_cells
from experiments.config import ExperimentConfig
from experiments.console import plain_table
from experiments.drawing import drawn, picture

TITLE = "Cost of an SGD step, learning included"

MEANING = {
    "teachers": "teachers M",
    "batch": "batch B",
    "width": "width of the teachers [of the configured]",
    "size": "side of the images [pixels]",
}


@dataclass(frozen=True)
class ScalingPoint:
    """A setting, and what a step costs there.

    Attributes:
        axis: What it is a point of.
        features: F, the width of the observation.
        setting: The value on every axis.
        readings: Readings of a step in every round, by method; each as long as the others.
    """

    axis: str
    features: int
    setting: Mapping[str, float]
    readings: Mapping[str, Sequence[Reading]] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The value on its axis."""
        return self.setting[self.axis]

    def subject(self, method: str) -> str:
        """What a method is called here."""
        return f"{method}, {self.axis} {self.value:g}"

    def step(self, method: str, clock: str) -> Percentiles:
        """Seconds a step."""
        return Percentiles.of([reading[clock] for reading in self.readings[method]])

    def ratio(self, method: str, clock: str) -> Percentiles:
        """A method's time over the reference's of the same round."""
        return ratio_percentiles(self.readings, REFERENCE, clock)[method]

    def values(self, clocks: Sequence[str]) -> dict[str, Any]:
        """All numbers."""
        return {
            "axis": self.axis,
            **self.setting,
            "features": self.features,
            "methods": {
                name: {
                    clock: {
                        "ratio": asdict(self.ratio(name, clock)),
                        "seconds_a_step": asdict(self.step(name, clock)),
                        "seconds_a_step_by_round": seconds(self.readings, clock)[name],
                    }
                    for clock in clocks
                }
                for name in self.readings
            },
        }


@dataclass(frozen=True)
class ScalingReport:
    """Points on several axes, and how to show them.

    Attributes:
        points: The points.
        config: The configured setting.
        device: Where it was computed.
        steps: Steps in an epoch.
        images: Name of the configured images.
    """

    points: Sequence[ScalingPoint]
    config: ExperimentConfig
    device: torch.device
    steps: int
    images: str

    @property
    def clock(self) -> str:
        """Name of the clock that is shown."""
        return self._clocks[0]

    @property
    def _clocks(self) -> list[str]:
        return list(self.points[0].readings[REFERENCE][0])

    @property
    def _methods(self) -> list[str]:
        return list(self.points[0].readings)

    def outcome(self) -> Outcome:
        """Tables, notes, numbers and picture."""
        tables = [self._table(axis, points) for axis, points in self._axes().items()]
        return Outcome(tables, self._notes(), self._values(), self._draw)

    def _axes(self) -> dict[str, list[ScalingPoint]]:
        axes = dict.fromkeys(point.axis for point in self.points)
        return {axis: [point for point in self.points if point.axis == axis] for axis in axes}

    def exponents(self, points: Sequence[ScalingPoint]) -> dict[str, float]:
        """The power of the axis that every method's time grows with, by least squares of logs."""
        values = np.log([point.value for point in points])
        times = {
            method: np.log([point.step(method, self.clock).median for point in points])
            for method in self._methods
        }
        return {method: float(np.polyfit(values, one, 1)[0]) for method, one in times.items()}

    def _table(self, axis: str, points: Sequence[ScalingPoint]) -> Table:
        headings = [axis, "F"]
        for method in self._methods:
            kinds = ["ms/step", "µs/image"]
            kinds += [] if method == REFERENCE else ["ratio", f"{LOW}-{HIGH} %"]
            headings += [f"{method}\n{kind}" for kind in kinds]
        table = plain_table(f"{TITLE}, against {MEANING[axis]}", [], headings)
        for point in points:
            cells = [cell for method in self._methods for cell in self._cells(point, method)]
            table.add_row(f"{point.value:g}", str(point.features), *cells)
        return table

    def _cells(self, point: ScalingPoint, method: str) -> list[str]:
        took = point.step(method, self.clock).median
        cells = [f"{1e3 * took:.2f}", f"{1e6 * took / point.setting['batch']:.1f}"]
        return [
            *cells,
            *(() if method == REFERENCE else ratio_cells(point.ratio(method, self.clock))),
        ]

    def _notes(self) -> list[str]:
        rounds = len(self.points[0].readings[REFERENCE])
        return [
            f"synthetic: images are noise of the channels and classes of {self.images}; the "
            "teachers are the pool's networks, in their order and again and again, untrained; "
            "what a step costs does not depend on what they know",
            *(
                f"{axis}: time grows with the power "
                + ", ".join(f"{power:.2f} ({name})" for name, power in self.exponents(one).items())
                + " of it"
                for axis, one in self._axes().items()
            ),
            f"{self.clock} time; {rounds} rounds of an epoch of {self.steps} steps, all points of "
            "an axis and methods in turns; agents that learn more rarely than that need more "
            "--steps",
            f"on {this_machine(self.device)}",
        ]

    def _values(self) -> dict[str, Any]:
        return {
            "title": TITLE,
            "reference": REFERENCE,
            "steps": self.steps,
            "machine": describe_machine(self.device),
            "configuration": self.config.to_yaml(),
            "points": [point.values(self._clocks) for point in self.points],
            "exponents": {axis: self.exponents(points) for axis, points in self._axes().items()},
        }

    def _draw(self, path: Path) -> None:
        axes = self._axes()
        with picture(path, (1 + 3.6 * len(axes), 4)) as figure:
            panels = figure.subplots(1, len(axes), squeeze=False)[0]
            for panel, (axis, points) in zip(panels, axes.items(), strict=True):
                self._draw_axis(panel, axis, points)
            panels[0].set_ylabel(f"{self.clock} time of a step [ms]")
            panels[0].legend(fontsize="small")
            figure.suptitle(TITLE)

    def _draw_axis(self, panel: Axes, axis: str, points: Sequence[ScalingPoint]) -> None:
        values = [point.value for point in points]
        powers = self.exponents(points)
        for method in self._methods:
            found = [point.step(method, self.clock) for point in points]
            medians = [1e3 * one.median for one in found]
            below = [1e3 * (one.median - one.low) for one in found]
            above = [1e3 * (one.high - one.median) for one in found]
            panel.errorbar(
                values, medians, [below, above], marker="o", capsize=3, label=drawn(method)
            )
        first = 1e3 * points[0].step(REFERENCE, self.clock).median
        linear = [first * value / values[0] for value in values]
        panel.plot(values, linear, color="grey", linestyle=":", label="linear")
        panel.set(xscale="log", yscale="log", xlabel=MEANING[axis])
        panel.set_title(", ".join(f"{drawn(name)} {power:.2f}" for name, power in powers.items()))
        panel.set_xticks(values, [f"{value:g}" for value in values])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_formatter(LogFormatter())
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        panel.grid(alpha=0.3, which="both")
