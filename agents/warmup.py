"""The warm-up of Algorithm 1: an epoch in which all teachers count the same."""

from dataclasses import replace

import torch

from agents.base import Agent, AtRest, Transition, nothing
from agents.history import Derived, History
from mtkd_env.errors import check_name
from mtkd_env.types import TeacherWeights

# 1/M keeps the scale of the loss for what follows; the paper's "equal weights" are ones, which
# make the teachers count M times as much during the warm-up.
WARMUP_WEIGHTS = ("uniform", "ones")


def warm_up(
    agent: Agent,
    steps: int,
    weights: str = "uniform",
    *,
    history: History[Transition] | None = None,
    at_rest: AtRest = nothing,
) -> None:
    """Trains the student under equal weights, then lets the agent learn from what happened.

    The statistics that normalise observations settle during a student's first epoch, so the
    agent gets the observations of the warm-up normalised by those of its end: each batch when it is
    read, so that there is no second copy of all of them.

    Args:
        agent: The agent, whose own actions are not asked for.
        steps: SGD steps of the warm-up.
        weights: `uniform` (1/M) or `ones`.
        history: What has happened before these steps, with raw observations; they are added.
            By default a new one of the agent's `history_bytes`.
        at_rest: Called before every step; all but the global random generators is then in the
            environment and in `history`.

    Raises:
        ConfigError: Unknown weights.
    """
    env = agent.env
    check_name(WARMUP_WEIGHTS, weights, "warm-up weights")
    weight = 1.0 if weights == "ones" else 1 / len(env.teacher_names)
    if history is None:
        history = History(Transition, steps=steps, max_bytes=agent.history_bytes)
    for _ in range(steps):
        at_rest()
        raw, short, state = env.raw_observation, env.short_observation, env.state
        evidence = env.fusion.evidence(state)
        equal = torch.full_like(state.divergence, weight)
        record = env.distill(TeacherWeights(logit=equal, feature=equal))
        if agent.learns_from_warmup:
            history.append(Transition(raw, record.rewards.advantages, evidence), short)
    raw_batches = history.batches

    def normalized(position: int) -> Transition:
        known = raw_batches[position]
        return replace(known, observation=env.normalize(env.recall(known.observation)))

    agent.pretrain(Derived(len(raw_batches), normalized))
