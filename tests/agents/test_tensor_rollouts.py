"""Rollouts of tensors against those of Stable-Baselines3 itself, which are the reference."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecMonitor
from torch import Tensor

from agents import SB3Agent
from agents.tensor_rollouts import TensorRolloutBuffer, can_collect_tensors, on_tensors
from known_optimum import started_env
from mtkd_env.optimization import Recipe
from mtkd_env.testing import random_action
from mtkd_env.wrappers.sb3 import SB3VecEnv
from tiny import NUM_ENVS, STEPS_PER_EPOCH, TEACHERS, make_tiny_env

M = len(TEACHERS)
ROLLOUT = 3 * STEPS_PER_EPOCH

SHARED = {"n_steps": ROLLOUT, "seed": 3, "device": "cpu"}
MINIBATCHES = {"batch_size": ROLLOUT * NUM_ENVS // 2}
ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    "ppo": (PPO, {**SHARED, **MINIBATCHES, "n_epochs": 2}),
    "a2c": (A2C, SHARED),
}
try:
    from sb3_contrib import TRPO
except ImportError:
    pass
else:
    ALGORITHMS["trpo"] = (TRPO, {**SHARED, **MINIBATCHES, "n_critic_updates": 2})
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)

# Episodes of one step, and of two, which are truncated: the library computes the values that follow
# row by row, so that they differ by rounding.
EPISODES: dict[str, dict[str, Any]] = {
    "batch": {},
    "epoch": {"episode": "epoch"},
    "training": {"episode": "training", "recipe": Recipe(epochs=2, lr=0.1)},
}
FIELDS = ("observations", "actions", "rewards", "values", "log_probs", "advantages", "returns")
STEP = ("obs_tensor", "actions", "values", "log_probs", "clipped_actions", "new_obs", "dones")


class Watch(BaseCallback):
    """Keeps what a callback can see of every step and of every rollout.

    Args:
        most: Steps after which it ends the learning.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.steps: list[dict[str, Any]] = []
        self.infos: list[list[set[str]]] = []
        self.rollouts: list[dict[str, Any]] = []
        self._most = most

    def _on_step(self) -> bool:
        self.steps.append({name: array(self.locals[name]) for name in (*STEP, "rewards")})
        self.steps[-1]["num_timesteps"] = self.num_timesteps
        self.infos.append([set(info) for info in self.locals["infos"]])
        return len(self.steps) != self._most

    def _on_rollout_end(self) -> None:
        buffer = self.locals["rollout_buffer"]
        self.rollouts.append({name: array(getattr(buffer, name)) for name in FIELDS})
        self.rollouts[-1]["episode_starts"] = buffer.episode_starts.copy()
        self.rollouts[-1]["last values"] = array(self.locals["values"])
        self.rollouts[-1]["n_steps"] = self.locals["n_steps"]


def array(value: Any) -> np.ndarray:
    return np.array(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)


def model(name: str, *, tensors: bool, env: Any = None, **changes: Any) -> BaseAlgorithm:
    algorithm, arguments = ALGORITHMS[name]
    made = on_tensors(algorithm) if tensors else algorithm
    small = {"policy_kwargs": {"net_arch": [8]}}
    env = env or SB3VecEnv(make_tiny_env())
    return made("MlpPolicy", env, **{**arguments, **small, **changes})


def learned(
    name: str, *, tensors: bool, rollouts: int = 2, most: int | None = None, **changes: Any
) -> tuple[BaseAlgorithm, Watch]:
    found, watch = model(name, tensors=tensors, **changes), Watch(most)
    found.learn(rollouts * ROLLOUT * NUM_ENVS, callback=watch, log_interval=None)
    return found, watch


def parameters(found: BaseAlgorithm) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in found.policy.state_dict().items()}


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    """What a callback saw, and what the policy became."""
    assert ours[1].infos == theirs[1].infos
    for found, expected in zip(ours[1].steps, theirs[1].steps, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for found, expected in zip(ours[1].rollouts, theirs[1].rollouts, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    after = parameters(ours[0]), parameters(theirs[0])
    torch.testing.assert_close(*after, rtol=tolerance, atol=tolerance)
    assert ours[0].num_timesteps == theirs[0].num_timesteps
    logs = (dict(one[0].logger.name_to_value) for one in (ours, theirs))
    torch.testing.assert_close(*logs, rtol=1e-5, atol=1e-5, equal_nan=True)


# The same numbers.


@every_algorithm
@pytest.mark.parametrize("episode", EPISODES)
def test_rollouts_and_updates_are_the_library_s(name: str, episode: str) -> None:
    # A student makes much of what is rounded differently, so that it is followed up to an update.
    rollouts, tolerance = (2, 0) if episode == "batch" else (1, 1e-6)
    ours, theirs = (
        learned(
            name,
            tensors=tensors,
            rollouts=rollouts,
            env=SB3VecEnv(make_tiny_env(**EPISODES[episode])),
            gamma=0.9,
            gae_lambda=0.8,
        )
        for tensors in (True, False)
    )
    assert type(ours[0].rollout_buffer) is TensorRolloutBuffer
    assert type(theirs[0].rollout_buffer) is RolloutBuffer
    assert_same(ours, theirs, tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sde": True, "sde_sample_freq": 2},
        {"use_sde": True, "policy_kwargs": {"net_arch": [8], "squash_output": True}},
        {"policy_kwargs": {"net_arch": [8], "log_std_init": 3.0}},  # most actions are clipped
    ],
    ids=["noise that depends on the state", "squashed", "clipped"],
)
def test_actions_are_executed_as_the_library_does(changes: dict[str, Any]) -> None:
    ours, theirs = (learned("ppo", tensors=tensors, **changes) for tensors in (True, False))
    assert_same(ours, theirs, 1e-6)
    executed = np.stack([step["clipped_actions"] for step in ours[1].steps])
    assert np.abs(executed).max() <= 3


@pytest.mark.parametrize("episode", EPISODES)
def test_half_precision_observations_stay_so(episode: str) -> None:
    kinds = {"observation_dtype": "float16", **EPISODES[episode]}
    ours, theirs = (
        learned("ppo", tensors=tensors, rollouts=1, env=SB3VecEnv(make_tiny_env(**kinds)))
        for tensors in (True, False)
    )
    assert_same(ours, theirs, 1e-6)
    assert ours[0].rollout_buffer.observations.dtype == torch.float16


@pytest.mark.parametrize("full_infos", [False, True])
@pytest.mark.parametrize("episode", ["batch", "epoch"])
def test_infos_are_those_of_the_adapter(full_infos: bool, episode: str) -> None:
    ours, theirs = (
        learned(
            "a2c",
            tensors=tensors,
            rollouts=1,
            env=SB3VecEnv(make_tiny_env(**EPISODES[episode]), full_infos=full_infos),
        )
        for tensors in (True, False)
    )
    assert_same(ours, theirs, 1e-6)
    assert any(ours[1].infos[1]) == (full_infos or episode == "epoch")


def test_under_a_wrapper_it_collects_as_the_library() -> None:
    ours, theirs = (
        learned("ppo", tensors=tensors, env=VecMonitor(SB3VecEnv(make_tiny_env())))
        for tensors in (True, False)
    )
    assert_same(ours, theirs, 0)
    assert len(ours[0].ep_info_buffer) == len(theirs[0].ep_info_buffer) > 0


@pytest.mark.parametrize("batch_size", [1, 5, 8, None])
def test_minibatches_are_the_library_s(batch_size: int | None) -> None:
    box = Box(-1, 1, (3,), np.float32)
    reference = RolloutBuffer(4, box, box, device="cpu", gamma=0.9, gae_lambda=0.8, n_envs=2)
    buffer = TensorRolloutBuffer(reference)
    draw = np.random.default_rng(0)
    for one in (reference, buffer):
        draw = np.random.default_rng(0)
        for _ in range(4):
            rows = [draw.normal(size=(2, 3)).astype(np.float32) for _ in range(2)]
            numbers = torch.from_numpy(draw.normal(size=(3, 2)).astype(np.float32))
            starts = draw.random(2) < 0.5
            one.add(*rows, numbers[0].numpy(), starts, numbers[1:2].T, numbers[2])
        one.compute_returns_and_advantage(torch.ones(2, 1), np.array([True, False]))
        np.random.seed(0)  # noqa: NPY002 - what the library draws from
        one.drawn = list(one.get(batch_size))
    torch.testing.assert_close(buffer.drawn, reference.drawn, rtol=0, atol=0)


def test_the_buffer_is_made_once() -> None:
    ours = model("ppo", tensors=True)
    places = set()

    class Place(BaseCallback):
        def _on_step(self) -> bool:
            places.add(self.model.rollout_buffer.observations.data_ptr())
            return True

    ours.learn(3 * ROLLOUT * NUM_ENVS, callback=Place())
    assert len(places) == 1


# Around rollouts everything is as the library leaves it.


def test_a_callback_may_end_the_learning() -> None:
    ours, theirs = (learned("ppo", tensors=tensors, most=8) for tensors in (True, False))
    assert_same(ours, theirs, 0)
    assert len(ours[1].steps) == 8
    assert np.array_equal(ours[0]._last_obs, theirs[0]._last_obs)


def test_outside_of_rollouts_there_are_arrays() -> None:
    ours, theirs = (learned("a2c", tensors=tensors) for tensors in (True, False))
    assert isinstance(ours[0]._last_obs, np.ndarray)
    assert np.array_equal(ours[0]._last_obs, theirs[0]._last_obs)
    assert np.array_equal(ours[0]._last_episode_starts, theirs[0]._last_episode_starts)
    assert vars(ours[0]).keys() == vars(theirs[0]).keys()


def test_learning_goes_on_where_it_ended() -> None:
    ours, theirs = (learned("ppo", tensors=tensors)[0] for tensors in (True, False))
    for one in (ours, theirs):
        set_random_seed(0)
        one.learn(ROLLOUT * NUM_ENVS, reset_num_timesteps=False)
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=0, atol=0)


def test_saved_models_are_the_library_s(tmp_path: Path) -> None:
    ours, theirs = (learned("ppo", tensors=tensors)[0] for tensors in (True, False))
    described = []
    for name, one in (("ours", ours), ("theirs", theirs)):
        one.save(tmp_path / f"{name}.zip")
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as file:
            data = json.loads(file.read("data"))
        assert "agents." not in str(data)
        described.append(data.keys())
    assert described[0] == described[1]
    loaded = PPO.load(tmp_path / "ours.zip", device="cpu")
    assert type(loaded) is PPO
    assert type(loaded.rollout_buffer) is RolloutBuffer
    assert all(tensor.equal(parameters(ours)[key]) for key, tensor in parameters(loaded).items())
    again = on_tensors(PPO).load(tmp_path / "ours.zip", device="cpu")
    assert type(again.rollout_buffer) is TensorRolloutBuffer
    for one in (loaded, again):
        env = SB3VecEnv(make_tiny_env())
        env.env.reset(seed=0)
        one.set_env(env)
        one.set_random_seed(0)
        env._reset_seeds()
        one.learn(ROLLOUT * NUM_ENVS)
    torch.testing.assert_close(parameters(loaded), parameters(again), rtol=0, atol=0)


# As an agent.


class OwnAlgorithm(PPO):
    """One that is updated in a way of its own."""

    def train(self) -> None:
        super().train()
        self.trained = getattr(self, "trained", 0) + 1


class OwnRollouts(PPO):
    """One that collects in a way of its own."""

    def collect_rollouts(self, *arguments: Any, **named: Any) -> bool:
        return super().collect_rollouts(*arguments, **named)


class OwnBuffer(RolloutBuffer):
    """A buffer of one's own."""


def agent(algorithm: str = "ppo", **arguments: Any) -> SB3Agent:
    given = {"n_steps": 2, **arguments}
    return SB3Agent(started_env(), algorithm, **given)


@pytest.mark.parametrize(
    ("algorithm", "arguments", "on_device"),
    [
        ("ppo", {"batch_size": 8}, True),
        ("a2c", {}, True),
        (f"{__name__}:OwnAlgorithm", {"batch_size": 8}, True),
        ("ppo", {"batch_size": 8, "tensor_rollouts": True}, True),
        ("ppo", {"batch_size": 8, "tensor_rollouts": False}, False),
        ("a2c", {"rollout_buffer_class": OwnBuffer}, False),
        (f"{__name__}:OwnRollouts", {"batch_size": 8}, False),
    ],
    ids=str,
)
def test_agents_collect_tensors_where_they_can(
    algorithm: str, arguments: dict[str, Any], on_device: bool
) -> None:
    made = agent(algorithm, **arguments)
    kind = arguments.get("rollout_buffer_class", RolloutBuffer)
    assert type(made.model.rollout_buffer) is (TensorRolloutBuffer if on_device else kind)
    made.learn(2, lambda: None)
    assert made.env.steps == 6
    if "OwnAlgorithm" in algorithm:
        assert made.model.trained == 2
        assert type(made.model).__name__ == "OwnAlgorithm"


def test_students_of_both_kinds_of_agents_are_the_same() -> None:
    students = []
    for tensors in (True, False):
        made = agent(batch_size=4, tensor_rollouts=tensors)
        made.learn(2, lambda: None)
        students.append(made.env.distiller.module.state_dict())
    torch.testing.assert_close(*students, rtol=0, atol=0)


def test_algorithms_that_cannot_collect_tensors_are_known() -> None:
    assert not can_collect_tensors(SAC, {})
    assert not can_collect_tensors(OwnRollouts, {})
    assert not can_collect_tensors(PPO, {"rollout_buffer_class": OwnBuffer})


# Steps of the adapter.


@pytest.mark.parametrize("episode", EPISODES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_steps_of_tensors_are_those_of_arrays(episode: str, dtype: str) -> None:
    pair = [
        SB3VecEnv(make_tiny_env(observation_dtype=dtype, **EPISODES[episode])) for _ in range(2)
    ]
    for env in pair:
        env.seed(0)
        env.reset()
    for seed in range(2 * STEPS_PER_EPOCH):
        actions = random_action(pair[0].env, seed)
        found = pair[0].step_tensors(torch.from_numpy(actions))
        observations, rewards, dones, infos = pair[1].step(actions)
        assert np.array_equal(found.observations.numpy(), observations)
        assert found.observations.numpy().dtype == observations.dtype
        assert np.array_equal(found.rewards.numpy(), rewards)
        assert np.array_equal(found.dones, dones)
        truncated = "terminal_observation" in infos[0]
        assert (found.final_observations is not None) == truncated
        if found.final_observations is not None:
            last = np.stack([info["terminal_observation"] for info in infos])
            assert np.array_equal(found.final_observations.numpy(), last)
            assert found.infos[0].keys() == infos[0].keys()


def test_steps_of_tensors_share_nothing_with_later_ones() -> None:
    env = SB3VecEnv(make_tiny_env())
    env.reset()
    first = env.step_tensors(torch.zeros(NUM_ENVS, 2 * M))
    kept = first.observations.clone(), first.rewards.clone()
    second = env.step_tensors(torch.ones(NUM_ENVS, 2 * M))
    assert first.observations.equal(kept[0])
    assert first.rewards.equal(kept[1])
    first.observations.zero_()
    assert env.env.observation.any()
    assert second.observations.any()


def test_tensors_of_actions_of_another_shape_are_refused() -> None:
    env = SB3VecEnv(make_tiny_env())
    env.reset()
    with pytest.raises(ValueError, match=r"actions: expected shape \(4, 6\), got \(1, 6\)"):
        env.step_tensors(torch.zeros(1, 2 * M))
    assert env.env.steps == 0


@pytest.mark.gpu
def test_rollouts_stay_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = agent(batch_size=8, device="cuda")
    get, learned = made.model.rollout_buffer.get, []

    def watched(size: int) -> Iterator[Any]:
        for samples in get(size):
            learned.append(samples)
            yield samples

    monkeypatch.setattr(made.model.rollout_buffer, "get", watched)
    made.learn(2, lambda: None)
    assert learned
    assert all(part.is_cuda for samples in learned for part in samples)
    assert all(part.isfinite().all() for part in made.model.policy.parameters())
