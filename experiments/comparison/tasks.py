"""What a comparison has to do: the teachers of its runs first, then the runs."""

import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.comparison.plan import PlannedRun
from experiments.config import ExperimentConfig
from experiments.console import draw_curves
from experiments.executors import Task
from experiments.experiment import prepare_device, run_experiment
from experiments.running.log import read_rows
from mtkd_env.env import StepRecord
from mtkd_env.files import cache_folder
from mtkd_env.registration import load_images
from mtkd_env.teachers import build_pool


class Silence:
    """Tells nothing of a run; its `metrics.jsonl` does."""

    def teacher(self, name: str, epoch: int, epochs: int, loss: float) -> None:
        """A teacher has been trained for another epoch."""

    def note(self, text: str) -> None:
        """Something about the teachers is worth a line."""

    def training(self, config: ExperimentConfig, steps: int) -> AbstractContextManager[Any]:
        """The student's training begins."""
        del config, steps
        return nullcontext()

    def step(self, record: StepRecord) -> None:
        """The student made a step."""

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """An epoch ended."""


def run_task(run: PlannedRun, threads: int | None) -> Task:
    """The task of one run.

    Args:
        run: The run.
        threads: CPU threads, unless its configuration says how many.
    """
    config = replace(run.config, threads=run.config.threads or threads)
    work = partial(_train_student, config, run.folder, run.name)
    return Task(run.name, work, run.folder / "metrics.jsonl", config.optimizer.epochs)


def _train_student(config: ExperimentConfig, folder: Path, title: str) -> None:
    """Does a run, from where it was interrupted if it was."""
    run_experiment(config, Silence(), folder, resume=True)
    draw_curves(read_rows(folder), folder / "curves.png", title)


def pool_tasks(runs: Iterable[PlannedRun], log: Path) -> list[tuple[Task, Sequence[PlannedRun]]]:
    """A task for every distinct pool of teachers, and the runs that need it.

    Args:
        runs: All runs.
        log: The file in which the tasks tell how far they are.
    """
    users: dict[str, list[PlannedRun]] = {}
    for run in runs:
        # The student's own, which teachers do not depend on.
        data = replace(run.config.data, batch_size=1, mixup=0.0, cutmix=0.0)
        users.setdefault(repr((run.config.teachers, data)), []).append(run)
    return [(_pool_task(group[0], log), group) for group in users.values()]


def _pool_task(run: PlannedRun, log: Path) -> Task:
    pool = run.config.teachers
    name = " ".join(filter(None, ("teachers", run.setting)))
    work = partial(_train_teachers, run.config, log)
    return Task(name, work, log, len(pool.teachers) * pool.recipe.epochs)


def _train_teachers(config: ExperimentConfig, log: Path) -> None:
    """Trains the teachers that are not in the cache; a run then finds them all there."""
    images = load_images(
        config.data.dataset,
        config.data.arguments,
        val_fraction=config.data.val_fraction,
        train_size=config.data.train_size,
    )
    with log.open("w", encoding="utf-8") as file:

        def note(name: str, epoch: int, epochs: int, loss: float) -> None:
            row = {"teacher": name, "epoch": epoch, "epochs": epochs, "loss": loss}
            file.write(json.dumps(row) + "\n")
            file.flush()

        build_pool(
            config.teachers,
            images,
            device=prepare_device(config),
            cache=cache_folder(config.cache),
            progress=note,
        )
