"""The host prepares steps faster than a GPU makes them, unless it waits for one of their values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import AGENTS, Agent, WeightingAgent, build_agent
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.weighting import WEIGHTINGS
from tiny import (
    RECIPES,
    STEPS_PER_EPOCH,
    make_tiny_env_on,
    seldom,
)

pytestmark = pytest.mark.gpu

OFTEN = [(method, "sgd") for method in ("aver", "camkd", "gate", "mmkd", *AGENTS)]


def make_env(optimizer: str, precision: str = "fp32") -> MTKDVectorEnv:
    """An environment whose statistics of observations no longer change after its first epoch."""
    recipe = RECIPES[optimizer]
    return make_tiny_env_on("cuda", recipe=recipe, precision=precision, output="torch")


def one_step(agent: Agent) -> None:
    """A step of the student as the agent trains it; what the agent learns from it comes later."""
    env = agent.env
    if isinstance(agent, WeightingAgent):
        state = env.state
        env.distill(agent.weighting(state))
        agent.weighting.after_update(state)
    else:
        env.distill(env.to_weights(agent.act(env.observation)))
        _ = env.observation


@contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_steps(method: str, env: MTKDVectorEnv) -> None:
    agent = build_agent(method, env, seed=0, arguments={})
    for _ in range(STEPS_PER_EPOCH):
        one_step(agent)
    with never_waiting():
        for _ in range(2 * STEPS_PER_EPOCH):
            one_step(agent)


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        *seldom(((method, "sgd") for method in [*WEIGHTINGS, *AGENTS]), OFTEN),
        *((method, "adamw") for method in ("uniform", "camkd", "pg")),
    ],
)
def test_a_step_never_waits_for_the_gpu(method: str, optimizer: str) -> None:
    check_steps(method, make_env(optimizer))


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [("adamw", "fp32"), ("sgd", "bf16"), ("sgd", "fp16"), ("adamw", "fp16")],
)
def test_no_optimizer_and_no_precision_waits(optimizer: str, precision: str) -> None:
    check_steps("aver", make_env(optimizer, precision))


def test_actions_from_the_host_are_not_waited_for() -> None:
    env = make_env("sgd")
    actions = env.action_space.sample()
    for _ in range(STEPS_PER_EPOCH):
        env.step(actions)
    with never_waiting():
        env.step(actions)


@pytest.mark.parametrize("method", ["pg", "reinforce", "dpg"])
def test_own_agents_learn_without_waiting(method: str) -> None:
    agent = build_agent(method, make_env("sgd"), seed=0, arguments={})
    agent.learn(1, lambda: None)
    before = agent.updates
    with never_waiting():
        agent.learn(2, lambda: None)
    assert agent.updates > before


@pytest.mark.parametrize(
    "wait",
    [
        lambda values: values.sum().item(),
        lambda values: values.tolist(),
        lambda values: bool(values.isfinite().all()),
        lambda values: values[values > 0],
        lambda values: values.nonzero(),
        lambda values: values.equal(values + 1),
        lambda values: values.cpu(),
        lambda values: values.copy_(torch.ones(2)),
        lambda values: torch.ones(2).copy_(values),
        lambda values: torch.ones(2).to(values.device),
        lambda values: torch.tensor([1.0], device=values.device),
        lambda values: torch.linalg.solve(torch.diag(values), values),
    ],
)
def test_what_waits_is_refused(wait: Callable[[Tensor], Any]) -> None:
    values = torch.ones(2, device="cuda")
    wait(values)
    with never_waiting(), pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        wait(values)


def test_what_does_not_wait_is_done() -> None:
    values = torch.ones(2, device="cuda")
    with never_waiting():
        found = values + torch.ones(2).to("cuda", non_blocking=True) + torch.tensor(1.0)
        found = found[torch.arange(2, device="cuda")] + torch.full((2,), 2.0, device="cuda")
    assert found.tolist() == [5, 5]
