"""Students under several methods, as runs of a comparison; and the teachers that they share."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from experiments.comparison.kinds import Entry, Kind
from experiments.config import (
    ExperimentConfig,
    Layer,
    algo_layers,
    build_config,
    read_flags,
    recipe_layers,
)
from experiments.console import draw_curves
from experiments.executors import Task
from experiments.experiment import Result, run_experiment, train_teachers
from experiments.running.log import read_rows
from experiments.training import Progress
from mtkd_env.errors import ConfigError, errors_of
from mtkd_env.files import cache_folder, user_path
from mtkd_env.registration import load_images

# Seeds of the data that are the pool's where nobody has said others.
LABEL_SEEDS = ("labelled_seed", "label_noise_seed")


class Distillation(Kind):
    """Students under methods of weighting.

    Layers of a run, later ones win: configs/recipe/<recipe>.yaml, `base`, its setting,
    configs/algo/<algo>.yaml, its method, `--config` files, flags. The recipe is that of `--recipe`,
    of the setting or of the file; students are settings.
    """

    result_type = Result
    reserved: ClassVar = {
        "seed": "seeds",
        "output": "--output",
        "algo": "methods",
        "recipe": "recipe of the file or of a setting",
    }

    def config(self, entry: Entry, flags: Sequence[str]) -> ExperimentConfig:
        """The configuration of an entry's runs, but for the seed and where they are kept."""
        given = read_flags(flags)
        if given.algos:
            raise ConfigError("--algo: a comparison's methods stand in its file; see --methods")
        base, setting, method = map(dict, entry.sections.values())
        algo = str(method.pop("algo", entry.method))
        recipe = given.recipe if given.recipe is not None else entry.recipe
        with errors_of(f"{entry.path}: recipe"):
            first = recipe_layers(recipe)
        own = [
            self._layer(entry, key, values)
            for key, values in zip(entry.sections, (base, setting, method), strict=True)
        ]
        layers = [*first, *own[:2], *algo_layers(algo), own[2]]
        config = build_config(algo, layers, given, recipe=recipe, program="mtkd compare")
        with errors_of(f"{entry.path}: methods.{entry.method}"):
            config.check_agent()
        return config

    def _layer(self, entry: Entry, key: str, values: Mapping[str, Any]) -> Layer:
        if isinstance(pool := values.get("teachers"), str):
            values = {**values, "teachers": str(entry.path.parent / user_path(pool))}
        return Layer(f"{entry.path}: {key}", values)

    def of_pool(self, config: ExperimentConfig, pool: int) -> ExperimentConfig:
        """The configuration with the pool of teachers that a seed makes, and labels of its own."""
        if config.teachers.seed:
            raise ConfigError("teachers.seed: cannot be given beside pools")
        unset: dict[str, Any] = {
            name: pool for name in LABEL_SEEDS if getattr(config.data, name) is None
        }
        teachers, data = replace(config.teachers, seed=pool), replace(config.data, **unset)
        return replace(config, teachers=teachers, data=data)

    def placed(self, config: ExperimentConfig, folder: Path) -> ExperimentConfig:
        """The configuration of the run in a folder."""
        return replace(config, output=str(folder.parent))

    def length(self, config: ExperimentConfig) -> tuple[int, str]:
        """Epochs of the student."""
        return config.optimizer.epochs, "epoch"

    def check_data(self, configs: Sequence[ExperimentConfig]) -> None:
        """Loads every distinct set of images once, so that mistakes show before the first run."""
        for config in {repr((config.data, config.teachers)): config for config in configs}.values():
            load_images(config.data, config.teachers)

    def teachers(
        self, configs: Sequence[ExperimentConfig], log: Path
    ) -> list[tuple[Task, Sequence[int]]]:
        """A task for every distinct pool of teachers, and the runs that need it."""
        several = len({config.teachers.seed for config in configs}) > 1
        users: dict[str, list[int]] = {}
        for number, config in enumerate(configs):
            # The student's own, which teachers do not depend on.
            data = replace(config.data, batch_size=1, mixup=0.0, cutmix=0.0)
            users.setdefault(repr((config.teachers, data)), []).append(number)
        tasks: list[tuple[Task, Sequence[int]]] = []
        for numbers in users.values():
            config = configs[numbers[0]]
            pool = config.teachers
            which = f"pool {pool.seed}" if several else ""
            name = " ".join(filter(None, ("teachers", config.setting, which)))
            epochs = len(pool.asked) * pool.recipe.epochs
            tasks.append((Task(name, partial(_train_teachers, config, log), log, epochs), numbers))
        return tasks

    def train(self, config: ExperimentConfig, folder: Path, name: str) -> None:
        """Does a run, and draws its curves."""
        run_experiment(config, Progress(), folder, resume=True)
        draw_curves(read_rows(folder), folder / "curves.png", name)

    def shared(self, config: ExperimentConfig) -> Sequence[Path]:
        """The cache of teachers."""
        return [cache_folder(config.cache)]


def _train_teachers(config: ExperimentConfig, log: Path) -> None:
    """Trains the teachers that are not in the cache; a run then finds them all there."""
    with log.open("w", encoding="utf-8") as file:

        def note(name: str, epoch: int, epochs: int, loss: float) -> None:
            row = {"teacher": name, "epoch": epoch, "epochs": epochs, "loss": loss}
            file.write(json.dumps(row) + "\n")
            file.flush()

        train_teachers(config, note)
