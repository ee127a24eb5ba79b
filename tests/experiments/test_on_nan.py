"""Batches that are NaN or infinite can be skipped: the rest is as if they had never been drawn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import (
    EPOCHS,
    STEPS,
    Interrupting,
    assert_same,
    configuration,
    leaves,
    terminate,
)

from agents import build_agent
from experiments import run
from experiments.config import ExperimentConfig
from experiments.experiment import build, run_experiment
from experiments.running.log import read_rows
from mtkd_env import ConfigError, MTKDVectorEnv, Recipe
from mtkd_env.data import BatchStream
from mtkd_env.env import MOST_SKIPPED
from mtkd_env.types import Batch, TeacherWeights
from processes import two_processes
from tiny import NUM_ENVS, make_tiny_env, training_set

SAMPLE = 5
BAD = pytest.mark.filterwarnings("ignore:skipped a batch")


class Stream(BatchStream):
    """Batches in which one sample is bad, or without the batches that have it.

    Attributes:
        value: What the sample's pixels are; None leaves out its batches.
    """

    value: float | None = torch.nan

    def __next__(self) -> Batch:
        batch = super().__next__()
        bad = batch.index == SAMPLE
        if not bad.any():
            return batch
        if self.value is None:
            return next(self)
        inputs = batch.inputs.clone()
        inputs[bad] = self.value
        return replace(batch, inputs=inputs)


def poisoned(value: float | None) -> BatchStream:
    stream = training_set(4 * NUM_ENVS).stream(NUM_ENVS, torch.device("cpu"), 0)
    stream.__class__ = type("Poisoned", (Stream,), {"value": value})
    return stream


def make_env(batches: BatchStream | None = None, **kwargs: Any) -> MTKDVectorEnv:
    batches = batches or training_set(4 * NUM_ENVS).stream(NUM_ENVS, torch.device("cpu"), 0)
    env = make_tiny_env(batches=batches, recipe=Recipe(epochs=4, lr=0.05), **kwargs)
    env.reset(seed=0)
    return env


def state_of(env: MTKDVectorEnv) -> list[Any]:
    state = env.distiller.state_dict()
    del state["skipped"]
    return leaves([state, env.normalizer and env.normalizer.state_dict()])


def train(env: MTKDVectorEnv, algo: str = "pg") -> list[Any]:
    agent = build_agent(algo, env, seed=0, arguments={})
    agent.warm_up(env.steps_per_epoch)
    agent.learn(2, lambda: None)
    return leaves(agent.state_dict())


@BAD
@pytest.mark.parametrize(
    ("algo", "value"),
    [("uniform", 1e30), ("pg", torch.nan), ("mmkd", torch.inf), ("reinforce", torch.nan)],
)
def test_a_bad_batch_is_as_if_it_had_never_been_drawn(algo: str, value: float) -> None:
    env, without = make_env(poisoned(value), on_nan="skip"), make_env(poisoned(None))
    assert train(env, algo) == train(without, algo)
    assert env.steps == without.steps
    assert state_of(env) == state_of(without)
    assert env.distiller.skipped > 0
    assert without.distiller.skipped == 0


@pytest.mark.parametrize("algo", ["uniform", "pg", "mmkd"])
def test_where_nothing_is_bad_skipping_changes_no_bit(algo: str) -> None:
    env, other = make_env(on_nan="skip"), make_env(on_nan="stop")
    assert train(env, algo) == train(other, algo)
    assert state_of(env) == state_of(other)
    assert env.distiller.skipped == 0


def test_a_warning_says_which_images_are_to_blame() -> None:
    with pytest.warns(UserWarning, match=r"skipped a batch after step \d: .* images \[5\] are so"):
        train(make_env(poisoned(torch.nan), on_nan="skip"))


@BAD
def test_no_agent_sees_a_bad_batch() -> None:
    env = make_env(poisoned(torch.nan), on_nan="skip")
    indices: list[int] = []
    env.subscribe(lambda record: indices.extend(record.index.tolist()))
    for _ in range(3 * env.steps_per_epoch):
        assert env.observation.isfinite().all()
        env.distill(TeacherWeights.uniform(env.state.divergence))
    assert SAMPLE not in indices


def break_gradients(env: MTKDVectorEnv) -> None:
    parameter = next(env.distiller.module.parameters())
    parameter.register_hook(lambda gradient: gradient * torch.nan)


def test_a_step_with_a_bad_gradient_is_left_out_and_counted() -> None:
    env = make_env(on_nan="skip")
    state = env.state
    before = [parameter.clone() for parameter in env.distiller.module.parameters()]
    break_gradients(env)
    record = env.distill(TeacherWeights.uniform(state.divergence))
    after = list(env.distiller.module.parameters())
    assert all(old.equal(new) for old, new in zip(before, after, strict=True))
    assert record.losses.total.isfinite().all()
    assert env.distiller.skipped == env.steps == 1
    assert env.distiller.schedule.last_epoch == 1


def test_by_default_a_bad_gradient_reaches_the_student() -> None:
    env = make_env()
    break_gradients(env)
    env.distill(TeacherWeights.uniform(env.state.divergence))
    assert env.distiller.skipped == 0
    assert next(env.distiller.module.parameters()).isnan().all()


def test_a_broken_student_ends_the_skipping() -> None:
    env = make_env(on_nan="skip")
    next(env.distiller.module.parameters()).data.fill_(torch.nan)
    env._forget_batch()
    message = f"^{MOST_SKIPPED} batches one after the other .* step 0.* student that is broken"
    told = pytest.warns(UserWarning, match="images are finite")
    with told, pytest.raises(FloatingPointError, match=message):
        assert env.state


def test_other_choices_are_refused(small: str) -> None:
    with pytest.raises(ConfigError, match="unknown on_nan 'ignore'"):
        make_env(on_nan="ignore")
    with pytest.raises(ConfigError, match="unknown on_nan 'skipp'; did you mean 'skip'"):
        configuration(small, "pg", "--on-nan", "skipp")


def test_the_choice_makes_no_other_run(small: str) -> None:
    skipping = configuration(small, "pg", "--on-nan", "skip")
    assert skipping.env.on_nan == "skip"
    assert configuration(small, "pg", "--env.on_nan=skip") == skipping
    assert configuration(small, "pg").digest == skipping.digest


# Several processes.


def _skipped_together() -> tuple[int, list[Any]]:
    env = make_env(poisoned(torch.nan), on_nan="skip")
    for _ in range(2 * env.steps_per_epoch):
        env.distill(TeacherWeights.uniform(env.state.divergence))
    return env.distiller.skipped, state_of(env)


@BAD
@pytest.mark.slow
def test_all_processes_skip_what_is_bad_in_one(tmp_path: Path) -> None:
    with two_processes(tmp_path) as pair:
        (first, its), (second, others) = pair(_skipped_together)
    assert first == second > 0
    assert its == others


# Runs.


@pytest.fixture
def bad_images(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the training images has become NaN, after the teachers have seen it."""
    build(configuration(small, "pg"), Interrupting())
    draw = BatchStream.__next__

    def drawn(self: BatchStream) -> Batch:
        batch = draw(self)
        inputs = batch.inputs.clone()
        inputs[batch.index == SAMPLE] = torch.nan
        return replace(batch, inputs=inputs)

    monkeypatch.setattr(BatchStream, "__next__", drawn)


def assert_skips(config: ExperimentConfig, folder: Path) -> int:
    result = run_experiment(config, Interrupting(), folder)
    rows = read_rows(folder)
    assert len(rows) == EPOCHS
    assert result.skipped == sum(row["skipped"] for row in rows) > 0
    return result.skipped


SLOW = [pytest.param(algo, marks=pytest.mark.slow) for algo in ("ppo", "sac")]


@BAD
@pytest.mark.usefixtures("bad_images")
@pytest.mark.parametrize("algo", ["pg", *SLOW])
def test_an_interrupted_run_skips_the_same_batches(algo: str, small: str, tmp_path: Path) -> None:
    config = configuration(small, algo, "--env.on_nan", "skip")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert_skips(config, whole)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, Interrupting(STEPS + 2, terminate), parts)
    run_experiment(config, Interrupting(), parts, resume=True)
    assert_same(whole, parts)


@BAD
@pytest.mark.usefixtures("bad_images")
def test_a_run_that_has_stopped_goes_on_skipping(small: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(FloatingPointError, match="of steps 1 to 4"):
        run_experiment(configuration(small, "pg"), Interrupting(), folder)
    assert run.main(["--resume", str(folder), "--on-nan", "skip"]) == 0
    assert_skips(configuration(small, "pg", "--on-nan", "skip"), tmp_path / "whole")
    assert_same(tmp_path / "whole", folder)
