"""Agents of other libraries, and of none, learn in the environment as it is."""

import sys
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.examples import cleanrl_ppo, optuna_pg, torchrl_ppo
from experiments.examples.cleanrl_ppo import Rollout, advantages_of
from known_optimum import known_env, started_env
from mtkd_env.env import MTKDVectorEnv
from tiny import NUM_ENVS, STEPS_PER_EPOCH, make_tiny_env

# Deprecated within TorchRL itself, at its import and while it runs.
QUIET = (
    "ignore:Creating .* which inherits from WeightUpdaterBase is deprecated:DeprecationWarning",
)


def student(env: MTKDVectorEnv) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in env.distiller.student.parameters()])


# PPO in one file.


@pytest.fixture
def _torchrl() -> None:
    pytest.importorskip("torchrl")


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("program", [cleanrl_ppo, torchrl_ppo])
def test_ppo_earns_more_than_equal_weights(program: ModuleType) -> None:
    """In a problem in which one teacher pays."""
    if program is torchrl_ppo:
        pytest.importorskip("torchrl")
    env = known_env(num_envs=16, output="torch")
    rewards = program.train(env, epochs=8, seed=0)
    assert len(rewards) == 8
    assert env.steps == 8 * env.steps_per_epoch
    assert abs(rewards[0]) < 0.1
    assert rewards[-1] > 0.15


@pytest.mark.parametrize("episode", ["epoch", "training"])
def test_ppo_in_one_file_takes_longer_episodes(episode: str) -> None:
    env = started_env(output="torch", episode=episode)
    assert np.isfinite(cleanrl_ppo.train(env, epochs=2, seed=0)).all()


def test_ppo_in_one_file_is_reproducible() -> None:
    first, second, other = (
        cleanrl_ppo.train(started_env(output="torch"), epochs=2, seed=seed) for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize("done", [0, 1])
def test_advantages_stop_at_the_end_of_an_episode(done: int) -> None:
    empty = torch.zeros(2, 1)
    rollout = Rollout(
        observations=empty,
        actions=empty,
        log_probs=empty,
        values=torch.full((2, 1), 2.0),
        rewards=torch.tensor([[3.0], [4.0]]),
        dones=torch.full((2, 1), float(done)),
    )
    found = advantages_of(rollout, torch.full((1,), 5.0)).squeeze(1)
    # r + γ V' - V, plus γ λ times the advantage that follows, with γ = 0.99 and λ = 0.95.
    last = 4 + 0.99 * 5 - 2
    going_on = [3 + 0.99 * 2 - 2 + 0.99 * 0.95 * last, last]
    assert found.tolist() == pytest.approx([3 - 2, 4 - 2] if done else going_on)


# TorchRL.


@pytest.mark.usefixtures("_torchrl")
@pytest.mark.filterwarnings(*QUIET)
class TestTorchRL:
    """What TorchRL does with the environment without any adapter of ours."""

    @pytest.mark.parametrize("output", ["numpy", "torch"])
    @pytest.mark.parametrize("episode", ["batch", "epoch"])
    def test_rollouts_are_the_steps_of_the_environment(self, output: str, episode: str) -> None:
        arguments = {"episode": episode, "output": output}
        wrapped = torchrl_ppo.wrap(make_tiny_env(**arguments), seed=3)
        steps = 2 * STEPS_PER_EPOCH + 1
        found = wrapped.rollout(steps, break_when_any_done=False)
        assert found.batch_size == (NUM_ENVS, steps)
        env = make_tiny_env(episode=episode)
        observation, _ = env.reset(seed=3)
        for step in range(steps):
            row = found[:, step]
            assert np.array_equal(row["observation"], observation)
            observation, reward, terminated, truncated, info = env.step(row["action"])
            following = row["next"]
            assert np.array_equal(following["reward"].squeeze(-1), reward)
            assert np.array_equal(following["terminated"].squeeze(-1), terminated)
            assert np.array_equal(following["truncated"].squeeze(-1), truncated)
            assert np.array_equal(following["observation"], info.get("final_obs", observation))
            assert np.array_equal(following["advantages"], info["advantages"])

    def test_a_seed_after_wrapping_starts_a_student_of_that_seed(self) -> None:
        env, untouched = make_tiny_env(), make_tiny_env()
        torchrl_ppo.wrap(env, seed=3)
        untouched.reset(seed=3)
        assert env.steps == 0
        assert student(env).equal(student(untouched))


# The programs.


@pytest.mark.parametrize("program", [cleanrl_ppo, torchrl_ppo])
def test_the_programs_make_the_environment_that_their_flags_describe(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Any] = []

    def make_vec(name: str, **kwargs: Any) -> MTKDVectorEnv:
        made.append((name, kwargs))
        chosen = {key: kwargs[key] for key in ("reward", "fusion", "output")}
        return make_tiny_env(**chosen)

    def train(env: MTKDVectorEnv, epochs: int, seed: int) -> None:
        made.append((env.observer.width > 0, epochs, seed))

    monkeypatch.setattr(gymnasium, "make_vec", make_vec)
    monkeypatch.setattr(program, "train", train)
    monkeypatch.setitem(sys.modules, "torchrl", ModuleType("torchrl"))
    flags = ["--epochs", "3", "--seed", "5", "--reward", "paper", "--fusion", "paper"]
    assert program.main([*flags, "--batch-size", "8"]) == 0
    (name, kwargs), trained = made
    assert name == "MTKD/Digits-v0"
    assert (kwargs["num_envs"], kwargs["reward"], kwargs["fusion"]) == (8, "paper", "paper")
    assert kwargs["epochs"] == 3
    assert trained == (True, 3, 5)
    assert not capsys.readouterr().err


def test_what_is_printed_is_one_line_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    cleanrl_ppo.train(started_env(output="torch"), epochs=2, seed=0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("epoch   2  reward")
    assert lines[1].endswith("%")


@pytest.mark.parametrize("program", [cleanrl_ppo, torchrl_ppo])
@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--reward", "papr"], "--reward"), (["--fusion", "papr"], "did you mean 'paper'")],
)
def test_mistakes_in_flags_are_named(
    program: ModuleType,
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torchrl", ModuleType("torchrl"))
    with pytest.raises(SystemExit) as ended:
        program.main(flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("package", "program"), [("torchrl", torchrl_ppo), ("optuna", optuna_pg)])
def test_without_its_package_a_program_says_what_to_install(
    package: str,
    program: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(gymnasium, "make_vec", lambda *_, **__: make_tiny_env())
    with pytest.raises(SystemExit) as ended:
        program.main([])
    assert ended.value.code == 2
    assert f"pip install 'mtkd-env[{package}]'" in capsys.readouterr().err


def test_optuna_tunes_by_students_of_one_seed_and_prunes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("optuna")
    env = make_tiny_env()
    monkeypatch.setattr(env, "splits", {"val": env.splits["test"]})
    study = optuna_pg.tune(env, epochs=2, trials=3, seed=0)
    assert len(study.trials) == 3
    assert 0 <= study.best_value <= 1
    assert all(len(trial.intermediate_values) == 2 for trial in study.trials)
