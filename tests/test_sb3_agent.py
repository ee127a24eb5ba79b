import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from agents import SB3Agent, algorithm_class, build_agent, check_agent
from agents.sb3 import _undisturbed
from experiments.config import parse_arguments
from experiments.run import main
from known_optimum import known_env, scores, started_env
from mtkd_env.action import generated_weights
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError
from tiny import NUM_ENVS, TEACHERS

M = len(TEACHERS)

# Enough steps for every shipped configuration to learn in the first of two epochs.
LONG = {"steps": 12, "num_envs": 16}

SHIPPED = ["ppo", "a2c", "ddpg", "td3", "sac"]
try:
    import sb3_contrib
except ImportError:
    CONTRIB = []
else:
    CONTRIB = ["trpo", "tqc", "crossq", "ars"]
    assert sb3_contrib

# Where there is no shipped configuration.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "tqc": {"learning_starts": 64, "policy_kwargs": {"net_arch": [16]}},
    "crossq": {"learning_starts": "1 epoch", "policy_kwargs": {"net_arch": [16]}},
    # Ten steps for every update of the policy, so it must be stopped amid one.
    "ars": {"n_delta": 5},
}


def arguments_of(name: str) -> dict[str, Any]:
    (config,) = parse_arguments(["--algo", name])
    return {**config.agent.arguments, **ARGUMENTS.get(name, {})}


def build(name: str, env: MTKDVectorEnv, *, seed: int = 0, **changes: Any) -> SB3Agent:
    agent = build_agent(name, env, seed=seed, arguments={**arguments_of(name), **changes})
    assert isinstance(agent, SB3Agent)
    return agent


def quick(env: MTKDVectorEnv, algorithm: str = "ppo", **arguments: Any) -> SB3Agent:
    """An agent without shipped arguments, cheap to build."""
    on_policy = {"n_steps": 2, "n_minibatches": 1, "n_epochs": 1} if algorithm == "ppo" else {}
    return SB3Agent(env, algorithm, **{**on_policy, **arguments})


def parameters(agent: SB3Agent) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in agent.model.policy.parameters()])


def student(env: MTKDVectorEnv) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in env.distiller.student.parameters()])


def ignore() -> None:
    """Ends an epoch."""


# Every algorithm.


@pytest.mark.parametrize("name", SHIPPED + CONTRIB)
def test_algorithms_learn_from_epochs_of_the_student(name: str) -> None:
    env = started_env(**LONG)
    agent = build(name, env)
    before, student_before = parameters(agent), student(env)
    ends: list[int] = []
    agent.learn(2, lambda: ends.append(env.steps))
    assert ends == [12, 24]
    assert env.steps == 24
    assert agent.model.num_timesteps == 24 * 16
    assert not student(env).equal(student_before)
    assert not parameters(agent).equal(before)
    assert parameters(agent).isfinite().all()
    action = agent.act(env.observation)
    assert action.shape == (16, 2 * M)
    assert action.abs().max() <= env.single_action_space.high[0]
    assert not action.requires_grad


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ppo", {"n_steps": 5, "n_minibatches": 1, "n_epochs": 1}),
        ("ppo", {"n_steps": 2, "n_minibatches": 1, "n_epochs": 1}),
        ("a2c", {"n_steps": 4}),
        ("td3", {"train_freq": 2, "learning_starts": 4, "batch_size": 4}),
    ],
    ids=str,
)
def test_epochs_end_exactly_whatever_the_length_of_a_rollout(
    name: str, arguments: dict[str, Any]
) -> None:
    env = started_env(steps=3)
    agent = build(name, env, **arguments)
    ends: list[int] = []
    agent.learn(2, lambda: ends.append(env.steps))
    agent.learn(1, lambda: ends.append(env.steps))
    assert ends == [3, 6, 9]
    assert env.steps == 9
    assert agent.model.num_timesteps == 9 * NUM_ENVS


def test_every_step_executes_the_policy_s_answer_to_the_batch_that_waits() -> None:
    env = started_env(fusion="generator")
    agent = quick(env, "ddpg", learning_starts=0, batch_size=4, buffer_size=64)
    expected: list[Tensor] = []
    executed: list[Tensor] = []
    distill = env.distill

    def spy(weights: Any) -> Any:
        expected.append(generated_weights(agent.act(env.observation)).logit)
        executed.append(weights.logit)
        return distill(weights)

    env.distill = spy
    agent.learn(1, ignore)
    # A second call must not act on what the first one saw last.
    agent.learn(1, ignore)
    assert len(executed) == 2 * env.steps_per_epoch
    torch.testing.assert_close(executed, expected)


def test_learning_goes_on_with_the_student_that_is_there() -> None:
    envs = started_env(), started_env()
    agents = [quick(env, seed=seed) for seed, env in enumerate(envs)]
    for env in envs:
        for _ in range(2):
            env.distill(env.to_weights(torch.zeros(NUM_ENVS, 2 * M)))
    before = student(envs[0])
    seen: list[int] = []
    envs[0].subscribe(lambda record: seen.append(record.step))
    agents[0].vec_env.reset()
    assert student(envs[0]).equal(before)
    # The student and its data are the environment's, whatever the algorithm's seed.
    assert student(envs[1]).equal(before)
    assert envs[0].observation.equal(envs[1].observation)
    agents[0].learn(1, ignore)
    assert seen[0] == 2


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_same_seed_gives_the_same_agent_and_student(name: str) -> None:
    def learned(seed: int) -> tuple[Tensor, Tensor]:
        env = started_env(**LONG)
        agent = build(name, env, seed=seed)
        agent.learn(2, ignore)
        return parameters(agent), student(env)

    first, second, other = learned(1), learned(1), learned(2)
    assert first[0].equal(second[0])
    assert first[1].equal(second[1])
    assert not first[0].equal(other[0])


@pytest.mark.parametrize("kwargs", [{"episode": "epoch"}, {"observation_dtype": "float16"}])
def test_other_episodes_and_precisions_work_too(kwargs: dict[str, Any]) -> None:
    env = started_env(**kwargs)
    agent = quick(env)
    agent.learn(2, ignore)
    assert env.steps == 2 * env.steps_per_epoch
    assert parameters(agent).isfinite().all()


def test_ppo_finds_the_one_best_teacher() -> None:
    agent = quick(
        known_env(num_envs=16), learning_rate=5e-3, n_steps=3, n_epochs=10, n_minibatches=1
    )
    found = scores(agent, 20)
    assert abs(found[0]) < 0.2
    assert found[-1] > 0.5


def test_the_students_convolutions_keep_their_flags() -> None:
    cudnn = torch.backends.cudnn
    with torch.backends.cudnn.flags(deterministic=False, benchmark=True):
        with _undisturbed():
            cudnn.deterministic, cudnn.benchmark = True, False
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
        with pytest.raises(ZeroDivisionError), _undisturbed():
            cudnn.deterministic, cudnn.benchmark = True, 1 / 0
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
        quick(started_env())
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)


# Arguments.


def test_numbers_may_be_given_in_epochs() -> None:
    env = started_env(steps=4)
    agent = quick(env, n_steps="2 epochs")
    assert agent.model.n_steps == 8
    assert agent.model.batch_size == 8 * NUM_ENVS
    agent = quick(
        env,
        "td3",
        train_freq="0.5 epochs",
        gradient_steps="1 epoch",
        learning_starts="1.5 epochs",
        batch_size="0.5 epochs",
        buffer_size="5 epochs",
    )
    model = agent.model
    assert model.train_freq.frequency == 2
    assert model.gradient_steps == 4
    # Samples, not steps.
    assert model.learning_starts == 6 * NUM_ENVS
    assert model.batch_size == 2 * NUM_ENVS
    assert model.replay_buffer.buffer_size * model.n_envs == 20 * NUM_ENVS


def test_rollouts_are_split_into_so_many_minibatches() -> None:
    agent = quick(started_env(), n_steps=3, n_minibatches=4)
    assert agent.model.batch_size == 3 * NUM_ENVS // 4


@pytest.mark.parametrize(
    ("noise_type", "kind"),
    [("normal", NormalActionNoise), ("ornstein-uhlenbeck", OrnsteinUhlenbeckActionNoise)],
)
def test_noise_is_given_by_its_size(noise_type: str, kind: type) -> None:
    agent = quick(started_env(), "ddpg", noise_type=noise_type, noise_std=0.3)
    noise = agent.model.action_noise
    assert isinstance(noise, kind)
    assert noise._sigma.tolist() == [0.3] * (2 * M)
    agent.model.learning_starts = 0
    agent.learn(1, ignore)
    assert quick(started_env(), "ddpg").model.action_noise is None


def test_policies_are_described_by_plain_values() -> None:
    given = {"net_arch": [8], "activation_fn": "ELU"}
    agent = quick(started_env(), policy_kwargs=given)
    kinds = {type(module) for module in agent.model.policy.modules()}
    assert nn.ELU in kinds
    assert nn.Tanh not in kinds
    assert given == {"net_arch": [8], "activation_fn": "ELU"}


def test_the_algorithm_runs_on_the_environments_device_unless_told_otherwise() -> None:
    env = started_env()
    own = f"{__name__}:OwnAlgorithm"
    assert quick(env, own, n_steps=2, n_minibatches=1).model.asked_for == env.device
    assert quick(env, own, n_steps=2, n_minibatches=1, device="meta").model.asked_for == "meta"


@pytest.mark.parametrize(
    ("algorithm", "arguments", "message"),
    [
        ("ppo", {"n_epochs": "1 epoch"}, "agent.arguments.n_epochs: cannot be given in epochs"),
        ("ppo", {"n_minibatches": 5}, "n_minibatches: 5 does not divide the 8 samples"),
        ("ppo", {"n_minibatches": 0}, "n_minibatches: 0 does not divide"),
        ("td3", {"n_minibatches": 2}, "n_minibatches: needs n_steps, which is not given"),
        ("ppo", {"n_steps": "0.01 epochs"}, "n_minibatches|ppo cannot be built"),
        ("ppo", {"noise_std": 0.1}, "ppo cannot be built.*action_noise"),
        ("ddpg", {"noise_std": 0.1, "noise_type": "norml"}, "noise_type.*did you mean 'normal'"),
        ("ppo", {"policy": "MlpPolcy"}, "ppo cannot be built.*MlpPolcy"),
        ("ppo", {"policy_kwargs": {"activation_fn": "Relu"}}, "activation_fn: torch.nn has no"),
        ("ppo", {"learning_rat": 1e-3}, "ppo cannot be built.*learning_rat"),
        ("dqn", {}, "dqn cannot be built.*Discrete"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used_are_named(
    algorithm: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        quick(started_env(), algorithm, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("pppo", {}, "unknown name 'pppo'; did you mean 'ppo'?"),
        ("SACC", {}, "did you mean 'sac'?"),
        ("ppo", {"learning_rat": 1}, "agent.arguments.learning_rat: unknown key; did you mean 'l"),
        ("td3", {"n_steps_": 1}, "agent.arguments.n_steps_: unknown key; did you mean 'n_steps'?"),
        ("stable_baselines3:PPOO", {}, "cannot load 'stable_baselines3:PPOO'"),
        ("no_such_module:PPO", {}, "cannot load 'no_such_module:PPO': No module named"),
        ("gymnasium:Env", {}, "'gymnasium:Env' is not a Stable-Baselines3 algorithm"),
        ("gymnasium:make", {}, "'gymnasium:make' is not a Stable-Baselines3 algorithm"),
    ],
)
def test_mistakes_are_found_before_anything_is_built(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_agent(name, arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_own_arguments_pass_the_check() -> None:
    check_agent("ppo", {"noise_std": 0.1, "n_minibatches": 2, "policy_kwargs": {}})


@pytest.mark.parametrize("name", ["ppo", "PPO", "Ppo", "stable_baselines3:PPO"])
def test_algorithms_are_found_by_name(name: str) -> None:
    assert algorithm_class(name) is stable_baselines3.PPO


def test_an_algorithm_of_the_users_own_is_found_in_its_module() -> None:
    agent = quick(started_env(), f"{__name__}:OwnAlgorithm", n_steps=2, n_minibatches=1)
    assert type(agent.model).__name__ == "OwnAlgorithm"


class OwnAlgorithm(stable_baselines3.PPO):
    """An algorithm of the user's own."""

    def __init__(self, *args: Any, device: Any = "auto", **kwargs: Any) -> None:
        super().__init__(*args, device="cpu", **kwargs)
        self.asked_for = device


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"'tqc' needs sb3-contrib.*mtkd-env\[contrib\]"):
        algorithm_class("tqc")
    assert algorithm_class("ppo") is stable_baselines3.PPO


# Files.


def test_saved_agents_are_read_by_the_algorithms_own_load(tmp_path: Path) -> None:
    env = started_env()
    agent = quick(env)
    agent.learn(1, ignore)
    agent.save(tmp_path)
    loaded = stable_baselines3.PPO.load(tmp_path / "agent.zip", device="cpu")
    observation = env.observation
    action, _ = loaded.predict(observation.numpy(), deterministic=True)
    assert np.array_equal(action, agent.act(observation).numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["agent.zip"]


def test_what_the_algorithm_logs_is_written_once_an_epoch(tmp_path: Path) -> None:
    env = started_env()
    agent = quick(env)
    agent.log_to(tmp_path)
    agent.learn(3, ignore)
    agent.model.logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "train/loss" in events.Tags()["scalars"]
    samples = env.steps_per_epoch * NUM_ENVS
    steps = [event.step for event in events.Scalars("train/loss")]
    assert set(steps) <= {samples, 2 * samples, 3 * samples}


# The shipped configurations on the digits, with a student that stands still.

REACHED = {"pg": 0.85, "ppo": 0.75, "a2c": 0.5, "ddpg": 0.5, "td3": 0.5, "sac": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("name", REACHED)
def test_shipped_configurations_find_a_known_optimum_on_real_images(
    name: str, tmp_path: Path
) -> None:
    still = ["--optimizer.lr", "0", "--env.fusion", "generator", "--optimizer.epochs", "30"]
    assert main(["--algo", name, *still, "--output", str(tmp_path), "--device", "cpu"]) == 0
    (found,) = tmp_path.glob("*/result.json")
    assert json.loads(found.read_text())["score"] >= REACHED[name]
