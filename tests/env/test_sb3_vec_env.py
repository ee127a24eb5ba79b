from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import vector as wrappers
from stable_baselines3 import A2C, DDPG, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import (
    VecCheckNan,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
)
from torch import nn

from mtkd_env.optimization import Recipe
from mtkd_env.testing import equal, random_action
from mtkd_env.wrappers.sb3 import SB3VecEnv
from refusals import bad_actions
from tiny import NUM_ENVS, STEPS_PER_EPOCH, TEACHERS, make_tiny_env

ONE_EPOCH = Recipe(epochs=1, lr=0.1)
M = len(TEACHERS)


def make(*, full_infos: bool = False, **kwargs: Any) -> SB3VecEnv:
    return SB3VecEnv(make_tiny_env(**kwargs), full_infos=full_infos)


def started(seed: int = 0, **kwargs: Any) -> SB3VecEnv:
    env = make(**kwargs)
    env.seed(seed)
    env.reset()
    return env


def step(env: Any, seed: int = 0) -> Any:
    return env.step(random_action(make_tiny_env(), seed))


# Steps.


@pytest.mark.parametrize("kwargs", [{}, {"episode": "epoch"}, {"observation_dtype": "float16"}])
def test_steps_are_those_of_the_environment(kwargs: dict[str, Any]) -> None:
    env, adapter = make_tiny_env(**kwargs), make(**kwargs)
    expected, _ = env.reset(seed=0)
    adapter.seed(0)
    assert equal(adapter.reset(), expected)
    for seed in range(STEPS_PER_EPOCH + 1):
        observation, reward, terminated, truncated, _ = env.step(random_action(env, seed))
        observations, rewards, dones, _ = step(adapter, seed)
        assert equal(observations, observation)
        assert equal(rewards, reward)
        assert equal(dones, terminated | truncated)
        assert observations.dtype == adapter.observation_space.dtype
        assert rewards.dtype == np.float32
        assert dones.dtype == np.bool_
        assert observations[0] in adapter.observation_space


def test_spaces_are_those_of_one_sample() -> None:
    env, adapter = make_tiny_env(), make()
    assert adapter.num_envs == NUM_ENVS
    assert adapter.observation_space == env.single_observation_space
    assert adapter.action_space == env.single_action_space
    assert adapter.render_mode is None


@pytest.mark.parametrize("episode", ["batch", "epoch"])
def test_a_step_fetches_one_tensor(episode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = started(episode=episode)
    fetched: list[int] = []
    fetch = torch.Tensor.cpu

    def count(tensor: torch.Tensor) -> torch.Tensor:
        fetched.append(tensor.numel())
        return fetch(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", count)
    width = env.observation_space.shape[0]
    observations, rewards, _, _ = step(env)
    assert fetched == [NUM_ENVS * (width + 1)]
    # Nothing is copied once more on the host: the observations are a part of what was fetched.
    assert observations.base is not None
    assert rewards.base is None
    assert observations.flags.c_contiguous


def test_returned_arrays_are_not_aliased() -> None:
    env = started()
    returned = [(env.reset(),), *(step(env, seed)[:3] for seed in range(3))]
    copies = deepcopy(returned)
    step(env, 3)
    assert equal(returned, copies)
    arrays = [array for arrays in returned for array in arrays]
    for first in range(len(arrays)):
        for second in range(first):
            assert not np.shares_memory(arrays[first], arrays[second])


def test_writing_into_returned_arrays_changes_nothing() -> None:
    env, untouched = started(full_infos=True), started(full_infos=True)
    env.reset().fill(1)
    for seed in range(2):
        found, expected = step(env, seed), deepcopy(step(untouched, seed))
        assert equal(found, expected)
        for array in (*found[:3], *(info["terminal_observation"] for info in found[3])):
            array.fill(1)


@pytest.mark.parametrize("case", ["one row", "NaN"])
def test_bad_actions_are_refused(case: str) -> None:
    env = started()
    action, message = bad_actions(env.env)[case]
    with pytest.raises(ValueError, match=message):
        env.step(action)


# Infos.


def test_terminated_rows_share_empty_infos_by_default() -> None:
    env = started()
    first, second = step(env, 0)[3], step(env, 1)[3]
    assert first is second
    assert first == [{}] * NUM_ENVS
    assert len({id(info) for info in first}) == NUM_ENVS


def test_full_infos_hold_what_stable_baselines_expects_of_done_rows() -> None:
    env, adapter = make_tiny_env(), started(full_infos=True)
    acted_on, _ = env.reset(seed=0)
    for seed in range(2):
        info = env.step(random_action(env, seed))[4]
        infos = step(adapter, seed)[3]
        for row in range(NUM_ENVS):
            assert equal(infos[row]["terminal_observation"], acted_on[row])
            assert infos[row]["TimeLimit.truncated"] is False
            for name in ("teacher_rewards", "advantages", "logit_weights", "feature_weights"):
                assert equal(infos[row][name], info[name][row])
            assert infos[row]["index"] == info["index"][row]
        acted_on = env.observation.numpy().copy()


@pytest.mark.parametrize("episode", ["epoch", "training"])
@pytest.mark.parametrize("full_infos", [False, True])
def test_truncated_rows_carry_their_last_observation_and_other_rows_none(
    episode: str, full_infos: bool
) -> None:
    arguments = {"episode": episode, "recipe": ONE_EPOCH}
    env, adapter = make_tiny_env(**arguments), started(full_infos=full_infos, **arguments)
    env.reset(seed=0)
    for seed in range(1, 2 * STEPS_PER_EPOCH + 1):
        info = env.step(random_action(env, seed))[4]
        _, _, dones, infos = step(adapter, seed)
        assert dones.all() == dones.any() == (seed % STEPS_PER_EPOCH == 0)
        for row in range(NUM_ENVS):
            assert ("terminal_observation" in infos[row]) == dones[row]
            assert ("TimeLimit.truncated" in infos[row]) == dones[row]
            assert ("advantages" in infos[row]) == full_infos
            if dones[row]:
                assert infos[row]["TimeLimit.truncated"] is True
                assert equal(infos[row]["terminal_observation"], info["final_obs"][row])


def test_full_infos_are_fresh() -> None:
    env = started(full_infos=True)
    first, second = step(env, 0)[3], step(env, 1)[3]
    assert not equal(first[0]["advantages"], second[0]["advantages"])
    assert not any(
        np.shares_memory(ours["terminal_observation"], theirs["terminal_observation"])
        for ours, theirs in zip(first, second, strict=True)
    )


# Seeds and resets.


def test_a_seed_takes_effect_at_the_next_reset_and_once() -> None:
    env = started(5)
    first = env.reset()
    env.seed(6)
    step(env)  # the student of before
    untouched = started(5)
    untouched.reset()
    step(untouched)
    module, expected = env.env.distiller.module, untouched.env.distiller.module.state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in module.state_dict().items())
    assert not np.allclose(env.reset(), first)
    assert env.env.steps == 0
    step(env)
    env.reset()  # no seed any more: the student goes on
    assert env.env.steps == 1


def test_options_reach_the_environment_once() -> None:
    env = started()
    step(env)
    env.set_options({"reinit": True})
    env.reset()
    assert env.env.steps == 0
    step(env)
    env.reset()
    assert env.env.steps == 1


# Attributes and methods.


def test_attributes_come_once_for_each_index() -> None:
    env = make()
    assert env.get_attr("steps") == [0] * NUM_ENVS
    assert env.get_attr("steps", indices=1) == [0]
    assert env.get_attr("teacher_names", indices=[0, 2]) == [tuple(TEACHERS)] * 2
    assert env.has_attr("distiller")
    assert not env.has_attr("nothing")


def test_attributes_are_set_for_all_or_not_at_all() -> None:
    env = make()
    env.set_attr("render_mode", "x")
    assert env.env.render_mode == "x"
    env.set_attr("render_mode", None, indices=range(NUM_ENVS))
    assert env.env.render_mode is None
    with pytest.raises(ValueError, match="indices: the sub-environments share one student"):
        env.set_attr("render_mode", "y", indices=[0])
    assert env.env.render_mode is None


def test_methods_are_called_once_for_all() -> None:
    env = started()
    results = env.env_method("evaluate", "train")
    assert len(results) == NUM_ENVS
    assert all(result is results[0] for result in results)
    assert results[0] == env.env.evaluate("train")
    assert len(env.env_method("evaluate", split="test", indices=[0])) == 1


def test_no_row_is_wrapped_or_has_an_image() -> None:
    env = make()
    assert env.env_is_wrapped(gymnasium.Wrapper) == [False] * NUM_ENVS
    assert env.env_is_wrapped(gymnasium.Wrapper, indices=0) == [False]
    assert list(env.get_images()) == [None] * NUM_ENVS


def test_a_wrapped_environment_is_refused_with_the_alternative() -> None:
    wrapped = wrappers.ClipAction(make_tiny_env())
    with pytest.raises(
        TypeError, match=r"expected an MTKDVectorEnv or .* without .* got ClipAction"
    ):
        SB3VecEnv(wrapped)


def test_closing_closes_the_environment() -> None:
    env = make()
    env.close()
    assert env.env.closed


# Stable-Baselines3's own wrappers.


@pytest.mark.parametrize("full_infos", [False, True])
@pytest.mark.parametrize("episode", ["batch", "epoch"])
def test_monitor_counts_episodes_and_leaves_the_shared_infos_alone(
    full_infos: bool, episode: str
) -> None:
    inner = started(full_infos=full_infos, episode=episode)
    env = VecMonitor(inner)
    env.reset()
    length = 1 if episode == "batch" else STEPS_PER_EPOCH
    returns = np.zeros(NUM_ENVS)
    for seed in range(length):
        _, rewards, dones, infos = step(env, seed)
        returns += rewards
    assert dones.all()
    for info, total in zip(infos, returns, strict=True):
        assert info["episode"]["l"] == length
        assert info["episode"]["r"] == pytest.approx(total, abs=1e-5)
    assert inner._empty_infos == [{}] * NUM_ENVS


@pytest.mark.parametrize("full_infos", [False, True])
def test_normalize_and_check_nan_wrap_the_adapter(full_infos: bool) -> None:
    inner = started(full_infos=full_infos)
    env = VecNormalize(VecCheckNan(VecMonitor(inner), raise_exception=True))
    raw = env.reset()
    for seed in range(3):
        observations, rewards, _, infos = step(env, seed)
        assert np.isfinite(observations).all()
        assert np.isfinite(rewards).all()
        assert ("terminal_observation" in infos[0]) == full_infos
    assert not np.allclose(env.get_original_obs(), observations)
    assert raw.shape == (NUM_ENVS, *env.observation_space.shape)


def test_check_nan_finds_a_bad_action_before_the_student_does() -> None:
    inner = started()
    env = VecCheckNan(inner, raise_exception=True)
    env.reset()
    action = random_action(inner.env)
    action[0, 0] = np.nan
    with pytest.raises(ValueError, match="nan"):
        env.step(action)
    assert inner.env.steps == 0


# Algorithms.

ON_POLICY = {"n_steps": 4, "gamma": 0.0, "gae_lambda": 1.0}
OFF_POLICY = {
    "learning_starts": NUM_ENVS,
    "batch_size": 4,
    "buffer_size": 100,
    "gamma": 0.0,
    "train_freq": 2,
    "gradient_steps": 1,
}
ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    "ppo": (PPO, ON_POLICY | {"batch_size": 8, "n_epochs": 1}),
    "a2c": (A2C, ON_POLICY),
    "sac": (SAC, OFF_POLICY),
    "ddpg": (DDPG, OFF_POLICY),
}


class Steps(BaseCallback):
    """Whether every step's arrays had the announced kind."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.rewards.append(self.locals["rewards"])
        return True


def build(name: str, env: Any) -> BaseAlgorithm:
    algorithm, arguments = ALGORITHMS[name]
    tiny_nets = {"net_arch": [8]}
    return algorithm("MlpPolicy", env, policy_kwargs=tiny_nets, seed=0, device="cpu", **arguments)


def learn(name: str, env: Any, steps: int = 8) -> tuple[BaseAlgorithm, Steps]:
    model, callback = build(name, env), Steps()
    model.learn(steps * NUM_ENVS, callback=callback, log_interval=None)
    return model, callback


def policy_of(model: BaseAlgorithm) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "episode"), list(zip(ALGORITHMS, 2 * ("batch", "epoch"), strict=True))
)
def test_algorithms_learn_from_the_environment(name: str, episode: str) -> None:
    env = make(episode=episode)
    model, callback = learn(name, VecCheckNan(env, raise_exception=True))
    assert model.num_timesteps == 8 * NUM_ENVS
    assert env.env.steps == len(callback.rewards) == 8
    before, after = policy_of(build(name, make())), policy_of(model)
    assert any(not after[key].equal(before[key]) for key in before)
    assert all(tensor.isfinite().all() for tensor in after.values())


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_algorithms_take_half_precision_observations(name: str) -> None:
    model, _ = learn(name, make(observation_dtype="float16"))
    buffer = getattr(model, "rollout_buffer", None) or model.replay_buffer
    assert model.observation_space.dtype == np.float16
    assert buffer.observations.dtype == np.float16
    assert buffer.observations[0].any()


def test_learning_on_after_loading_keeps_the_student(tmp_path: Path) -> None:
    env = make()
    model, _ = learn("a2c", env)
    model.save(tmp_path / "model.zip")
    loaded = A2C.load(tmp_path / "model.zip", device="cpu")
    loaded.set_env(env)
    loaded.learn(4 * NUM_ENVS)
    assert env.env.steps == 12


def test_shared_and_full_infos_teach_the_same() -> None:
    for name in ("a2c", "ddpg"):
        policies = [policy_of(learn(name, make(full_infos=full))[0]) for full in (False, True)]
        assert all(policies[0][key].equal(policies[1][key]) for key in policies[0])


def test_stable_baselines_refuses_the_environment_itself() -> None:
    """Why there is an adapter; if this fails, there need not be one."""
    env: Any = make_tiny_env()
    with pytest.raises((ValueError, AssertionError)):
        PPO("MlpPolicy", env)


# Evaluation by episodes.

WRAPPERS: dict[str, Any] = {
    "bare": lambda env: env,
    "monitored": VecMonitor,
    "normalized": lambda env: VecNormalize(VecMonitor(env)),
}


@pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped with a ``Monitor``")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_evaluating_a_policy_is_refused_before_a_student_is_trained(wrap: Any) -> None:
    env = wrap(make())
    model, _ = learn("a2c", env, steps=4)
    with pytest.raises(RuntimeError, match=r"every step trains its student; use env\.evaluate\(\)"):
        evaluate_policy(model, env)
    assert env.unwrapped.env.steps == 4
    model.learn(4 * NUM_ENVS)  # which resets as well
    assert env.unwrapped.env.steps == 8


@pytest.mark.parametrize("own", [False, True], ids=["another environment", "its own"])
def test_the_callback_that_evaluates_a_policy_is_refused(own: bool) -> None:
    env, other = VecMonitor(make()), VecMonitor(make())
    evaluated = env if own else other
    model = build("a2c", env)
    with pytest.raises(RuntimeError, match=r"agents\.callbacks\.StudentEvaluation"):
        model.learn(8 * NUM_ENVS, callback=EvalCallback(evaluated, eval_freq=2, verbose=0))
    assert env.unwrapped.env.steps == 0
    assert other.unwrapped.env.steps == 0


# Episodes that are truncated: what follows still counts.

# A reward of 1 in every step, and a critic that expects 10 everywhere.
REWARD, VALUE, GAMMA = 1.0, 10.0, 0.5


class ConstantReward(VecEnvWrapper):
    """Pays the same for every step."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        return observations, np.full_like(rewards, REWARD), dones, infos


class Returns(BaseCallback):
    """Keeps the returns of the last rollout."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.returns = self.model.rollout_buffer.returns.copy()


def expect_the_same_everywhere(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear)
    layer.weight.data.zero_()
    layer.bias.data.fill_(VALUE)


@pytest.mark.parametrize("full_infos", [False, True])
@pytest.mark.parametrize(
    ("episode", "expected"),
    [
        # R = r: nothing follows.
        ("batch", [1.0, 1.0, 1.0, 1.0]),
        # Episodes of two steps: R = r + γ V at the end, and r + γ (r + γ V) before.
        ("epoch", [4.0, 6.0, 4.0, 6.0]),
        ("training", [4.0, 6.0, 4.0, 6.0]),
    ],
)
def test_returns_count_what_follows_a_truncation(
    episode: str, expected: list[float], full_infos: bool
) -> None:
    inner = make(episode=episode, recipe=ONE_EPOCH, full_infos=full_infos)
    model = PPO(
        "MlpPolicy",
        ConstantReward(inner),
        n_steps=2 * STEPS_PER_EPOCH,
        batch_size=2 * STEPS_PER_EPOCH * NUM_ENVS,
        n_epochs=1,
        gamma=GAMMA,
        gae_lambda=1.0,
        device="cpu",
    )
    expect_the_same_everywhere(model.policy.value_net)
    callback = Returns()
    model.learn(2 * STEPS_PER_EPOCH * NUM_ENVS, callback=callback)
    assert np.allclose(callback.returns, np.array(expected)[:, None])


@pytest.mark.parametrize("full_infos", [False, True])
@pytest.mark.parametrize(
    ("episode", "target"),
    [("batch", REWARD), ("epoch", REWARD + GAMMA * VALUE), ("training", REWARD + GAMMA * VALUE)],
)
def test_replayed_targets_count_what_follows_a_truncation(
    episode: str, target: float, full_infos: bool
) -> None:
    inner = make(episode=episode, recipe=ONE_EPOCH, full_infos=full_infos)
    model = DDPG(
        "MlpPolicy",
        ConstantReward(inner),
        learning_rate=0.0,
        learning_starts=NUM_ENVS,
        batch_size=32,
        buffer_size=100,
        train_freq=2 * STEPS_PER_EPOCH,
        gamma=GAMMA,
        device="cpu",
    )
    for critic in (model.critic, model.critic_target):
        expect_the_same_everywhere(critic.qf0[-1])
    model.learn(2 * STEPS_PER_EPOCH * NUM_ENVS, log_interval=None)
    loss = model.logger.name_to_value["train/critic_loss"]
    assert loss == pytest.approx((VALUE - target) ** 2)


@pytest.mark.parametrize("episode", ["epoch", "training"])
def test_replayed_observations_after_a_truncation_are_the_last_ones_of_the_episode(
    episode: str,
) -> None:
    env = make_tiny_env(episode=episode, recipe=ONE_EPOCH)
    model, _ = learn("ddpg", SB3VecEnv(env), steps=2 * STEPS_PER_EPOCH)
    buffer = model.replay_buffer
    same = make_tiny_env(episode=episode, recipe=ONE_EPOCH)
    same.reset(seed=0)
    for step in range(2 * STEPS_PER_EPOCH):
        action = model.policy.unscale_action(buffer.actions[step])
        observation, _, _, truncated, info = same.step(action)
        last = info["final_obs"] if truncated.all() else observation
        assert np.allclose(buffer.next_observations[step], last, atol=1e-5)
        assert buffer.dones[step].all() == buffer.timeouts[step].all() == truncated.all()
        assert truncated.all() == (step % STEPS_PER_EPOCH == STEPS_PER_EPOCH - 1)
