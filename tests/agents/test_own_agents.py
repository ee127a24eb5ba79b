"""Agents and weightings of a user's own, as classes or as `module:Class`."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import Agent, SB3Agent, WeightingAgent, build_agent, check_agent, find_agent
from known_optimum import started_env
from mtkd_env import testing
from mtkd_env.env import EnvSpec
from mtkd_env.errors import ConfigError
from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting import WEIGHTING
from tiny import label
from users_objects import Confident, pays


class Still(Agent):
    """Weights all teachers alike."""

    def act(self, observation: Tensor) -> Tensor:
        return observation.new_zeros(len(observation), 2 * len(self.env.teacher_names))

    def save(self, folder: Path) -> None:
        (folder / "agent.txt").touch()


def confident(distiller: Any) -> Confident:
    return Confident(distiller, power=2.0)


def both(name: str) -> list[Any]:
    found = getattr(sys.modules[__name__], name)
    return [found, f"{found.__module__}:{name}"]


@pytest.mark.parametrize("given", [*both("Confident"), *both("confident")], ids=label)
def test_a_weighting_of_ones_own_weights(given: Any) -> None:
    env = started_env()
    agent = build_agent(given, env, seed=0, arguments={})
    assert isinstance(agent, WeightingAgent)
    assert isinstance(agent.weighting, Confident)
    agent.step()
    assert env.steps == 1


@pytest.mark.parametrize("given", both("Still"), ids=label)
def test_an_agent_of_ones_own_acts(given: Any) -> None:
    env = started_env()
    agent = build_agent(given, env, seed=3, arguments={})
    assert isinstance(agent, Still)
    assert agent.seed == 3
    agent.step()
    assert env.steps == 1


def test_an_algorithm_may_be_a_class() -> None:
    ppo = find_agent("ppo")
    agent = build_agent(ppo, started_env(), seed=0, arguments={"n_steps": 2, "n_minibatches": 1})
    assert isinstance(agent, SB3Agent)
    assert agent.algorithm == "stable_baselines3.ppo.ppo:PPO"


def test_arguments_are_those_of_the_class() -> None:
    agent = build_agent(Confident, started_env(), seed=0, arguments={"power": 3})
    assert isinstance(agent, WeightingAgent)
    assert vars(agent.weighting)["power"] == 3.0
    with pytest.raises(ConfigError, match=r"agent\.arguments\.powr: .*did you mean 'power'"):
        check_agent(Confident, {"powr": 3})
    with pytest.raises(ConfigError, match=r"agent\.arguments\.x: unknown key"):
        check_agent(Still, {"x": 3})


@pytest.mark.parametrize("given", [3, torch.nn.Linear, "builtins:dict", "os:system", "math:pi"])
def test_what_is_no_agent_is_refused(given: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"agent: .*a class of Agent, of Weighting or of a Stable"
    ):
        check_agent(given, {})


@pytest.mark.parametrize("given", both("Confident"), ids=label)
def test_a_weighting_of_ones_own_may_be_a_prior(given: Any) -> None:
    spec = EnvSpec(fusion="prior", prior=given)
    assert WEIGHTING.find(spec.prior) is Confident


def test_the_contract_of_weightings_is_checked() -> None:
    testing.check_weighting(Confident)
    with pytest.raises(AssertionError, match="rows do not sum to 1"):
        testing.check_weighting(Heavy)


class Heavy(Confident):
    def __call__(self, state: DistillState) -> TeacherWeights:
        weights = super().__call__(state)
        return TeacherWeights(logit=weights.logit, feature=2 * weights.feature)


@pytest.mark.slow
@pytest.mark.parametrize("check", [testing.check_reward, testing.check_observation])
def test_the_contract_of_environments_is_checked_with_ones_own(check: Any) -> None:
    check({testing.check_reward: pays, testing.check_observation: "users_objects:sure"}[check])
