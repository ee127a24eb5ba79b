"""Policies of Stable-Baselines3 that the teachers share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from agents import SB3Agent, build_agent, check_agent
from known_optimum import started_env
from mtkd_env.errors import ConfigError
from mtkd_env.observation import RelativeObserver
from tiny import SB3_ARGUMENTS, generator

WIDTH, M, SIZE = RelativeObserver.features_per_teacher, 3, 5
ALGORITHMS = ("ppo", "a2c", "trpo", "sac", "td3", "ddpg")
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def agent(name: str, **arguments: Any) -> SB3Agent:
    if name == "trpo":
        pytest.importorskip("sb3_contrib")
    arguments = {"policy_kwargs": {"net_arch": [16, 8]}, "policy": "shared"} | arguments
    env = started_env(observation="relative", fusion="generator")
    made = build_agent(name, env, seed=0, arguments=SB3_ARGUMENTS.get(name, {}) | arguments)
    assert isinstance(made, SB3Agent)
    return made


def seen() -> Tensor:
    rows = torch.randn(SIZE, M, WIDTH, generator=generator(0))
    rows[..., -1] = 1
    return rows


def acts(made: SB3Agent, rows: Tensor) -> Tensor:
    """Deterministic actions (B, 2, M)."""
    with torch.no_grad():
        return made.model.policy._predict(rows.flatten(1), deterministic=True).unflatten(1, (2, M))


def values(made: SB3Agent, rows: Tensor, actions: Tensor) -> list[Tensor]:
    """What the critics say."""
    policy, observation = made.model.policy, rows.flatten(1)
    with torch.no_grad():
        if hasattr(policy, "critic"):
            return list(policy.critic(observation, actions.flatten(1)))
        return [policy.predict_values(observation)]


@every_algorithm
def test_reordering_teachers_reorders_actions_and_leaves_values(name: str) -> None:
    made, rows, order = agent(name), seen(), [2, 0, 1]
    made.learn(2, lambda: None)
    found = acts(made, rows)
    assert found.std() > 1e-4
    torch.testing.assert_close(acts(made, rows[:, order]), found[..., order], rtol=0, atol=1e-6)
    expected = values(made, rows, found)
    moved = values(made, rows[:, order], found[..., order])
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


@every_algorithm
def test_what_stands_for_absent_teachers_changes_nothing_for_others(name: str) -> None:
    made, rows = agent(name), seen()
    rows[:, 2] = 0
    found, noise = acts(made, rows), torch.randn(SIZE, WIDTH - 1, generator=generator(1))
    assert found[..., 2].eq(found[0, :, 2]).all()
    other = rows.clone()
    other[:, 2, :-1] = noise
    assert acts(made, other).equal(found)
    assert all(
        one.equal(two)
        for one, two in zip(values(made, rows, found), values(made, other, found), strict=True)
    )


@every_algorithm
def test_its_parameters_learn_but_none_belongs_to_a_teacher(name: str) -> None:
    made = agent(name)
    before = {key: value.clone() for key, value in made.model.policy.state_dict().items()}
    made.learn(3, lambda: None)
    after = made.model.policy.state_dict()
    assert {key for key, value in before.items() if value.equal(after[key])} <= {
        key for key in after if "target" in key
    }
    assert all(2 * M not in value.shape and M not in value.shape for value in after.values())


def test_who_has_another_policy_and_whose_noise_has_the_teachers_names_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^agent\.arguments\.policy: 'shared' .* DQN has"):
        check_agent("dqn", {"policy": "shared"})
    with pytest.raises(ConfigError, match=r"^agent\.arguments\.use_sde: cannot be used"):
        check_agent("ppo", {"policy": "shared", "use_sde": True})
    with pytest.raises(ConfigError, match=r"net_arch: 'shared' needs at least one layer"):
        agent("ppo", policy_kwargs={"net_arch": []})
    with pytest.raises(ConfigError, match=r"^policy: 'shared' needs the observation 'relative'"):
        build_agent("ppo", started_env(), seed=0, arguments={"policy": "shared"})
    env = started_env(observation="relative", normalize_observation=True)
    with pytest.raises(ConfigError, match=r"normalize_observation is true$"):
        build_agent("sac", env, seed=0, arguments={"policy": "shared"})
