"""What a step costs against number and width of the teachers, batch size and image size."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, NullFormatter
from rich.table import Table

from experiments.benchmarks.base import Outcome, Request
from experiments.benchmarks.contestant import Contestant, comparable_configs
from experiments.benchmarks.synthetic import write_noise
from experiments.benchmarks.timing import (
    HIGH,
    LOW,
    Subject,
    describe_machine,
    per_unit,
    stopwatch_for,
    take_turns,
    this_machine,
)
from experiments.benchmarks.timing_report import (
    REFERENCE,
    Costs,
    costs,
    ratio_cells,
    whiskers,
)
from experiments.config import ExperimentConfig
from experiments.console import plain_table
from experiments.drawing import drawn, picture
from experiments.experiment import prepare_device
from mtkd_env.data import ImageSet
from mtkd_env.errors import check_name
from mtkd_env.teachers import PoolSpec

TITLE = "Cost of an SGD step, learning included"

METHODS = ("pg",)

# Epochs of every point that are not counted, after the warm-up of Algorithm 1.
WARMUP_ROUNDS = 1

# The values of every axis; `width` is a factor on the configured widths.
AXES: Mapping[str, Sequence[float]] = {
    "teachers": (1, 2, 4, 8),
    "batch": (32, 64, 128, 256, 512, 1024),
    "width": (0.5, 1, 2),
    "size": (8, 16, 32),
}
MEANING = {
    "teachers": "teachers M",
    "batch": "batch B",
    "width": "width of the teachers [of the configured]",
    "size": "side of the images [pixels]",
}


@dataclass(frozen=True)
class Setting:
    """What a cost is measured against; its fields are the axes.

    Attributes:
        teachers: M.
        batch: B.
        width: Factor on all channels of the teachers.
        size: Height and width of the images [pixels].
    """

    teachers: int
    batch: int
    width: float
    size: int

    def along(self, axis: str) -> "list[Setting]":
        """The settings of an axis, all else as it is."""
        kind = type(getattr(self, axis))
        return [replace(self, **{axis: kind(value)}) for value in AXES[axis]]

    def pool(self, spec: PoolSpec) -> PoolSpec:
        """A pool of untrained teachers: the networks of another one again and again."""
        chosen = islice(cycle(spec.teachers), self.teachers)
        teachers = tuple(
            replace(
                teacher,
                name=f"{teacher.network}-{place}",
                kind="random",
                checkpoint=None,
                width=self.width * teacher.width,
                seed=place,
            )
            for place, teacher in enumerate(chosen)
        )
        return replace(spec, teachers=teachers)


@dataclass(frozen=True)
class Point:
    """A setting, and what a step costs there.

    Attributes:
        value: The value on its axis.
        features: F, the width of the observation.
        setting: The setting.
        costs: What a step costs, by method and clock.
    """

    value: float
    features: int
    setting: Setting
    costs: Costs


@dataclass(frozen=True)
class Scaling:
    """What is the same at all points: measures them, and shows what they have come to.

    Attributes:
        request: What was asked for.
        configs: Configuration of every method.
        data: The configured images, whose channels and classes all have.
        device: Where everything is computed.
    """

    request: Request
    configs: Mapping[str, ExperimentConfig]
    data: ImageSet[Any]
    device: torch.device

    @property
    def clock(self) -> str:
        """Name of the clock that is shown."""
        return stopwatch_for(self.device).clocks[0]

    def configs_at(self, setting: Setting, folder: Path) -> dict[str, ExperimentConfig]:
        """The configuration of every method in a setting, with noise in a folder."""
        count = setting.batch * self.request.steps
        channels, classes = self.data.image_shape[0], self.data.num_classes
        path = write_noise(folder, channels, classes, setting.size, count)
        changed: dict[str, Any] = {
            "dataset": "npz",
            "arguments": {"path": str(path)},
            "batch_size": setting.batch,
            "val_fraction": 0.0,
            "train_size": None,
        }
        return {
            name: replace(
                config,
                data=replace(config.data, **changed),
                teachers=setting.pool(config.teachers),
                threads=torch.get_num_threads(),
            )
            for name, config in self.configs.items()
        }

    def measure(self, axis: str) -> list[Point]:
        """The cost at all points of an axis, which take turns."""
        config, side = self.configs[REFERENCE], self.data.image_shape[1]
        # All axes go through this one, or would if its value were among theirs.
        configured = Setting(len(config.teachers.teachers), config.data.batch_size, 1.0, side)
        settings = configured.along(axis)
        features: list[int] = []
        subjects: dict[str, Subject] = {}
        with TemporaryDirectory(prefix="mtkd_scaling_") as folder:
            for setting in self.request.count(settings, f"{axis}: points built"):
                configs = self.configs_at(setting, Path(folder))
                assembly = self.request.build(configs[REFERENCE])
                features.append(assembly.env.observer.width)
                for name, config in configs.items():
                    agent = Contestant(assembly, config)
                    subjects[f"{name} {setting}"] = per_unit(agent, assembly.env.steps_per_epoch)
        watch = stopwatch_for(self.device)
        take_turns(subjects, watch, range(WARMUP_ROUNDS))
        rounds = self.request.count(range(self.request.rounds), f"{axis}: rounds")
        readings = take_turns(subjects, watch, rounds)
        return [
            Point(
                float(getattr(setting, axis)),
                width,
                setting,
                costs({name: readings[f"{name} {setting}"] for name in self.configs}),
            )
            for setting, width in zip(settings, features, strict=True)
        ]

    def outcome(self, axes: Mapping[str, Sequence[Point]]) -> Outcome:
        """Tables, notes, numbers and picture of the points of every axis."""
        exponents = {axis: self.exponents(points) for axis, points in axes.items()}
        values = {
            "title": TITLE,
            "reference": REFERENCE,
            "steps": self.request.steps,
            "machine": describe_machine(self.device),
            "configuration": self.configs[REFERENCE].to_yaml(),
            "points": [
                {"axis": axis, **asdict(point.setting), "features": point.features}
                | {"methods": point.costs}
                for axis, points in axes.items()
                for point in points
            ],
            "exponents": exponents,
        }
        tables = [self._table(axis, points) for axis, points in axes.items()]
        return Outcome(tables, self._notes(exponents), values, lambda path: self._draw(path, axes))

    def exponents(self, points: Sequence[Point]) -> dict[str, float]:
        """The power of the axis that every method's time grows with, by least squares of logs."""
        values = np.log([point.value for point in points])
        powers: dict[str, float] = {}
        for method in self.configs:
            times = [point.costs[method][self.clock].milliseconds.median for point in points]
            powers[method] = float(np.polyfit(values, np.log(times), 1)[0])
        return powers

    def _table(self, axis: str, points: Sequence[Point]) -> Table:
        headings = [axis, "F"]
        for method in self.configs:
            kinds = ["ms/step", "µs/image"]
            kinds += [] if method == REFERENCE else ["ratio", f"{LOW}-{HIGH} %"]
            headings += [f"{method}\n{kind}" for kind in kinds]
        table = plain_table(f"{TITLE}, against {MEANING[axis]}", [], headings)
        for point in points:
            cells = [f"{point.value:g}", str(point.features)]
            for method in self.configs:
                cost = point.costs[method][self.clock]
                took = cost.milliseconds.median
                cells += [f"{took:.2f}", f"{1e3 * took / point.setting.batch:.1f}"]
                cells += () if method == REFERENCE else ratio_cells(cost.ratio)
            table.add_row(*cells)
        return table

    def _notes(self, exponents: Mapping[str, Mapping[str, float]]) -> list[str]:
        return [
            f"synthetic: images are noise of the channels and classes of {self.data.name}; the "
            "teachers are the pool's networks, in their order and again and again, untrained; "
            "what a step costs does not depend on what they know",
            *(
                f"{axis}: time grows with the power "
                + ", ".join(f"{power:.2f} ({name})" for name, power in powers.items())
                + " of it"
                for axis, powers in exponents.items()
            ),
            f"{self.clock} time; {self.request.rounds} rounds of an epoch of {self.request.steps} "
            "steps, all points of an axis and methods in turns; agents that learn more rarely than "
            "that need more --steps",
            f"on {this_machine(self.device)}",
        ]

    def _draw(self, path: Path, axes: Mapping[str, Sequence[Point]]) -> None:
        with picture(path, (1 + 3.6 * len(axes), 4)) as figure:
            panels = figure.subplots(1, len(axes), squeeze=False)[0]
            for panel, (axis, points) in zip(panels, axes.items(), strict=True):
                self._draw_axis(panel, axis, points)
            panels[0].set_ylabel(f"{self.clock} time of a step [ms]")
            panels[0].legend(fontsize="small")
            figure.suptitle(TITLE)

    def _draw_axis(self, panel: Axes, axis: str, points: Sequence[Point]) -> None:
        values = [point.value for point in points]
        for method in self.configs:
            took = [point.costs[method][self.clock].milliseconds for point in points]
            medians, *around = whiskers(took)
            panel.errorbar(values, medians, around, marker="o", capsize=3, label=drawn(method))
        first = points[0].costs[REFERENCE][self.clock].milliseconds.median
        linear = [first * value / values[0] for value in values]
        panel.plot(values, linear, color="grey", linestyle=":", label="linear")
        panel.set(xscale="log", yscale="log", xlabel=MEANING[axis])
        powers = self.exponents(points).items()
        panel.set_title(", ".join(f"{drawn(name)} {power:.2f}" for name, power in powers))
        panel.set_xticks(values, [f"{value:g}" for value in values])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_formatter(LogFormatter())
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        panel.grid(alpha=0.3, which="both")


def measure(request: Request) -> Outcome:
    """Times a step of every method at several points of every axis, on noise.

    Raises:
        ConfigError: An axis or a method that does not exist, methods with other teachers than the
            others, or a network that cannot see images of some size.
    """
    axes = list(dict.fromkeys(request.axes or AXES))
    for axis in axes:
        check_name(AXES, axis, "axis")
    configs = comparable_configs(request, request.methods or METHODS)
    # Decides on the number of threads too, which are to be those of the configured images.
    device = prepare_device(configs[REFERENCE])
    scaling = Scaling(request, configs, configs[REFERENCE].data.load(), device)
    return scaling.outcome({axis: scaling.measure(axis) for axis in axes})
