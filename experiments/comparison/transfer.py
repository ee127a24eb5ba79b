"""Detectors and segmenters that begin with several backbones, as runs of a comparison."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from experiments.comparison.kinds import Entry, Kind
from experiments.console import console
from experiments.running.folder import flat
from experiments.transfer.detection import DetectionRun
from experiments.transfer.program import TaskResult, TransferConfig, parse
from experiments.transfer.segmentation import SegmentationRun
from experiments.transfer.training import TaskRun
from mtkd_env import distributed
from mtkd_env.errors import ConfigError, errors_of

# A backbone that begins at random, in place of a file.
RANDOM = "random"


class Transfer(Kind):
    """Networks for another task; methods are backbones: the file of each, by its ResNet.

    Layers of a run, later ones win: configs/transfer/<recipe>.yaml, `base`, its setting, flags.
    """

    result_type = TaskResult
    reserved: ClassVar = {"seed": "seeds", "output": "--output", "weights": "methods"}
    run_type: type[TaskRun[Any]]

    def config(self, entry: Entry, flags: Sequence[str]) -> TransferConfig:
        """The configuration of an entry's runs, but for the seed and where they are kept."""
        base, setting, method = entry.sections.values()
        recipe = [] if entry.recipe is None else [f"--recipe={entry.recipe}"]
        own = [
            f"--{key}={json.dumps(value) if isinstance(value, list) else value}"
            for values in (base, setting)
            for key, value in flat(values).items()
        ]
        own += [*flags, f"--output={entry.path}"]
        with errors_of(entry.path):
            config, _ = parse(self.run_type.config_type, [*recipe, *own], "mtkd compare")
        path = method.get(config.backbone)
        if path is None:
            raise ConfigError(
                f"{entry.path}: methods.{entry.method}: expected a file for {config.backbone}, "
                f"which {entry.setting} begins with: --weights "
                f"{entry.method}:{config.backbone}=PATH, or {RANDOM} in its place"
            )
        return replace(config, weights=None if path == RANDOM else str(path))

    def length(self, config: TransferConfig) -> tuple[int, str]:
        """Epochs or steps, whatever the schedule counts."""
        schedule = config.schedule
        if schedule.iterations is not None:
            return schedule.iterations, "step"
        return schedule.epochs or 0, "epoch"

    def check_data(self, configs: Sequence[TransferConfig]) -> None:
        """Looks whether images and backbones are there, before the first run."""
        for config in configs:
            if not Path(config.data).is_dir():
                raise ConfigError(f"data: no such folder: {config.data}")
            if config.weights is not None and not Path(config.weights).exists():
                raise ConfigError(f"--weights: no such file: {config.weights}")

    def train(self, config: TransferConfig, folder: Path, name: str) -> None:
        """Does a run; of several processes one shows how it goes."""
        del name
        out = console(quiet=distributed.rank() != 0 or not distributed.launched())
        self.run_type(config, out).complete(folder, resume=True)


class Detection(Transfer):
    """Detectors."""

    run_type = DetectionRun


class Segmentation(Transfer):
    """Segmenters."""

    run_type = SegmentationRun
