"""The host prepares steps faster than a GPU makes them, unless it waits for one of their values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agents import Agent, WeightingAgent, build_agent
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.teachers import TeacherEnsemble
from tiny import (
    NUM_ENVS,
    RECIPES,
    STEPS_PER_EPOCH,
    TEACHERS,
    make_tiny_distiller,
    make_tiny_env,
    teacher_networks,
    training_set,
)

# Operations whose result, or its shape, depends on values, so that a host has to read them.
READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class ReadingOperations(TorchDispatchMode):
    """Collects the operations that would make a host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        reads = bool(READING.intersection(func.tags))
        if func.overloadpacket is torch.ops.aten.index:  # only if an index is a mask
            reads = any(index is not None and index.dtype == torch.bool for index in args[1])
        if reads:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def make_env(device: str, optimizer: str, precision: str = "fp32") -> MTKDVectorEnv:
    """An environment whose statistics of observations no longer change after its first epoch."""
    recipe = RECIPES[optimizer]
    # Not the teachers that tests share, which would move to the device.
    ensemble = TeacherEnsemble(teacher_networks(), list(TEACHERS))
    distiller = make_tiny_distiller(
        ensemble=ensemble, recipe=recipe, device=device, precision=precision
    )
    batches = training_set().stream(NUM_ENVS, torch.device(device), 0)
    env = make_tiny_env(distiller=distiller, batches=batches, output="torch")
    env.reset(seed=0)
    return env


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


METHODS = ("uniform", "aver", "camkd", "pg")


@pytest.mark.parametrize("optimizer", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_no_value(method: str, optimizer: str) -> None:
    agent = build_agent(method, make_env("cpu", optimizer), seed=0, arguments={})
    one_step(agent)
    with ReadingOperations() as operations:
        for _ in range(2 * STEPS_PER_EPOCH):
            one_step(agent)
    assert operations.found == []


@pytest.mark.parametrize(
    "read",
    [
        lambda values: values[0].item(),
        lambda values: bool(values.isfinite().all()),
        lambda values: values[values > 0],
        lambda values: values.nonzero(),
        lambda values: values.equal(values + 1),
    ],
)
def test_what_reads_a_value_is_found(read: Callable[[torch.Tensor], Any]) -> None:
    values = torch.ones(2)
    with ReadingOperations() as operations:
        torch.add(values, 1).sum()
        assert operations.found == []
        read(values)
    assert operations.found


@contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits_for_the_gpu(method: str, optimizer: str, precision: str) -> None:
    agent = build_agent(method, make_env("cuda", optimizer, precision), seed=0, arguments={})
    for _ in range(STEPS_PER_EPOCH):
        one_step(agent)
    with never_waiting():
        for _ in range(2 * STEPS_PER_EPOCH):
            one_step(agent)
