"""Problems whose best weights are known, and the score that an agent reaches on them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from agents import Agent
from agents.policy_gradient import LearningAgent
from experiments.metrics import EpochMeter
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.reward import Credit, RewardFunction, RewardRule
from mtkd_env.types import DistillState
from tiny import NUM_ENVS, make_tiny_env, training_set

STEPS = 3


def one_favourite(state: DistillState, _: Any) -> Tensor:
    """The second teacher is the best for every sample, the third the second best."""
    worth = torch.zeros_like(state.divergence)
    worth[:, 1:3] = torch.tensor([1.0, 0.3])
    return worth


def the_surest(state: DistillState, _: Any) -> Tensor:
    """The best teacher of a sample is the one with the smallest cross-entropy, which is seen."""
    return -state.teacher_cross_entropy


def started_env(*, steps: int = STEPS, num_envs: int = NUM_ENVS, **kwargs: Any) -> MTKDVectorEnv:
    """A tiny environment with so many steps an epoch, reset."""
    batches = training_set(steps * num_envs).stream(num_envs, torch.device("cpu"), seed=0)
    env = make_tiny_env(batches=batches, **kwargs)
    env.reset(seed=0)
    return env


def known_env(credit: Credit = one_favourite, **kwargs: Any) -> MTKDVectorEnv:
    """The same, but the agent decides alone, and `credit` says which teachers pay."""
    env = started_env(**{"fusion": "generator", **kwargs})
    env.reward = RewardFunction(RewardRule(credit), env.distiller.distillation)
    return env


def scores(agent: Agent, epochs: int) -> list[float]:
    """The agent's score in every epoch of learning."""
    meter = EpochMeter(agent.env.teacher_names)
    agent.env.subscribe(meter)
    found: list[float] = []
    agent.learn(epochs, lambda: found.append(meter.read()["score"]))
    return found


def teach(agent: LearningAgent[Any], steps: Iterable[Any]) -> None:
    """One update of the agent from steps as if they were all since the last one."""
    for step in steps:
        agent.history.add(step)
    agent.update()


def advantages_of(env: MTKDVectorEnv) -> Callable[[], Tensor]:
    """Collects the advantages of all steps from now on; gives them, one row a sample."""
    found: list[Tensor] = []
    env.subscribe(lambda record: found.append(record.rewards.advantages))
    return lambda: torch.cat(found)
