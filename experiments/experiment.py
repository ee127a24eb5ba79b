"""One run from its configuration to its result."""

import json
import platform
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np
import stable_baselines3
import torch

import mtkd_env
from agents import Agent, build_agent, check_agent
from agents.warmup import warm_up
from experiments.config import ExperimentConfig
from experiments.gallery import LastStep, collect_gallery, write_gallery
from experiments.metrics import BreakdownMeter, EpochMeter, MetricsLog, fusion_coefficients
from mtkd_env import Assembly, ConfigError, MTKDVectorEnv, StepRecord, assemble, registration
from mtkd_env.files import save_checkpoint, write_text

# Splits that are evaluated every epoch; a pass over the training images would cost too much.
EVALUATED = frozenset({"val", "test"})


@dataclass(frozen=True)
class Result:
    """What a run came to. Accuracies are on the test split.

    Attributes:
        algo: Name of the method.
        dataset: Name of the dataset.
        student: Name of the student's network.
        seed: Seed of the run.
        epochs: Epochs of the student.
        teachers: Accuracy of every teacher.
        last_accuracy: Student's accuracy after the last epoch: the result.
        best_accuracy: Its highest accuracy after any epoch, chosen on the test split.
        best_epoch: The epoch of the highest accuracy, from 1.
        weights: Mean weight of every teacher in the last epoch, over samples and both heads.
        score: Agent score of the last epoch, together.
        score_logit: Agent score of the logit head.
        score_feature: Agent score of the feature head.
        seconds: Seconds of the student's training, evaluations included.
        teacher_seconds: Seconds of training or loading the teachers.
        folder: The run's folder.
        digests: What every teacher was made from.
        versions: Versions of what the numbers depend on.
    """

    algo: str
    dataset: str
    student: str
    seed: int
    epochs: int
    teachers: dict[str, float]
    last_accuracy: float
    best_accuracy: float
    best_epoch: int
    weights: dict[str, float]
    score: float
    score_logit: float
    score_feature: float
    seconds: float
    teacher_seconds: float
    folder: str
    digests: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


class Progress(Protocol):
    """What a run tells while it goes on."""

    def teacher(self, name: str, epoch: int, epochs: int, loss: float) -> None:
        """A teacher has been trained for another epoch."""

    def training(self, config: ExperimentConfig, steps: int) -> AbstractContextManager[Any]:
        """The student's training of so many steps begins; ends with the context."""

    def step(self, record: StepRecord) -> None:
        """The student made a step."""

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """An epoch ended, with its row of metrics."""


def read_result(folder: Path) -> Result | None:
    """The result of a finished run; none of an unfinished one, or of another version's."""
    try:
        return Result(**json.loads((folder / "result.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, TypeError, ValueError):
        return None


def check_names(config: ExperimentConfig) -> None:
    """Checks what a configuration names, before anything is loaded or trained.

    Raises:
        ConfigError: An agent, a network or a choice that does not exist, or an unknown argument.
    """
    check_agent(config.agent_name, config.agent.arguments)
    registration.check_names(
        student=config.student.network,
        logit=config.distillation.logit,
        feature=config.distillation.feature,
        **asdict(config.env),
    )


def prepare_device(config: ExperimentConfig) -> torch.device:
    """The device of a run, after setting the number of CPU threads.

    Sharing the work of tiny images costs more than it saves, and many times more where other
    programs use the cores.

    Raises:
        ConfigError: A device that does not exist here.
    """
    threads = config.threads or (1 if config.data.dataset == "digits" else None)
    if threads is not None:
        torch.set_num_threads(threads)
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: cannot use '{config.device}': {reason}") from error
    return device


def make_folder(config: ExperimentConfig) -> Path:
    """A new folder for a run: `output/dataset_algo_seedS_time`.

    Raises:
        ConfigError: The folder cannot be made.
    """
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    name = f"{config.data.dataset}_{config.algo.replace(':', '.')}_seed{config.seed}_{stamp}"
    parent = Path(config.output)
    for suffix in ("", *(f"_{i}" for i in range(2, 1000))):
        folder = parent / (name + suffix)
        if _make_new(folder):
            return folder
    raise ConfigError(f"output: {parent} holds too many runs of one second")


def _make_new(folder: Path) -> bool:
    """Makes a folder; whether it was not there before."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.parent.is_dir():
            raise ConfigError(f"output: {folder.parent} is a file, expected a folder") from None
        return False
    except OSError as error:
        raise ConfigError(f"output: cannot make {folder}: {error.strerror}") from error
    return True


def build(config: ExperimentConfig, progress: Progress) -> Assembly:
    """Data, teachers, student and environment of a configuration."""
    return assemble(
        dataset=config.data.dataset,
        dataset_kwargs=config.data.arguments,
        num_envs=config.data.batch_size,
        val_fraction=config.data.val_fraction,
        train_size=config.data.train_size,
        teachers=config.teachers,
        student=config.student.network,
        student_width=config.student.width,
        recipe=config.optimizer,
        device=str(prepare_device(config)),
        cache=config.cache,
        seed=config.seed,
        progress=progress.teacher,
        output="torch",
        **asdict(config.distillation),
        **asdict(config.env),
    )


def run_experiment(
    config: ExperimentConfig, progress: Progress, folder: Path | None = None
) -> Result:
    """Trains a student under a method and writes everything into the run's folder.

    The folder holds `config.yaml`, `metrics.jsonl`, `breakdown.jsonl`, TensorBoard events,
    `student.pt`, the agent, `gallery.npz` and `result.json`, which is written last: a folder
    without it holds an unfinished run.

    Args:
        config: The run.
        progress: What it tells while it goes on.
        folder: A folder that is not there yet; by default one named after the run and the time.

    Raises:
        ConfigError: Anything in the configuration that cannot be used; no folder is made then.
    """
    check_agent(config.agent_name, config.agent.arguments)
    started = time.perf_counter()
    assembly = build(config, progress)
    env = assembly.env
    env.reset(seed=config.seed)
    agent = build_agent(config.agent_name, env, seed=config.seed, arguments=config.agent.arguments)
    teacher_seconds = time.perf_counter() - started
    if folder is None:
        folder = make_folder(config)
    elif not _make_new(folder):
        raise ConfigError(f"output: {folder} is there already")
    write_text(folder / "config.yaml", config.to_yaml())
    started = time.perf_counter()
    env.subscribe(last := LastStep())
    with MetricsLog(folder) as log, progress.training(config, _steps(config, env)):
        _train(config, agent, log, progress)
    seconds = time.perf_counter() - started
    _write_gallery(config, assembly, last, folder)
    save_checkpoint(folder / "student.pt", {"network": env.distiller.student.state_dict()})
    agent.save(folder)
    result = _result(config, assembly, log.rows, folder, (seconds, teacher_seconds))
    write_text(folder / "result.json", json.dumps(asdict(result), indent=2) + "\n")
    return result


def _write_gallery(
    config: ExperimentConfig, assembly: Assembly, last: LastStep, folder: Path
) -> None:
    data = config.data
    splits = assembly.data.split(data.val_fraction, train_size=data.train_size)
    if last.record is not None:
        write_gallery(collect_gallery(last.record, splits.train), folder)


def _steps(config: ExperimentConfig, env: MTKDVectorEnv) -> int:
    return config.optimizer.epochs * env.steps_per_epoch


def _train(config: ExperimentConfig, agent: Agent, log: MetricsLog, progress: Progress) -> None:
    env, warmup = agent.env, config.warmup
    recorder = _Recorder(env, log, progress)
    env.subscribe(progress.step)
    agent.log_to(log.folder / "tensorboard" / "agent")
    for _ in range(warmup.epochs):
        warm_up(agent, env.steps_per_epoch, warmup.weights)
        recorder.end_epoch()
    if config.optimizer.epochs > warmup.epochs:
        agent.learn(config.optimizer.epochs - warmup.epochs, recorder.end_epoch)


class _Recorder:
    """Evaluates the student and writes a row at the end of every epoch."""

    def __init__(self, env: MTKDVectorEnv, log: MetricsLog, progress: Progress) -> None:
        self._env = env
        self._log = log
        self._progress = progress
        self._meter = EpochMeter(env.teacher_names)
        env.subscribe(self._meter)
        classes = env.distiller.teachers.num_classes
        self._breakdown = BreakdownMeter(env.teacher_names, classes, env.device)
        env.subscribe(self._breakdown)
        self._begin()

    def _begin(self) -> None:
        self._lr = self._env.distiller.optimizer.param_groups[0]["lr"]
        self._started = time.perf_counter()

    def end_epoch(self) -> None:
        """Reads the meter, evaluates the student, writes."""
        env = self._env
        epoch = env.steps // env.steps_per_epoch
        seconds = time.perf_counter() - self._started
        row = {"epoch": epoch, "lr": self._lr, "seconds": seconds, **self._meter.read()}
        row |= fusion_coefficients(env.fusion)
        for split in sorted(EVALUATED.intersection(env.splits)):
            evaluation = env.evaluate(split)
            row[f"{split}/accuracy"] = evaluation.accuracy
            row[f"{split}/cross_entropy"] = evaluation.cross_entropy
        _check_finite(row, env.steps)
        self._log.write(row)
        self._log.write_breakdown({"epoch": epoch, **self._breakdown.read()})
        self._progress.epoch(row, env.distiller.recipe.epochs)
        self._begin()


def _check_finite(row: dict[str, Any], steps: int) -> None:
    bad = [name for name, value in row.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"{bad[0]} became NaN or infinite in epoch {row['epoch']} (up to step {steps}); "
            "a lower optimizer.lr, distillation.alpha or distillation.beta may help"
        )


def mean_weights(row: dict[str, Any], teachers: tuple[str, ...]) -> dict[str, float]:
    """Mean weight of every teacher over both heads, from a row of metrics."""
    return {
        name: (row[f"weights/logit/{name}"] + row[f"weights/feature/{name}"]) / 2
        for name in teachers
    }


def _result(
    config: ExperimentConfig,
    assembly: Assembly,
    rows: list[dict[str, Any]],
    folder: Path,
    seconds: tuple[float, float],
) -> Result:
    last, best = rows[-1], max(rows, key=lambda row: float(row["test/accuracy"]))
    pool = assembly.pool
    return Result(
        algo=config.algo,
        dataset=config.data.dataset,
        student=config.student.network,
        seed=config.seed,
        epochs=len(rows),
        teachers={name: evaluation.accuracy for name, evaluation in pool.evaluations.items()},
        last_accuracy=last["test/accuracy"],
        best_accuracy=best["test/accuracy"],
        best_epoch=best["epoch"],
        weights=mean_weights(last, pool.ensemble.names),
        score=last["score"],
        score_logit=last["score/logit"],
        score_feature=last["score/feature"],
        seconds=round(seconds[0], 2),
        teacher_seconds=round(seconds[1], 2),
        folder=str(folder),
        digests=pool.digests,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {
        "mtkd_env": mtkd_env.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gymnasium": gymnasium.__version__,
        "stable_baselines3": stable_baselines3.__version__,
    }
