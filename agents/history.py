"""What an agent has seen since its last update, and what it remembers of the time before."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from mtkd_env import distributed
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.observation import ShortObservation
from mtkd_env.seeding import derive_seed
from mtkd_env.types import TeacherWeights

Step = TypeVar("Step")

# Short observations that are made whole in one reading of the store; more would not stay in the
# cache of a processor.
TOGETHER = 4


def by_names(kinds: Iterable[type]) -> dict[frozenset[str], type]:
    """Dataclasses by the names of their fields."""
    return {frozenset(entry.name for entry in fields(kind)): kind for kind in kinds}


# What dictionaries of a checkpoint are made into again, by their keys.
KINDS = by_names((TeacherWeights, ShortObservation))


class History(Generic[Step]):
    """The steps since an agent's last update, in their order.

    A step is a dataclass of tensors whose first axis is B, and of mappings and further dataclasses
    of them. Its `observation` is one that `env.keepable_observation` gave: raw, or without what a
    store of teacher outputs has of it. An epoch of the paper's sizes (Table 1: 782 batches of 64
    observations of 1,704 numbers) then takes 4 MB instead of 342. Whoever reads a step sees the
    observation as the environment normalises it now.

    Args:
        kind: The dataclass of a step.
        env: The environment that the steps are of.
        max_bytes: Bytes from which on it is full, since what it holds should be learned from.

    Attributes:
        steps: The steps as they were added.
    """

    def __init__(self, kind: type[Step], env: MTKDVectorEnv, max_bytes: int) -> None:
        self.steps: list[Step] = []
        self.nbytes = 0
        self._kind = kind
        self._env = env
        self._max_bytes = max_bytes

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        """The steps as they are learned from; observations are made one by one."""
        for step in self.steps:
            known: Any = step
            yield replace(known, observation=self._env.recall(known.observation))

    def drained(self) -> Iterable[Step]:
        """The steps as they are learned from, for several passes before they are forgotten.

        They are made once and take the place of what was kept, unless that would be too much.
        """
        width = self._env.observer.width * self._env.num_envs * torch.float32.itemsize
        if width * len(self) > self._max_bytes:
            return self
        steps, self.steps = self.steps, []
        begins = range(0, len(steps), TOGETHER)
        return [one for begin in begins for one in self._replaced(steps[begin : begin + TOGETHER])]

    def _replaced(self, steps: Sequence[Any]) -> Iterator[Step]:
        """Steps as they are learned from; observations that were kept whole are written over.

        The memory of tensors that are freed one by one could not be used for others.
        """
        kept = [step.observation for step in steps]
        found: Iterable[Tensor]
        if isinstance(kept[0], Tensor):
            found = (each.copy_(self._env.recall(each)) for each in kept)
        else:
            rows = [len(each.keys) for each in kept]
            found = self._env.recall(ShortObservation.joined(kept)).split(rows)
        return (replace(step, observation=each) for step, each in zip(steps, found, strict=True))

    @property
    def full(self) -> bool:
        """Whether another step like the last one would be more than it may hold."""
        return bool(self) and self.nbytes + _bytes(self.steps[-1]) > self._max_bytes

    def add(self, step: Step) -> None:
        """Keeps a step; its tensors must not be written into any more."""
        self.steps.append(step)
        self.nbytes += _bytes(step)

    def clear(self) -> None:
        """Forgets all steps."""
        self.steps, self.nbytes = [], 0

    def state_dict(self) -> dict[str, Any]:
        """The steps as dictionaries of tensors, with the rows of all processes."""
        return {"steps": [_packed(step) for step in self.steps]}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Goes on from what `state_dict` gave, each process with its rows."""
        self.clear()
        for entry in state["steps"]:
            self.add(self._kind(**_unpacked(entry, self._env.device, KINDS)))


class Replay:
    """An even sample of all lessons so far, of tasks with any number of teachers each.

    A lesson is what a step of an optimiser learned from, made as a step of a `History` is, but with
    the whole observation; all have the same entries.

    Args:
        size: Number of lessons to keep.
        device: Where they are.
        seed: Seed of which ones are kept and drawn.
        kinds: The dataclasses in them.
    """

    def __init__(self, size: int, device: torch.device, seed: int, kinds: Iterable[type]) -> None:
        self._size = size
        self._device = device
        self._kinds = KINDS | by_names(kinds)
        self._kept: list[Any] = []
        self._seen = 0
        self._random = torch.Generator().manual_seed(derive_seed(seed, "replay"))

    def add(self, lesson: Any) -> None:
        """Keeps a lesson or not, so that all so far are as likely to be there (Vitter, 1985)."""
        self._seen += 1
        if len(self._kept) < self._size:
            self._kept.append(lesson)
        elif (place := self._below(self._seen)) < self._size:
            self._kept[place] = lesson

    def draw(self, count: int) -> Any:
        """So many lessons in one, with zeros for teachers that are not there; None of none."""
        if not self._kept:
            return None
        return _joined([self._kept[self._below(len(self._kept))] for _ in range(count)])

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=self._random))

    def state_dict(self) -> dict[str, Any]:
        """The lessons, with the rows of all processes, and what is drawn next."""
        return {
            "kept": [_packed(lesson) for lesson in self._kept],
            "seen": self._seen,
            "random": self._random.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Goes on from what `state_dict` gave, each process with its rows."""
        self._kept = [_unpacked(one, self._device, self._kinds) for one in state["kept"]]
        self._seen = state["seen"]
        self._random.set_state(state["random"].cpu())


def _joined(parts: Sequence[Any]) -> Any:
    """One of many alike: all rows, as wide as the widest."""
    first = parts[0]
    if isinstance(first, Tensor):
        widest = max(part.shape[1] for part in parts)
        return torch.cat([pad(part, (0, widest - part.shape[1])) for part in parts])
    entries = {name: _joined([_entries(one)[name] for one in parts]) for name in _entries(first)}
    return type(first)(**entries)


def _entries(value: Any) -> Mapping[str, Any]:
    if is_dataclass(value):
        return {entry.name: getattr(value, entry.name) for entry in fields(value)}
    assert isinstance(value, Mapping)
    return value


def _bytes(value: Any) -> int:
    """Bytes of all tensors inside dataclasses and mappings, at any depth."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_bytes(entry) for entry in _entries(value).values())


def _packed(value: Any) -> Any:
    """Dataclasses as dictionaries of their fields, at any depth."""
    if isinstance(value, Tensor):
        return distributed.gather(value)
    return {name: _packed(entry) for name, entry in _entries(value).items()}


def _unpacked(value: Any, device: torch.device, kinds: Mapping[frozenset[str], type]) -> Any:
    """What was packed, on a device; a dictionary with the keys of no kind remains one."""
    if isinstance(value, Tensor):
        return distributed.local_part(value).to(device)
    entries = {name: _unpacked(entry, device, kinds) for name, entry in value.items()}
    return kinds.get(frozenset(entries), dict)(**entries)
