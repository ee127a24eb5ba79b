"""One run from its configuration to its result."""

import gc
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import stable_baselines3
import torch

from agents import build_agent
from experiments.classes import write_classes
from experiments.config import PLACE, ExperimentConfig, build_config, file_layer, read_flags
from experiments.gallery import LastStep, collect_gallery, write_gallery
from experiments.running.folder import CONFIG, new_folder
from experiments.running.log import ROWS, read_rows
from experiments.running.result import RunResult, versions
from experiments.training import BREAKDOWN, CHOSEN_BY, Progress, Training
from mtkd_env import Assembly, assemble
from mtkd_env.errors import ConfigError
from mtkd_env.files import cache_folder, name_in_path
from mtkd_env.imports import Trust, name_of, trust_of
from mtkd_env.registration import load_images
from mtkd_env.seeding import derive_seed
from mtkd_env.student import FILES, StudentDescription, save_student
from mtkd_env.teachers import TeacherPool, build_pool
from mtkd_env.teachers.pool import PoolProgress

# Of the tables: accuracies are on the test split.
METRIC = "test accuracy"


@dataclass(frozen=True, kw_only=True)
class Result(RunResult):
    """What a run of distillation came to; says more than other results.

    Attributes:
        algo: Name of the algorithm behind the method.
        dataset: Name of the dataset.
        student: Name of the student's network.
        teachers: Accuracy of every teacher.
        weights: Mean weight of every teacher in the last epoch, over samples and both heads.
        score: Agent score of the last epoch, together.
        score_logit: Agent score of the logit head.
        score_feature: Agent score of the feature head.
        teacher_seconds: Seconds of training or loading the teachers.
        digests: SHA-256 of every teacher's weights.
        skipped: Batches that were left out because they were NaN or infinite.
        fidelities: How near each int8 teacher is to what it was in float32.
    """

    algo: str
    dataset: str
    student: str
    teachers: dict[str, float]
    weights: dict[str, float]
    score: float
    score_logit: float
    score_feature: float
    teacher_seconds: float
    digests: dict[str, str]
    skipped: int
    fidelities: dict[str, Any]


def set_threads(config: ExperimentConfig) -> None:
    """Sets the number of CPU threads of a run.

    Sharing the work of tiny images costs more than it saves, and many times more where other
    programs use the cores.
    """
    if threads := config.threads or (1 if config.data.dataset == "digits" else None):
        torch.set_num_threads(threads)


def prepare_device(config: ExperimentConfig) -> torch.device:
    """The device of a run, after setting the number of CPU threads.

    Raises:
        ConfigError: A device that does not exist here, or does not compute as asked for.
    """
    set_threads(config)
    return config.place()


def make_folder(config: ExperimentConfig) -> Path:
    """A new folder for a run: `output/dataset_algo_seedS_time`.

    What is an object in a file, `folder/my_file.py:name`, is called `my_file_name` there.

    Raises:
        ConfigError: The folder cannot be made.
    """
    called = [Path(name_of(one)).name for one in (config.data.dataset, config.algo)]
    names = [name_in_path(one.replace(".py:", "_")) for one in called]
    return new_folder(Path(config.output), f"{'_'.join(names)}_seed{config.seed}")


def build(config: ExperimentConfig, progress: Progress) -> Assembly:
    """Data, teachers, student and environment of a configuration."""
    set_threads(config)
    return assemble(**config.parts, progress=progress)


def train_teachers(config: ExperimentConfig, progress: PoolProgress) -> TeacherPool:
    """The teachers of a configuration; trains and keeps those that are not in the cache."""
    return build_pool(
        config.teachers,
        load_images(config.data, config.teachers),
        device=prepare_device(config),
        cache=cache_folder(config.cache),
        progress=progress,
    )


def run_experiment(
    config: ExperimentConfig,
    progress: Progress,
    folder: Path | None = None,
    *,
    resume: bool = False,
) -> Result:
    """Trains a student under a method and writes everything into the run's folder.

    Beside what every run writes the folder holds `breakdown.jsonl`, the student (see
    `mtkd_env.load_student`), the agent, `gallery.npz` and `classes.png`. Arguments, result and
    errors are those of `KeptRun.complete`, and:

    Args:
        config: The run.
        progress: What it tells while it goes on.
        folder: The run's folder; by default a new one named after the run and the time.
        resume: Whether the folder may hold this run.
    """
    config.check_agent()
    try:
        run = DistillationRun(config, progress)
        return run.complete(folder or partial(make_folder, config), resume=resume)
    finally:
        # Environment, agent and their subscribers hold each other; a process that does many runs
        # would keep several of them, each with its replay buffer, until Python comes to look.
        gc.collect()


def run_config(
    folder: Path, argv: Sequence[str] = (), *, trust: Trust | None = None
) -> ExperimentConfig:
    """The configuration of the run in a folder.

    Args:
        folder: The run's folder.
        argv: Flags that say otherwise.
        trust: What the run may name; by default what the flags trust.

    Raises:
        ConfigError: There is no run, a flag that cannot be used, or a name that is not trusted.
    """
    layer = file_layer(folder / CONFIG, flag="--resume")
    flags = read_flags(argv)
    if trust is not None:
        flags = replace(flags, trust=trust)
    if flags.recipe is not None:
        raise ConfigError("--recipe: cannot be given with --resume")
    algo = str(layer.values.get("algo", ExperimentConfig.algo))
    if others := [other for other in flags.algos if other != algo]:
        raise ConfigError(f"--algo: the run of {folder} is one of {algo}, got {others[0]}")
    return build_config(algo, [layer], flags)


class DistillationRun(Training[Result]):
    """The training of a student under a method.

    Args:
        config: The run.
        progress: What it tells while it goes on.
    """

    program = "mtkd run"
    result_type = Result
    lines = (ROWS, BREAKDOWN)
    clock = "epoch"
    written = (
        *FILES,
        "agent.safetensors",
        "agent.json",
        "agent.pt",
        "agent.zip",
        "agent.txt",
        "gallery.npz",
        "curves.png",
        "classes.png",
    )
    place = PLACE

    def __init__(self, config: ExperimentConfig, progress: Progress) -> None:
        super().__init__(config, progress)
        self._last = LastStep()

    def check_same(self, folder: Path) -> None:
        """Checks that a folder holds no run whose numbers could be others."""
        # Another run's may name what is not to be imported, and is refused for that it does.
        trust = trust_of([self.config.to_yaml()])
        with suppress(ConfigError):
            if run_config(folder, trust=trust).digest == self.config.digest:
                return
        super().check_same(folder)

    def prepare(self) -> dict[str, Any]:
        """Loads the images, finds or trains the teachers, makes student and agent."""
        started, config = time.perf_counter(), self.config
        if config.in_memory and self.config.checkpoint.enabled:
            keys = ", ".join(dict.fromkeys(config.in_memory))
            self._progress.note(
                f"only this program can resume this run: what others would need is in its memory "
                f"({keys}); what is of a module has a name"
            )
        self._assembly = build(config, self._progress)
        env = self._assembly.env
        # For students with dropout, and whatever else draws without a generator of its own.
        torch.manual_seed(derive_seed(config.seed, "modules"))
        env.reset(seed=config.seed)
        agent = config.agent
        self.agent = build_agent(
            config.agent_name,
            env,
            seed=config.seed,
            arguments=agent.arguments,
            load=agent.load,
            learn=agent.learn,
        )
        self.teacher_seconds = time.perf_counter() - started
        self.agent.env.subscribe(self._last)
        self.classes = self._assembly.images.data.class_names
        return {
            "configuration": config.digest,
            "teachers": dict(self._assembly.pool.digests),
            "device": env.device.type,
        }

    def write(self, folder: Path) -> None:
        """Writes student, agent, gallery and who was asked about which class."""
        images = self._assembly.images
        if self._last.record is not None:
            gallery = collect_gallery(self._last.record, images.data, images.splits.train)
            write_gallery(gallery, folder)
        self._write_students(folder)
        trained_on = {"dataset": name_of(self.config.data.dataset), "configuration": CONFIG}
        self.agent.save(folder, trained_on)
        line = read_rows(folder, BREAKDOWN)[-1]
        write_classes(line, folder / "classes.png", self._label)

    @property
    def _label(self) -> str:
        """What tables and pages call the method."""
        return self.config.method or name_of(self.config.algo)

    def _write_students(self, folder: Path) -> None:
        """Writes the last student, and the one that validation images chose if there are any."""
        student, best = self._assembly.env.distiller.student, self.best
        save_student(folder, student, self._description(self.log.rows[-1]))
        if best.row is not None:
            about = self._description(best.row)
            save_student(folder, student, about, state=best.tensors, which="best")

    def _description(self, row: dict[str, Any]) -> StudentDescription:
        """What the student of an epoch is."""
        data, student = self._assembly.images.data, self.config.student
        measured = {k: v for k, v in row.items() if k.startswith(("test/", "val/"))}
        return StudentDescription(
            network=name_of(student.network),
            width=student.factor,
            arguments=student.arguments,
            num_classes=data.num_classes,
            preprocessing=data.preprocessing,
            class_names=data.class_names,
            metrics={"epoch": row["epoch"], **measured},
        )

    def result(self) -> Result:
        """What the run came to."""
        config, pool, rows = self.config, self._assembly.pool, self.log.rows
        last, best = rows[-1], best_row(rows)
        return Result(
            method=self._label,
            setting=config.setting,
            seed=config.seed,
            pool=config.teachers.seed,
            metric=METRIC,
            last=last["test/accuracy"],
            best=best["test/accuracy"],
            best_epoch=best["epoch"],
            validation={
                name: row[CHOSEN_BY]
                for name, row in (("last", last), ("best", best))
                if CHOSEN_BY in row
            },
            epochs=len(rows),
            seconds=round(self.log.seconds, 2),
            folder=str(self.log.folder),
            versions=versions(gymnasium, stable_baselines3),
            algo=name_of(config.algo),
            dataset=name_of(config.data.dataset),
            student=name_of(config.student.network),
            teachers={name: evaluation.accuracy for name, evaluation in pool.evaluations.items()},
            weights=mean_weights(last, pool.ensemble.names),
            score=last["score"],
            score_logit=last["score/logit"],
            score_feature=last["score/feature"],
            teacher_seconds=round(self.teacher_seconds, 2),
            digests=pool.digests,
            skipped=self._assembly.env.distiller.skipped,
            fidelities={name: asdict(one) for name, one in self._assembly.fidelities.items()},
        )


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of the best epoch, the first of several: on validation images, or else on test."""
    chosen_by = CHOSEN_BY if CHOSEN_BY in rows[-1] else "test/accuracy"
    return max(rows, key=lambda row: float(row[chosen_by]))


def mean_weights(row: dict[str, Any], teachers: tuple[str, ...]) -> dict[str, float]:
    """Mean weight of every teacher over both heads, from a row of metrics."""
    return {
        name: (row[f"weights/logit/{name}"] + row[f"weights/feature/{name}"]) / 2
        for name in teachers
    }
