"""What a method keeps in memory: tensors and arrays that it holds, and those on a device."""

from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from gymnasium import Space
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn, optim

from agents import Agent
from mtkd_env.distiller import Distiller
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.vector import StepRecord

# What belongs to the student's side or to all methods together, and what leads everywhere.
FOREIGN = (MTKDVectorEnv, VecEnv, Distiller, Space, ModuleType, type)

# What learns, as against what is learned from.
LEARNERS = (nn.Module, optim.Optimizer)


def held_bytes(root: object, *, learners: bool) -> int:
    """Bytes of all tensors and arrays that can be reached from an agent; each is counted once.

    Args:
        root: The agent; its environment is not looked into.
        learners: Whether to count networks and optimisers too, or histories and buffers alone.
    """
    skipped = FOREIGN if learners else FOREIGN + LEARNERS
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, skipped):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor | np.ndarray):
            address, size = _storage(value)
            sizes[address] = max(size, sizes.get(address, 0))
        else:
            waiting.extend(_parts(value))
    return sum(sizes.values())


def _storage(value: Tensor | np.ndarray) -> tuple[int, int]:
    """Address and bytes of the memory behind a tensor or an array, which views share."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    while isinstance(value.base, np.ndarray):
        value = value.base
    return value.__array_interface__["data"][0], value.nbytes


def _parts(value: object) -> Iterator[object]:
    """What an object is made of: entries of a container, attributes of anything else."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, str | bytes):
        return
    elif isinstance(value, Iterable) and hasattr(value, "__len__"):
        yield from value
    yield from getattr(value, "__dict__", {}).values()
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    yield from (getattr(value, name, None) for name in slots)


class HistoryMeter:
    """The most that an agent keeps to learn from.

    It looks when the student has made a step, which the agent only then remembers; so what a step
    adds counts once more for the last one. What an agent learns from at once is never kept.

    Args:
        agent: The agent, whose environment it subscribes to.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._watching = False
        self._last = self._most = self._growth = 0
        agent.env.subscribe(self)

    def start(self) -> None:
        """Begins to look; takes time in every step."""
        self._watching = True
        self._last = self._most = held_bytes(self._agent, learners=False)
        self._growth = 0

    def stop(self) -> int:
        """Looks no more; gives the bytes."""
        self._watching = False
        return self._most + self._growth

    def __call__(self, record: StepRecord) -> None:
        """The student made a step."""
        del record
        if self._watching:
            now = held_bytes(self._agent, learners=False)
            self._growth = max(self._growth, now - self._last)
            self._last, self._most = now, max(self._most, now)


def allocated_bytes(device: torch.device) -> int:
    """Bytes of all tensors on a CUDA device; 0 on a CPU, which does not tell."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
