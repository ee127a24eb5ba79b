"""One run from its configuration to its result."""

import gc
import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import gymnasium
import stable_baselines3
import torch

import mtkd_env
from agents import build_agent, check_agent
from agents.isolation import Isolation
from experiments.config import PLACE, ExperimentConfig, build_config, file_layer, read_flags
from experiments.gallery import LastStep, collect_gallery, write_gallery
from experiments.running.checkpoint import Checkpoints
from experiments.running.device import find_device
from experiments.running.folder import make_new
from experiments.running.lock import RunLock
from experiments.running.log import LINES, MetricsLog, RowsAlone
from experiments.training import Progress, Training
from mtkd_env import Assembly, ConfigError, assemble, distributed, registration
from mtkd_env.files import name_in_path, save_checkpoint, write_text
from mtkd_env.seeding import derive_seed

# What a run writes before its end, beside its configuration.
WRITTEN = (*LINES, "student.pt", "agent.pt", "agent.zip", "agent.txt", "gallery.npz", "curves.png")


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
        digests: SHA-256 of every teacher's weights.
        versions: Versions of what the numbers depend on.
        skipped: Batches that were left out because they were NaN or infinite.
        fidelities: How near each int8 teacher is to what it was in float32.
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
    skipped: int = 0
    fidelities: dict[str, Any] = field(default_factory=dict)


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
        student_arguments=config.student.arguments,
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
    return find_device(config.device, threads)


def make_folder(config: ExperimentConfig) -> Path:
    """A new folder for a run: `output/dataset_algo_seedS_time`.

    Raises:
        ConfigError: The folder cannot be made.
    """
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    names = name_in_path(config.data.dataset), name_in_path(config.algo)
    name = f"{'_'.join(names)}_seed{config.seed}_{stamp}"
    parent = Path(config.output)
    for suffix in ("", *(f"_{i}" for i in range(2, 1000))):
        folder = parent / (name + suffix)
        if make_new(folder):
            return folder
    raise ConfigError(f"output: {parent} holds too many runs of one second")


def build(config: ExperimentConfig, progress: Progress) -> Assembly:
    """Data, teachers, student and environment of a configuration."""
    return assemble(
        dataset=config.data.dataset,
        dataset_kwargs=config.data.arguments,
        num_envs=config.data.batch_size,
        val_fraction=config.data.val_fraction,
        train_size=config.data.train_size,
        mixup=config.data.mixup,
        cutmix=config.data.cutmix,
        views=config.data.views,
        view_seed=config.data.view_seed,
        teachers=config.teachers,
        prefetch=config.prefetch,
        student=config.student.network,
        student_width=config.student.width,
        student_arguments=config.student.arguments,
        recipe=config.optimizer,
        precision=config.precision,
        teacher_precision=config.teacher_precision,
        compile=config.compile,
        device=str(prepare_device(config)),
        cache=config.cache,
        seed=config.seed,
        progress=progress.teacher,
        note=progress.note,
        output="torch",
        on_nan=config.on_nan,
        **asdict(config.distillation),
        **asdict(config.env),
    )


def run_experiment(
    config: ExperimentConfig,
    progress: Progress,
    folder: Path | None = None,
    *,
    resume: bool = False,
) -> Result:
    """Trains a student under a method and writes everything into the run's folder.

    The folder holds `config.yaml`, `metrics.jsonl`, `breakdown.jsonl`, TensorBoard events,
    `student.pt`, the agent, `gallery.npz` and `result.json`, which is written last: a folder
    without it holds an unfinished run, and in `checkpoints` what that can go on from.

    Of several processes that do this together, only process 0 looks for, reads and writes these.

    Args:
        config: The run.
        progress: What it tells while it goes on.
        folder: The run's folder; by default a new one named after the run and the time.
        resume: Whether the folder may be there already. A finished run in it is not done again; an
            unfinished one goes on from its last checkpoint with the numbers that it would have had
            without the interruption, or from its beginning if it has none.

    Raises:
        ConfigError: Anything in the configuration that cannot be used (no folder is made then),
            a folder that holds a run of another configuration, or that another process uses.
        FloatingPointError: Something became NaN or infinite.
        Stopped: A signal came; there is a checkpoint to go on from.
        OSError: Something cannot be written; as after a crash, the run can be gone on with.
    """
    try:
        return _run_experiment(config, progress, folder, resume=resume)
    finally:
        # Environment, agent and their subscribers hold each other; a process that does many runs
        # would keep several of them, each with its replay buffer, until Python comes to look.
        gc.collect()


def _run_experiment(
    config: ExperimentConfig, progress: Progress, folder: Path | None, *, resume: bool
) -> Result:
    check_agent(config.agent_name, config.agent.arguments)
    writes = distributed.rank() == 0
    with ExitStack() as held:
        found = _find(config, folder, held, resume=resume) if writes else None
        result, state = distributed.agree(found) or (None, None)
        if result is not None:
            return result
        held.enter_context(Isolation()())
        run = _Run(config, progress)
        if state is not None:
            run.check_same(state)
        ready = _make_ready(config, folder, held, clear=state is None) if writes else None
        folder = distributed.agree(ready) or Path()
        with _way_back(folder):
            return run.complete(folder, state)


@contextmanager
def _way_back(folder: Path) -> Iterator[None]:
    """Adds to what breaks a run, other than its own numbers, how to go on with it."""
    try:
        yield
    except (ConfigError, FloatingPointError):
        raise
    except Exception as error:
        error.add_note(f"to go on: run.py --resume {folder}")
        raise


def _find(
    config: ExperimentConfig, folder: Path | None, held: ExitStack, *, resume: bool
) -> tuple[Result | None, dict[str, Any] | None]:
    """The result of the run that a folder holds, or else its checkpoint; locks the folder."""
    if folder is None or not folder.is_dir():
        return None, None
    if not resume:
        raise ConfigError(f"output: {folder} is there already")
    held.enter_context(RunLock(folder))
    check_same_run(config, folder)
    if (result := read_result(folder)) is not None:
        Checkpoints(folder).clear()
        return result, None
    return None, Checkpoints(folder).load()


def _make_ready(
    config: ExperimentConfig, folder: Path | None, held: ExitStack, *, clear: bool
) -> Path:
    """The folder of a run, locked if it is new, without what is not to be gone on from."""
    if folder is None or not folder.is_dir():
        folder = _new_folder(config, folder)
        held.enter_context(RunLock(folder))
    elif clear:
        _clear(folder)
    return folder


def run_config(folder: Path, argv: Sequence[str] = ()) -> ExperimentConfig:
    """The configuration of the run in a folder.

    Args:
        folder: The run's folder.
        argv: Flags that say otherwise.

    Raises:
        ConfigError: There is no run, or a flag that cannot be used.
    """
    layer = file_layer(folder / "config.yaml", flag="--resume")
    flags = read_flags(argv)
    if flags.recipe is not None:
        raise ConfigError("--recipe: cannot be given with --resume")
    algo = [str(layer.values.get("algo", ExperimentConfig.algo)), *flags.algos][-1]
    return build_config(algo, [layer], flags)


def check_same_run(config: ExperimentConfig, folder: Path) -> None:
    """Checks that a folder holds no run of another configuration.

    Raises:
        ConfigError: It does; names the keys that differ.
    """
    if not (folder / "config.yaml").is_file():
        return
    found = run_config(folder)
    if found.digest == config.digest:
        return
    own, theirs = _flat(asdict(config)), _flat(asdict(found))
    keys = [key for key in {**own, **theirs} if key.split(".")[0] not in PLACE]
    changed = [key for key in keys if own.get(key) != theirs.get(key)]
    values = ", ".join(f"{key} {own.get(key)} instead of {theirs.get(key)}" for key in changed)
    raise ConfigError(f"output: {folder} holds a run of another configuration: {values}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys and values with dots between the keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        flat |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat


def _new_folder(config: ExperimentConfig, folder: Path | None) -> Path:
    if folder is None:
        return make_folder(config)
    if not make_new(folder):
        raise ConfigError(f"output: {folder} is there already")
    return folder


def _clear(folder: Path) -> None:
    """Removes what an unfinished run without a checkpoint has left, and nothing else."""
    Checkpoints(folder).clear()
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)


class _Run:
    """A run whose teachers are there, before the student's first step."""

    def __init__(self, config: ExperimentConfig, progress: Progress) -> None:
        started = time.perf_counter()
        self._config = config
        self._progress = progress
        self._assembly = build(config, progress)
        env = self._assembly.env
        # For students with dropout, and whatever else draws without a generator of its own.
        torch.manual_seed(derive_seed(config.seed, "modules"))
        env.reset(seed=config.seed)
        arguments = config.agent.arguments
        self._agent = build_agent(config.agent_name, env, seed=config.seed, arguments=arguments)
        self._teacher_seconds = time.perf_counter() - started

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for a run to go on as if it had never stopped."""
        return {
            "configuration": self._config.digest,
            "teachers": dict(self._assembly.pool.digests),
            "device": self._assembly.env.device.type,
        }

    def check_same(self, state: Mapping[str, Any]) -> None:
        """Checks that a checkpoint is this run's.

        Raises:
            ConfigError: It is another configuration's, other teachers', or of another device, whose
                random generators and rounding are others.
        """
        own = self._identity()
        for name, expected in own.items():
            if (found := state["about"][name]) != expected:
                raise ConfigError(
                    f"resume: the checkpoint is of another {name}: expected {expected}, "
                    f"found {found}"
                )

    def complete(self, folder: Path, state: dict[str, Any] | None) -> Result:
        """Trains the student to the end and writes the folder.

        Args:
            folder: The run's folder.
            state: The checkpoint to go on from, if there is one.
        """
        config, agent = self._config, self._agent
        writes = distributed.rank() == 0
        if writes and not (folder / "config.yaml").is_file():
            write_text(folder / "config.yaml", config.to_yaml())
        env = agent.env
        env.subscribe(last := LastStep())
        with _open_log(folder, state) as log:
            training = Training(config, agent, log, self._progress)
            if state is not None:
                self._teacher_seconds = state["about"]["teacher_seconds"]
                training.load_state_dict(state["training"])
            steps = config.optimizer.epochs * env.steps_per_epoch - env.steps
            with self._progress.training(config, steps):
                training.run({**self._identity(), "teacher_seconds": self._teacher_seconds})
        result = self._result(log.rows, folder, training.seconds)
        if writes:
            self._write_gallery(last, folder)
            save_checkpoint(folder / "student.pt", {"network": env.distiller.student.state_dict()})
            agent.save(folder)
            write_text(folder / "result.json", json.dumps(asdict(result), indent=2) + "\n")
            Checkpoints(folder).clear()
        return result

    def _write_gallery(self, last: LastStep, folder: Path) -> None:
        if last.record is not None:
            config, data = self._config.data, self._assembly.data
            splits = data.split(config.val_fraction, train_size=config.train_size)
            write_gallery(collect_gallery(last.record, data, splits.train), folder)

    def _result(self, rows: list[dict[str, Any]], folder: Path, seconds: float) -> Result:
        config, pool = self._config, self._assembly.pool
        last, best = rows[-1], max(rows, key=lambda row: float(row["test/accuracy"]))
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
            seconds=round(seconds, 2),
            teacher_seconds=round(self._teacher_seconds, 2),
            folder=str(folder),
            digests=pool.digests,
            versions=_versions(),
            skipped=self._assembly.env.distiller.skipped,
            fidelities={name: asdict(one) for name, one in self._assembly.fidelities.items()},
        )


def _open_log(folder: Path, state: Mapping[str, Any] | None) -> MetricsLog:
    """The log of a run, from its beginning or from a checkpoint."""
    if distributed.rank() != 0:
        return RowsAlone(folder, distributed.agree([]))
    log = MetricsLog(folder, state and state["training"]["log"])
    distributed.agree(log.rows)
    return log


def mean_weights(row: dict[str, Any], teachers: tuple[str, ...]) -> dict[str, float]:
    """Mean weight of every teacher over both heads, from a row of metrics."""
    return {
        name: (row[f"weights/logit/{name}"] + row[f"weights/feature/{name}"]) / 2
        for name in teachers
    }


def _versions() -> dict[str, str]:
    return {
        "mtkd_env": mtkd_env.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gymnasium": gymnasium.__version__,
        "stable_baselines3": stable_baselines3.__version__,
    }
