"""A run that was interrupted goes on as if it had not been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import experiment, run
from experiments.config import ExperimentConfig, parse_arguments
from experiments.experiment import Result, run_experiment
from experiments.running.lock import LOCK
from experiments.running.log import read_rows
from mtkd_env.errors import ConfigError
from mtkd_env.files import load_checkpoint
from mtkd_env.keeping import CheckpointConfig, Checkpoints, Stopped
from mtkd_env.vector import StepRecord
from run_folders import comparable
from tiny import CONTRIB, SB3_ARGUMENTS, seldom

EPOCHS, STEPS = 3, 4

EVERY = ("none", "mmkd", "uniform", "aver", "camkd", "amtmlkd", "reinforce", "dpg", "reference")
EVERY += ("pg", "ppo", "a2c", "sac", "ddpg", "td3", *CONTRIB)

# What else an algorithm may keep from step to step.
OU = {"noise_type": "ornstein-uhlenbeck"}
NO_NEXT = {"optimize_memory_usage": True, "buffer_size": 96}
NO_NEXT |= {"replay_buffer_kwargs": {"handle_timeout_termination": False}}
RECURRENT = {"policy": "MlpLstmPolicy", "n_steps": 2, "batch_size": 16}
FEW_LABELS = ["--data.labelled", "40", "--teachers.batch_size", "16", "--env.heldout_size", "8"]
VARIANTS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "noise that depends on the state": ("ppo", {"use_sde": True}, []),
    "noise that depends on the state, off-policy": ("sac", {"use_sde": True}, []),
    "correlated noise": ("ddpg", OU, ["--env.episode", "epoch"]),
    "a buffer without next observations": ("td3", NO_NEXT, []),
    "returns of several steps": ("sac", {"n_steps": 2}, ["--env.episode", "epoch"]),
    "recurrent states": ("recurrentppo", RECURRENT, []),
    "half precision": ("sac", {}, ["--env.observation_dtype", "float16"]),
    "learnable fusion": ("pg", {"agent_every": 3}, ["--env.fusion", "learnable"]),
    "two epochs of warm-up": ("pg", {}, ["--warmup.epochs", "2"]),
    "raw observations": ("reinforce", {}, ["--env.normalize_observation", "false"]),
    "episodes of a training": ("dpg", {}, ["--env.episode", "training"]),
    "teachers asked for two batches": ("pg", {}, ["--prefetch", "2"]),
    "stored teachers": ("pg", {}, ["--data.views", "2", "--teachers.store.place", "host"]),
    "dropout": ("pg", {}, ["--student.network", "torchvision:mobilenet_v3_small"]),
    "a gate and draws of labelled images": ("gated_pg", {}, FEW_LABELS),
    "worth for labelled images": ("ppo", {}, [*FEW_LABELS, "--env.reward", "heldout"]),
    "validation images": ("pg", {}, ["--data.val_fraction", "0.2"]),
    "worth for the batches before": ("pg", {}, ["--env.reward", "cross"]),
}


class Interrupting:
    """Does something in one of the steps; counts them.

    Args:
        at: The step, from 1; none for never.
        act: What is done.
    """

    def __init__(self, at: int | None = None, act: Callable[[], None] | None = None) -> None:
        self.steps = 0
        self.announced: int | None = None
        self._at = at
        self._act = act

    def teacher(self, name: str, epoch: int, epochs: int, loss: float) -> None:
        """Tells nothing."""

    def note(self, text: str) -> None:
        """Tells nothing."""

    def training(self, config: ExperimentConfig, steps: int) -> Any:
        del config
        self.announced = steps
        return nullcontext()

    def step(self, record: StepRecord) -> None:
        del record
        self.steps += 1
        if self.steps == self._at and self._act is not None:
            self._act()

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Tells nothing."""


def crash() -> None:
    raise RuntimeError("crashed on purpose")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def configuration(small: str, algo: str, *flags: str, **arguments: Any) -> ExperimentConfig:
    if algo in (*CONTRIB, "recurrentppo"):
        pytest.importorskip("sb3_contrib")
    arguments = {**SB3_ARGUMENTS.get(algo, {}), **arguments}
    own = ["--agent.arguments", json.dumps(arguments)] if arguments else []
    (config,) = parse_arguments(["--config", small, "--algo", algo, *own, *flags])
    return config


def leaves(state: Any) -> list[Any]:
    """Tensors as bytes, and everything else, in the order of a state."""
    if isinstance(state, dict):
        return [leaf for key, value in state.items() for leaf in [key, *leaves(value)]]
    if isinstance(state, list | tuple):
        return [leaf for value in state for leaf in leaves(value)]
    return [state.detach().numpy().tobytes()] if isinstance(state, torch.Tensor) else [state]


def agent_of(folder: Path) -> list[Any]:
    """What the agent has learned, bit for bit."""
    kept = [folder / "agent.pt", folder / "agent.safetensors"]
    found = [leaf for path in kept if path.exists() for leaf in leaves(load_checkpoint(path))]
    if not (folder / "agent.zip").exists():
        return found
    with zipfile.ZipFile(folder / "agent.zip") as file:
        names = sorted(name for name in file.namelist() if name.endswith(".pth"))
        return [
            leaf
            for name in names
            for leaf in leaves(torch.load(BytesIO(file.read(name)), weights_only=True))
        ]


def assert_same(first: Path, second: Path) -> None:
    assert comparable(first) == comparable(second)
    breakdowns = [(folder / "breakdown.jsonl").read_text() for folder in (first, second)]
    assert breakdowns[0] == breakdowns[1]
    students = [
        [leaves(load_checkpoint(path)) for path in sorted(folder.glob("student*.safetensors"))]
        for folder in (first, second)
    ]
    assert students[0] == students[1]
    assert agent_of(first) == agent_of(second)
    results = [json.loads((folder / "result.json").read_text()) for folder in (first, second)]
    for name in ("seconds", "teacher_seconds", "folder"):
        assert {result.pop(name) is None for result in results} == {False}
    assert results[0] == results[1]


def assert_goes_on(config: ExperimentConfig, tmp_path: Path) -> None:
    """Once from the end of an epoch after a crash, twice from amid one after a signal."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_experiment(config, Interrupting(), whole)
    with pytest.raises(Stopped):
        run_experiment(config, Interrupting(3, terminate), parts)
    # Rollouts of the library are not amid one step each, so that a run may be stopped later.
    crashing = Interrupting(2 * STEPS, crash)
    with pytest.raises(RuntimeError, match="on purpose"):
        run_experiment(config, crashing, parts, resume=True)
    assert crashing.announced is not None
    assert crashing.announced < EPOCHS * STEPS
    with pytest.raises(Stopped):
        run_experiment(config, Interrupting(1, terminate), parts, resume=True)
    last = Interrupting()
    run_experiment(config, last, parts, resume=True)
    assert last.steps == last.announced
    assert last.steps < EPOCHS * STEPS
    assert_same(whole, parts)


@pytest.mark.parametrize("algo", seldom(EVERY, {"sac"}))
def test_an_interrupted_run_comes_to_the_same_bit_for_bit(
    algo: str, small: str, tmp_path: Path
) -> None:
    assert_goes_on(configuration(small, algo), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_a_run_draws_on_goes_on(variant: str, small: str, tmp_path: Path) -> None:
    algo, arguments, flags = VARIANTS[variant]
    if "dropout" in variant:
        flags = [*flags, "--student.width", "1"]
    assert_goes_on(configuration(small, algo, *flags, **arguments), tmp_path)


def interrupted(config: ExperimentConfig, folder: Path, at: int = STEPS + 2) -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        run_experiment(config, Interrupting(at, crash), folder)


@pytest.fixture(scope="module")
def whole(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run under `uniform` that nothing interrupts, for others to compare with."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_experiment(configuration(small, "uniform"), Interrupting(), folder)
    return folder


@pytest.fixture(scope="module")
def midway(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run under `uniform` that has crashed in its second epoch."""
    folder = tmp_path_factory.mktemp("midway") / "run"
    interrupted(configuration(small, "uniform"), folder)
    return folder


@pytest.fixture
def crashed(midway: Path, tmp_path: Path) -> Path:
    """The folder of such a run that is a test's own."""
    return shutil.copytree(midway, tmp_path / "run")


# Logs.


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_logs_have_no_gap_and_no_double_line(small: str, tmp_path: Path) -> None:
    # The crash is an epoch after the only checkpoint: its row is written twice, and counts once.
    config = replace(
        configuration(small, "ppo"), checkpoint=CheckpointConfig(epochs=2, minutes=0.0, share=1.0)
    )
    config = replace(config, optimizer=replace(config.optimizer, epochs=5))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_experiment(config, Interrupting(), whole)
    interrupted(config, parts, at=3 * STEPS + 2)
    assert len(read_rows(parts)) == 3
    # TensorBoard reads its files by their names: a second, then a number without leading zeros.
    time.sleep(1 - time.time() % 1)
    run_experiment(config, going_on := Interrupting(), parts, resume=True)
    assert going_on.announced == 3 * STEPS
    assert_same(whole, parts)
    for name in ("loss/total", "test/accuracy"):
        expected = points(whole / "tensorboard", name)
        assert [epoch for epoch, _ in expected] == [1, 2, 3, 4, 5]
        assert points(parts / "tensorboard", name) == expected
    expected = points(whole / "tensorboard" / "agent", "train/loss")
    assert len({step for step, _ in expected}) == len(expected) == 4
    assert points(parts / "tensorboard" / "agent", "train/loss") == expected


def test_the_seconds_are_those_of_all_parts(small: str, tmp_path: Path) -> None:
    config, folder = configuration(small, "uniform"), tmp_path / "run"
    pausing = Interrupting(2, lambda: (time.sleep(0.5), terminate())[-1])
    with pytest.raises(Stopped):
        run_experiment(config, pausing, folder)
    result = run_experiment(config, Interrupting(), folder, resume=True)
    rows = read_rows(folder)
    assert rows[0]["seconds"] >= 0.5
    assert result.seconds >= sum(row["seconds"] for row in rows) - 0.01


def test_a_log_that_has_lost_lines_is_told(small: str, crashed: Path) -> None:
    (crashed / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"metrics.jsonl: expected at least \d+ bytes, found 0"):
        run_experiment(configuration(small, "uniform"), Interrupting(), crashed, resume=True)


@pytest.mark.parametrize("name", ["metrics.jsonl", "breakdown.jsonl"])
def test_a_log_that_was_changed_is_told(name: str, small: str, crashed: Path) -> None:
    content = (crashed / name).read_text()
    (crashed / name).write_text(content.replace("0", "1", 1))
    with pytest.raises(ConfigError, match=f"{name}: its first [0-9]+ bytes are not what the run"):
        run_experiment(configuration(small, "uniform"), Interrupting(), crashed, resume=True)


# Folders.


def test_without_resume_a_folder_must_hold_no_run(small: str, midway: Path) -> None:
    with pytest.raises(ConfigError, match=f"output: {midway} holds a run already; --resume goes"):
        run_experiment(configuration(small, "uniform"), Interrupting(), midway)


def test_a_run_that_has_no_checkpoint_starts_afresh(small: str, crashed: Path, whole: Path) -> None:
    shutil.rmtree(crashed / "checkpoints")
    (crashed / "error.txt").write_text("somebody's")
    config = configuration(small, "uniform")
    run_experiment(config, again := Interrupting(), crashed, resume=True)
    assert again.steps == EPOCHS * STEPS
    assert_same(whole, crashed)
    assert (crashed / "error.txt").read_text() == "somebody's"
    assert len(points(crashed / "tensorboard", "loss/total")) == EPOCHS


def test_a_finished_run_is_not_done_again(small: str, tmp_path: Path) -> None:
    config = configuration(small, "uniform")
    first = run_experiment(config, Interrupting(), tmp_path / "run", resume=True)
    again = Interrupting()
    assert run_experiment(config, again, tmp_path / "run", resume=True) == first
    assert again.steps == 0
    assert not (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_of_another_configuration_is_left_alone(
    finished: bool, small: str, midway: Path, whole: Path
) -> None:
    config, folder = configuration(small, "uniform"), whole if finished else midway
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    other = replace(config, seed=3, student=replace(config.student, width=0.25))
    message = "another configuration: seed 3 instead of 0, student.width 0.25 instead of 0.125$"
    with pytest.raises(ConfigError, match=message):
        run_experiment(other, Interrupting(), folder, resume=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_where_and_how_a_run_is_computed_may_change(small: str, crashed: Path) -> None:
    config = configuration(small, "uniform")
    elsewhere = replace(config, threads=1, output="x", checkpoint=CheckpointConfig(epochs=0))
    run_experiment(elsewhere, Interrupting(), crashed, resume=True)
    assert "checkpoint:\n  epochs: 1\n" in (crashed / "config.yaml").read_text()


@pytest.mark.parametrize("about", ["teachers", "device"])
def test_other_teachers_and_devices_are_refused(
    about: str, small: str, crashed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Checkpoints.load

    def other(self: Any) -> Any:
        state = load(self)
        assert state is not None
        return {**state, "identity": {**state["identity"], about: "others"}}

    monkeypatch.setattr(Checkpoints, "load", other)
    with pytest.raises(ConfigError, match=f"resume: the checkpoint is of another {about}: .*other"):
        run_experiment(configuration(small, "uniform"), Interrupting(), crashed, resume=True)


def test_a_checkpoint_of_another_configuration_is_refused_with_the_keys_and_both_values(
    small: str, crashed: Path
) -> None:
    config = configuration(small, "uniform")
    changed = replace(config, student=replace(config.student, width=0.25))
    (crashed / "config.yaml").write_text(changed.to_yaml())
    message = "checkpoint is of another configuration: student.width 0.25 instead of 0.125$"
    with pytest.raises(ConfigError, match=message):
        run_experiment(changed, Interrupting(), crashed, resume=True)


LINKS = ("run.lock", "metrics.jsonl", "config.yaml", "result.json", "checkpoints", "tensorboard")


@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_written_through_a_link_in_a_run_folder(
    name: str, small: str, midway: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(midway, folder)
    target = tmp_path / "target"
    if (folder / name).exists():
        (folder / name).rename(target)
    else:
        target.write_text("precious")
    (folder / name).symlink_to(target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=f"{name}: a symbolic link to {target}; what is written"):
        run_experiment(configuration(small, "uniform"), Interrupting(), folder, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_second_process_is_refused(small: str, tmp_path: Path) -> None:
    config, folder = configuration(small, "uniform"), tmp_path / "run"

    def second() -> None:
        with pytest.raises(ConfigError, match=f"{folder} is in use by process {os.getpid()}"):
            run_experiment(config, Interrupting(), folder, resume=True)

    run_experiment(config, Interrupting(2, second), folder)


# What cannot be kept, and what must not.


class Secretive(PPO):
    """Keeps something that is neither numbers nor arrays."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory = random.Random(0)


def test_an_agent_that_no_checkpoint_can_hold_says_so_at_once(small: str, tmp_path: Path) -> None:
    config = configuration(small, "test_resume:Secretive", n_steps=2, batch_size=16)
    message = "a checkpoint cannot hold Secretive.memory, which is of type Random"
    with pytest.raises(ConfigError, match=message):
        run_experiment(config, progress := Interrupting(), tmp_path / "kept")
    assert progress.steps == 0
    without = replace(config, checkpoint=CheckpointConfig(epochs=0, minutes=0.0))
    run_experiment(without, Interrupting(), tmp_path / "without")


def test_the_last_checkpoint_is_from_before_what_went_wrong(
    small: str, tmp_path: Path, whole: Path
) -> None:
    config = configuration(small, "uniform")
    captured: list[Any] = []

    class Poisoning(Interrupting):
        def step(self, record: StepRecord) -> None:
            super().step(record)
            if self.steps == STEPS + 2:
                env = captured[0]
                next(env.distiller.module.parameters()).data.view(-1)[0] = torch.nan

    build = experiment.build

    def built(*args: Any) -> Any:
        assembly = build(*args)
        captured.append(assembly.env)
        return assembly

    with pytest.MonkeyPatch.context() as during:
        during.setattr(experiment, "build", built)
        with pytest.raises(FloatingPointError) as error:
            run_experiment(config, Poisoning(), tmp_path / "run")
    message = str(error.value)
    assert message.startswith("loss/cross_entropy, loss/kd, ")
    assert "became NaN or infinite in step 7 (of steps 5 to 8, the first) for sample " in message
    assert message.endswith("; there is a checkpoint from before it, after step 4")
    result = run_experiment(config, Interrupting(), tmp_path / "run", resume=True)
    assert isinstance(result, Result)
    assert_same(whole, tmp_path / "run")


# The program.


def test_the_program_goes_on_with_a_run(
    crashed: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--resume", str(crashed), "--device", "cpu", "--checkpoint.minutes", "1"]) == 0
    assert str(crashed) in capsys.readouterr().out
    assert_same(whole, crashed)
    # A finished one is shown.
    assert run.main([f"--resume={crashed}"]) == 0


def test_a_run_folder_as_output_is_gone_on_with(small: str, crashed: Path, tmp_path: Path) -> None:
    assert run.main(["--config", small, "--algo", "uniform", "--output", str(crashed)]) == 0
    assert (crashed / "result.json").exists()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [crashed]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "4"], "another configuration: seed 4 instead of 0"),
        (["--algo", "pg"], "is one of uniform, got pg"),
        (["--optimizer.epochs", "9"], "optimizer.epochs 9 instead of 3"),
        (["--recipe", "x"], "--recipe: cannot be given with --resume"),
        (["--optimizer.lrr", "1"], "did you mean '--optimizer.lr'?"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_that_would_make_another_run_are_refused(
    flags: list[str],
    message: str,
    midway: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run.main(["--resume", str(midway), *flags]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1


def test_a_folder_without_a_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--resume", str(tmp_path / "none")]) == 2
    assert "--resume: " in (shown := capsys.readouterr().err)
    assert "No such file" in shown


def test_a_stopped_program_says_how_to_go_on(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = run.ConsoleProgress.step

    def stopping(self: Any, record: StepRecord) -> None:
        step(self, record)
        if record.step == 1:
            terminate()

    monkeypatch.setattr(run.ConsoleProgress, "step", stopping)
    assert run.main(["--config", small, "--algo", "uniform", "--output", str(tmp_path)]) == 143
    (folder,) = tmp_path.iterdir()
    expected = f"stopped after step 2; to go on: mtkd run --resume {folder}\n"
    assert capsys.readouterr().err.endswith(expected)
    monkeypatch.undo()
    assert run.main(["--resume", str(folder)]) == 0


# Processes that are killed.

# More of them: `KILLS=20 pytest -m "" tests/test_resume.py -k killed -s`.
KILLS = int(os.environ.get("KILLS", "4"))


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["none", "aver", "pg", "ppo", "ddpg", "sac", "mmkd"])
def test_a_run_that_is_killed_again_and_again_comes_to_the_same(
    algo: str, small: str, tmp_path: Path
) -> None:
    # Long enough, whatever is done before a kill comes.
    flags = ["--optimizer.epochs", str(20 * KILLS), "--cache", str(tmp_path / "cache")]
    config = configuration(small, algo, *flags)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_experiment(config, Interrupting(), whole)
    parts.mkdir()
    (parts / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    program = [sys.executable, str(Path(run.__file__)), "--resume", str(parts)]
    draw = random.Random(algo)
    amid_writing = kills = 0
    while kills < KILLS:
        # From the moment that there is something to lose.
        began = newest(parts)
        with subprocess.Popen(program, stdout=subprocess.DEVNULL) as process:
            while newest(parts) == began and process.poll() is None:
                time.sleep(0.005)
            # Every second one is aimed at the writing of a checkpoint.
            aimed = kills % 2
            until = time.monotonic() + (10 if aimed else draw.uniform(0, 0.3))
            while time.monotonic() < until and process.poll() is None:
                if aimed and unfinished(parts):
                    break
                time.sleep(0.0005)
            process.kill()
        if process.returncode == 0:
            break
        kills += 1
        amid_writing += unfinished(parts)
    subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
    print(f"{algo}: {kills} kills, {amid_writing} amid writing a checkpoint")  # noqa: T201 - asked for
    assert kills
    assert_same(whole, parts)


def unfinished(folder: Path) -> bool:
    """Whether a checkpoint is being written, or was when the process died."""
    return any(folder.glob("checkpoints/.new-step-*"))


def newest(folder: Path) -> str | None:
    """The name of the last checkpoint."""
    return max((path.name for path in folder.glob("checkpoints/step-*")), default=None)
