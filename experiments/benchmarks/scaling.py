"""What a step costs against number and width of the teachers, batch size and image size."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from experiments.benchmarks.base import Outcome, Request
from experiments.benchmarks.contestant import Contestant
from experiments.benchmarks.memory import DevicePeak
from experiments.benchmarks.scaling_report import ScalingPoint, ScalingReport
from experiments.benchmarks.shared import check_shareable, with_reference
from experiments.benchmarks.synthetic import on_noise, write_noise
from experiments.benchmarks.timing import Subject, per_unit, stopwatch_for, take_turns
from experiments.benchmarks.timing_report import REFERENCE
from experiments.config import ExperimentConfig
from experiments.experiment import prepare_device
from mtkd_env.errors import check_name
from mtkd_env.teachers import PoolSpec

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
class Surroundings:
    """What is the same at all points.

    Attributes:
        request: What was asked for.
        configs: Configuration of every method.
        channels: K of the configured images.
        classes: Their C.
        size: Their height.
        device: Where everything is computed.
    """

    request: Request
    configs: Mapping[str, ExperimentConfig]
    channels: int
    classes: int
    size: int
    device: torch.device

    @property
    def configured(self) -> Setting:
        """The setting that all axes go through, or would if its value were among theirs."""
        config = self.configs[REFERENCE]
        return Setting(len(config.teachers.teachers), config.data.batch_size, 1.0, self.size)

    def configs_at(self, setting: Setting, folder: Path) -> dict[str, ExperimentConfig]:
        """The configuration of every method in a setting, with noise in a folder."""
        count = setting.batch * self.request.steps
        path = write_noise(folder, self.channels, self.classes, setting.size, count)
        return {
            name: replace(
                config,
                data=on_noise(config.data, path, setting.batch),
                teachers=setting.pool(config.teachers),
                threads=torch.get_num_threads(),
            )
            for name, config in self.configs.items()
        }

    def measure(self, axis: str) -> list[ScalingPoint]:
        """The cost at all points of an axis, which take turns."""
        points: list[ScalingPoint] = []
        subjects: dict[str, Subject] = {}
        settings = self.configured.along(axis)
        with TemporaryDirectory(prefix="mtkd_scaling_") as folder:
            for setting in self.request.count(settings, f"{axis}: points built"):
                configs = self.configs_at(setting, Path(folder))
                assembly = self.request.build(configs[REFERENCE])
                env = assembly.env
                points.append(ScalingPoint(axis, env.observer.width, asdict(setting)))
                for name, config in configs.items():
                    agent = Contestant(assembly, config, DevicePeak(env.device))
                    subjects[points[-1].subject(name)] = per_unit(agent, env.steps_per_epoch)
        watch = stopwatch_for(self.device)
        take_turns(subjects, watch, range(WARMUP_ROUNDS))
        rounds = self.request.count(range(self.request.rounds), f"{axis}: rounds")
        readings = take_turns(subjects, watch, rounds)
        return [
            replace(point, readings={name: readings[point.subject(name)] for name in self.configs})
            for point in points
        ]


def measure(request: Request) -> Outcome:
    """Times a step of every method at several points of every axis, on noise.

    Raises:
        ConfigError: An axis or a method that does not exist, methods with other teachers than the
            others, or a network that cannot see images of some size.
    """
    axes = list(dict.fromkeys(request.axes or AXES))
    for axis in axes:
        check_name(AXES, axis, "axis")
    configs = request.configs(with_reference(request.methods or METHODS))
    check_shareable(configs)
    config = configs[REFERENCE]
    # Decides on the number of threads too, which are to be those of the configured images.
    device = prepare_device(config)
    data = config.data.load()
    channels, size, _ = data.image_shape
    around = Surroundings(request, configs, channels, data.num_classes, size, device)
    points = [point for axis in axes for point in around.measure(axis)]
    return ScalingReport(points, config, device, request.steps, data.name).outcome()
