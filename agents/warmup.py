"""The warm-up of Algorithm 1: an epoch in which all teachers count the same."""

from collections.abc import Mapping

import torch
from torch import Tensor

from agents.base import Agent, Transition
from mtkd_env.errors import check_name
from mtkd_env.types import TeacherWeights

# 1/M keeps the scale of the loss for what follows; the paper's "equal weights" are ones, which
# make the teachers count M times as much during the warm-up.
WARMUP_WEIGHTS = ("uniform", "ones")


def warm_up(agent: Agent, steps: int, weights: str = "uniform") -> None:
    """Trains the student under equal weights, then lets the agent learn from what happened.

    The statistics that normalise observations settle during a student's first epoch, so the
    agent gets the observations of the warm-up normalised by those of its end.

    Args:
        agent: The agent, whose own actions are not asked for.
        steps: SGD steps of the warm-up.
        weights: `uniform` (1/M) or `ones`.

    Raises:
        ConfigError: Unknown weights.
    """
    env = agent.env
    check_name(WARMUP_WEIGHTS, weights, "warm-up weights")
    weight = 1.0 if weights == "ones" else 1 / len(env.teacher_names)
    history: list[tuple[Tensor, Tensor, Mapping[str, TeacherWeights]]] = []
    for _ in range(steps):
        raw, state = env.raw_observation, env.state
        evidence = env.fusion.evidence(state)
        equal = torch.full_like(state.divergence, weight)
        record = env.distill(TeacherWeights(logit=equal, feature=equal))
        if agent.learns_from_warmup:
            history.append((raw, record.rewards.advantages, evidence))
    with torch.no_grad():
        transitions = [
            Transition(env.normalize(raw), advantages, evidence)
            for raw, advantages, evidence in history
        ]
    agent.pretrain(transitions)
