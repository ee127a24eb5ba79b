"""What happened since an agent's last update, in a few tensors that are made once."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

from agents.memory import packed, unpacked
from mtkd_env.observation import ShortObservation

Item = TypeVar("Item")
Kept = TypeVar("Kept")

# What a history may take unless it is told otherwise: an epoch of the paper's sizes in float16.
HISTORY_BYTES = 256 * 2**20

# Batches of an update that take no more are kept whole even where they could be short, because it
# takes time to make short ones whole again.
LITTLE_BYTES = 16 * 2**20

# The one large field of a batch, and the bytes of one of its numbers in half precision.
OBSERVATION = "observation"
HALF = torch.finfo(torch.float16)
HALF_BYTES = 2


class Derived(Sequence[Item]):
    """A sequence whose items are made when they are asked for, each time anew.

    Args:
        length: How many there are.
        make: Makes the item at a position, from 0.
    """

    def __init__(self, length: int, make: Callable[[int], Item]) -> None:
        self._length = length
        self._make = make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        """An item, or those of a slice, which are not made yet either."""
        positions = range(self._length)[index]
        if isinstance(positions, int):
            return self._make(positions)
        return Derived(len(positions), lambda place: self._make(positions[place]))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is kept of the batches of an update so that it takes no more than it may.

    Attributes:
        every: k, where every k-th batch is kept, from the first.
        rows: Batches that are kept, at most.
        half: Whether observations are kept in half precision.
    """

    every: int
    rows: int
    half: bool

    @classmethod
    def within(cls, max_bytes: int, steps: int, batch_bytes: int, half_bytes: int | None) -> "Plan":
        """The plan that keeps most: all batches if they fit, then as many as fit by halves.

        One batch is always kept.

        Args:
            max_bytes: Bytes that all kept batches may take together.
            steps: Batches of an update.
            batch_bytes: Bytes of a batch.
            half_bytes: Bytes of a batch whose observations are in half precision; None if there
                are no whole observations.
        """
        if steps * batch_bytes <= max_bytes:
            return cls(every=1, rows=steps, half=False)
        smallest = batch_bytes if half_bytes is None else half_bytes
        every = math.ceil(steps / max(1, max_bytes // smallest))
        return cls(every=every, rows=math.ceil(steps / every), half=half_bytes is not None)


class History(Generic[Kept]):
    """The batches of one update, one tensor (steps, B, ...) for each of their fields.

    The tensors are made for the first batch, on its device, and serve all later updates. Batches
    are copied into them and are read as the same dataclasses again, whose tensors are views.

    An epoch of the paper's sizes (Table 1: 782 batches of 64 observations of 1,704 numbers) takes
    347 MB, all but 6 of it observations, so there is a cap. What fits under it is kept exactly.
    Otherwise observations are kept in float16, rounded by up to 2⁻¹¹ of a number; those
    beyond its range become the largest ones of it. If this is too much as well, every k-th batch is
    kept, with the smallest k that fits: an agent then learns from an even part of the epoch, the
    same one in every run, and makes as many fewer steps.

    Where a store has what the teachers say of the images, a batch comes with a short form of its
    observation. That is kept instead unless all batches of an update take little: 8 MB at those
    sizes, and nothing is rounded.

    Args:
        kind: The dataclass of a batch: of tensors whose first axis is B, and of mappings and
            further dataclasses of them.
        steps: Batches of an update, at most.
        max_bytes: Bytes that all tensors may take together, whatever a single batch takes.
        recall: Makes the observation again that a short form is of; without it, readers get the
            short form.

    Attributes:
        seen: Batches of this update so far, kept or not.
        plan: What is kept; None before the first batch.
    """

    def __init__(
        self,
        kind: type[Kept],
        *,
        steps: int,
        max_bytes: int = HISTORY_BYTES,
        recall: Callable[[ShortObservation], Tensor] | None = None,
    ) -> None:
        self.seen = 0
        self.plan: Plan | None = None
        self._kind = kind
        self._steps = steps
        self._max_bytes = max_bytes
        self._recall = recall
        self._tensors: list[Tensor] = []
        # What the tensors hold the numbers of, and the first batch, which says how they are put
        # together.
        self._dtypes: list[torch.dtype] = []
        self._first: Any = None

    def __len__(self) -> int:
        """Batches that were kept."""
        return 0 if self.plan is None else math.ceil(self.seen / self.plan.every)

    @property
    def batches(self) -> Sequence[Kept]:
        """The batches that were kept, in their order."""
        return Derived(len(self), lambda row: self._recalled(self._read(row)))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def append(self, batch: Kept, short: ShortObservation | None = None) -> None:
        """Takes the next batch.

        Args:
            batch: The batch.
            short: A short form of its observation, for all batches of an update or for none.
        """
        if short is not None and self._is_kept_short(batch):
            batch = _with_observation(batch, short)
        plan = self._plan_for(batch)
        if self.seen % plan.every == 0:
            self._write(self.seen // plan.every, batch)
        self.seen += 1

    def _is_kept_short(self, batch: Kept) -> bool:
        """Whether a batch that could be short is; the same for all batches of an update."""
        if self.seen:
            return _is_short(self._first)
        size = sum(tensor.nbytes for _, tensor in named_tensors(batch))
        return self._steps * size > min(LITTLE_BYTES, self._max_bytes)

    def joined(self) -> Kept:
        """All batches that were kept as one; only rounded or short observations are copied."""
        rows = [tensor[: len(self)].flatten(0, 1) for tensor in self._tensors]
        joined = self._assembled(rows)
        if self._recall is None or not _is_short(joined):
            return joined
        return _with_observation(joined, self._joined_observations())

    def _joined_observations(self) -> Tensor:
        """The observations of all batches, recalled one by one into their places."""
        observations = (_entries(batch)[OBSERVATION] for batch in self.batches)
        first = next(observations)
        joined = first.new_empty(len(self), *first.shape)
        joined[0] = first
        for row, observation in enumerate(observations, start=1):
            joined[row] = observation
        return joined.flatten(0, 1)

    def clear(self) -> None:
        """Forgets the batches; the next ones take the place of these."""
        self.seen = 0

    def release(self) -> None:
        """Forgets the batches and gives their memory back."""
        self.clear()
        self.plan = None
        self._tensors, self._dtypes, self._first = [], [], None

    def state_dict(self) -> dict[str, Any]:
        """Copies of the batches on the host, with the rows of all processes."""
        batches = [_copied(packed(self._read(row))) for row in range(len(self))]
        return {"seen": self.seen, "batches": batches}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on from what `state_dict` gave of a history with the same arguments.

        Args:
            state: The batches.
            device: Where they are to be.
        """
        self.clear()
        for row, entry in enumerate(state["batches"]):
            batch = self._kind(**unpacked(entry, device))
            if isinstance(observation := _entries(batch)[OBSERVATION], Mapping):
                batch = _with_observation(batch, ShortObservation(**observation))
            self._plan_for(batch)
            self._write(row, batch)
        self.seen = int(state["seen"])

    def _plan_for(self, batch: Kept) -> Plan:
        """The plan of an update with such batches; the tensors are there after it."""
        if self.plan is not None and _is_short(batch) == _is_short(self._first):
            return self.plan
        assert self.seen == 0
        self.release()
        return self._prepare(batch)

    def _prepare(self, batch: Kept) -> Plan:
        """Makes the tensors for batches like this one."""
        parts = dict(named_tensors(batch))
        size, half = sum(tensor.nbytes for tensor in parts.values()), None
        if (whole := parts.get(OBSERVATION)) is not None:
            half = size - whole.nbytes + whole.numel() * HALF_BYTES
        self.plan = Plan.within(self._max_bytes, self._steps, size, half)
        self._dtypes = [tensor.dtype for tensor in parts.values()]
        self._tensors = [
            tensor.new_empty((self.plan.rows, *tensor.shape), dtype=self._dtype(name, tensor))
            for name, tensor in parts.items()
        ]
        self._first = with_tensors(batch, iter(tensor[0] for tensor in self._tensors))
        return self.plan

    def _dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        assert self.plan is not None
        return torch.float16 if self.plan.half and name == OBSERVATION else tensor.dtype

    @torch.no_grad()
    def _write(self, row: int, batch: Kept) -> None:
        for kept, (_, tensor) in zip(self._tensors, named_tensors(batch), strict=True):
            narrower = kept.dtype != tensor.dtype
            kept[row].copy_(tensor.clamp(HALF.min, HALF.max) if narrower else tensor)

    def _read(self, row: int) -> Kept:
        """A batch as it was appended."""
        return self._assembled(tensor[row] for tensor in self._tensors)

    def _recalled(self, batch: Kept) -> Kept:
        """A batch as readers get it."""
        if self._recall is None or not _is_short(batch):
            return batch
        return _with_observation(batch, self._recall(_entries(batch)[OBSERVATION]))

    def _assembled(self, tensors: Iterable[Tensor]) -> Kept:
        """A batch of tensors, each in the precision that was given."""
        whole = (t.to(dtype) for t, dtype in zip(tensors, self._dtypes, strict=True))
        batch: Kept = with_tensors(self._first, whole)
        return batch


def _with_observation(batch: Kept, observation: Tensor | ShortObservation) -> Kept:
    """A batch with another observation; its declared type is that of what readers get."""
    known: Any = batch
    changed: Kept = replace(known, observation=observation)
    return changed


def _is_short(batch: Any) -> bool:
    return isinstance(_entries(batch)[OBSERVATION], ShortObservation)


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors inside dataclasses and mappings, at any depth, with the way to each of them."""
    if isinstance(value, Tensor):
        yield name, value
        return
    for key, entry in _entries(value).items():
        yield from named_tensors(entry, f"{name}.{key}" if name else key)


def with_tensors(like: Any, tensors: Iterator[Tensor]) -> Any:
    """Dataclasses and mappings like the given ones, of other tensors in `named_tensors`' order."""
    if isinstance(like, Tensor):
        return next(tensors)
    entries = {key: with_tensors(entry, tensors) for key, entry in _entries(like).items()}
    kind: Any = type(like)
    return kind(**entries) if is_dataclass(like) else entries


def _entries(value: Any) -> Mapping[str, Any]:
    if is_dataclass(value):
        return {entry.name: getattr(value, entry.name) for entry in fields(value)}
    assert isinstance(value, Mapping)
    return value


def _copied(value: Any) -> Any:
    """Tensors of their own on the host: a view would be saved with all that it is a view of."""
    copies = (tensor.to("cpu", copy=True) for _, tensor in named_tensors(value))
    return with_tensors(value, copies)
