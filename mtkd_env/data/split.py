"""Which images are learned from, chosen by and reported on, wherever the images themselves are.

Also which of them each of several processes works on.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from mtkd_env.errors import ConfigError, check_not_negative
from mtkd_env.seeding import derive_seed
from mtkd_env.types import UNKNOWN

# Which process this is, counted from 0, and how many work together.
Shard = tuple[int, int]
WHOLE: Shard = (0, 1)


S = TypeVar("S", bound="ImageSplit")


class ImageSplit(ABC):
    """Images that belong together, and their classes.

    Attributes:
        targets: Class of each image, int64 (N,).
        index: Position of each image in what it was taken from, int64 (N,).
    """

    targets: Tensor
    index: Tensor

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def to(self: S, device: torch.device | str) -> S:
        """The same split, with what there is of it in memory on a device; no copy of what is so."""
        return self._each(lambda one: one.to(device))

    def take(self: S, positions: Int64[Tensor, " N"]) -> S:
        """A part of the split."""
        return self._each(lambda one: one[positions])

    def _each(self: S, change: Callable[[Tensor], Tensor]) -> S:
        """The same split with all of its tensors changed."""
        tensors = {name: one for name, one in vars(self).items() if isinstance(one, Tensor)}
        changed = {name: change(one) for name, one in tensors.items()}
        return replace(self, **changed)  # type: ignore[type-var] # all are dataclasses

    @abstractmethod
    def contents(self) -> Iterator[bytes]:
        """All that tells the images and their classes from others, for a digest."""

    def relabelled(self: S, targets: Int64[Tensor, " N"]) -> S:
        """The same images with other labels."""
        return replace(self, targets=targets)  # type: ignore[type-var] # all are dataclasses


@dataclass(frozen=True, eq=False)
class Split(ImageSplit):
    """Images in memory.

    Attributes:
        images: Unnormalised images.
        targets: Class of each image.
        index: Position of each image in the array it was taken from.
    """

    images: UInt8[Tensor, "N K H W"]
    targets: Int64[Tensor, " N"]
    index: Int64[Tensor, " N"]

    def contents(self) -> Iterator[bytes]:
        """Pixels and classes."""
        for array in (self.images, self.targets):
            yield repr(tuple(array.shape)).encode()
            yield array.contiguous().numpy().tobytes()


@dataclass(frozen=True, eq=False)
class Splits(Generic[S]):
    """The parts of a dataset: to learn from, to choose by, to report on.

    Attributes:
        train: What the student learns from; targets are `UNKNOWN` where labels are missing.
        val: Held out of the training images for every choice; None if nothing was held out.
        test: The dataset's own test images.
        labelled: Images whose labels may be learned from or rewarded by: those held out for it, or
            else those of `train` that have one.
    """

    train: S
    val: S | None
    test: S
    labelled: S


@dataclass(frozen=True)
class LabelSpec:
    """Which labels of the student's images are there, and which of them are wrong.

    What is held out for choices and for rewards is taken from the labelled images, and noise is in
    the labels of the others; see the options of `DataSpec` of the same names.

    Raises:
        ConfigError: A negative count or seed, or a share outside [0, 1].
    """

    labelled: int | None = None
    labelled_seed: int = 0
    heldout: int = 0
    label_noise: float = 0.0
    label_noise_seed: int = 0

    def __post_init__(self) -> None:
        names = ("labelled", "labelled_seed", "heldout", "label_noise_seed")
        check_not_negative(**{name: getattr(self, name) or 0 for name in names})
        if not 0 <= self.label_noise <= 1:
            raise ConfigError(f"label_noise: expected a share in [0, 1], found {self.label_noise}")


ALL_LABELS = LabelSpec()


@dataclass(frozen=True, eq=False)
class Division:
    """Positions of the training images by what they are for, each part in ascending order.

    Attributes:
        train: What the student learns from.
        labelled: Those of them whose labels are there.
        val: Held out for choices.
        heldout: Set apart for rewards.
    """

    train: Int64[Tensor, " T"]
    labelled: Int64[Tensor, " L"]
    val: Int64[Tensor, " V"]
    heldout: Int64[Tensor, " K"]


def divide(
    targets: Int64[Tensor, " N"],
    val_fraction: float,
    seed: int,
    train_size: int | None,
    labels: LabelSpec = ALL_LABELS,
    reserved: Int64[Tensor, " R"] | None = None,
) -> Division:
    """Divides training images at random.

    With every label there, the validation images depend on `val_fraction` and `seed` alone, and a
    smaller training set is part of every larger one. With labels missing, validation and held-out
    images come out of the labelled ones, and all of these lie inside `train_size`.

    Args:
        targets: Class of each image, `UNKNOWN` without a label.
        val_fraction: Share of the (labelled) images to hold out.
        seed: Seed of the division.
        train_size: Number of images to keep, as even over the classes as they allow if all labels
            are there; all of them by default.
        labels: Which labels are there.
        reserved: Positions of images that are not the student's.

    Raises:
        ConfigError: A fraction outside [0, 1) or too small to hold out an image, a number of images
            that there are not, or a class without a label.
    """
    order = _permutation(len(targets), seed)
    if reserved is not None:
        order = order[~torch.isin(order, reserved)]
    known = targets[order] != UNKNOWN
    if labels.labelled is None and bool(known.all()):
        held, rest = _hold_out(order, val_fraction, labels.heldout)
        train = _evenly(rest, targets, train_size, len(order))
        return Division(*(part.sort().values for part in (train, train, *held)))
    student = order[: _checked_size(train_size, len(order), 0)]
    labelled = _labelled(student, targets, labels)
    held, rest = _hold_out(labelled, val_fraction, labels.heldout)
    train = student[~torch.isin(student, torch.cat(held))]
    return Division(*(part.sort().values for part in (train, rest, *held)))


def _hold_out(
    order: Int64[Tensor, " N"], val_fraction: float, heldout: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Validation and held-out positions, and the rest."""
    size = _validation_size(len(order), val_fraction)
    if heldout and heldout >= len(order) - size:
        raise ConfigError(
            f"data.heldout: expected fewer than {len(order) - size} "
            f"({len(order)} labelled images, {size} held out for validation), found {heldout}"
        )
    return (order[:size], order[size : size + heldout]), order[size + heldout :]


def _evenly(
    order: Int64[Tensor, " N"], targets: Tensor, train_size: int | None, available: int
) -> Int64[Tensor, " T"]:
    """So many positions, as even over the classes as they allow."""
    if train_size is None:
        return order
    _checked_size(train_size, len(order), available - len(order))
    by_rank = torch.argsort(_rank_within_class(targets[order]), stable=True)
    return order[by_rank[:train_size]]


def _checked_size(train_size: int | None, available: int, held_out: int) -> int:
    if train_size is None:
        return available
    if not 1 <= train_size <= available:
        expected = f"1 to {available} ({available + held_out} images, {held_out} held out)"
        raise ConfigError(f"train_size: expected {expected}, found {train_size}")
    return train_size


def _labelled(
    student: Int64[Tensor, " N"], targets: Tensor, labels: LabelSpec
) -> Int64[Tensor, " L"]:
    """Positions of the images that keep their label, in a random order."""
    known = student[targets[student] != UNKNOWN]
    count, classes = labels.labelled, targets[known].unique()
    if count is None:
        return known
    if count == 0:
        return known[:0]
    if not len(classes) <= count <= len(known):
        raise ConfigError(
            f"data.labelled: expected {len(classes)}, one for each class, to {len(known)}, the "
            f"labelled images of the student, found {count}"
        )
    # Of positions in ascending order, so that it does not depend on the order of the division.
    known = known.sort().values
    random = torch.Generator().manual_seed(derive_seed(labels.labelled_seed, "labelled"))
    drawn = known[torch.randperm(len(known), generator=random)[:count]]
    missing = set(classes.tolist()) - set(targets[drawn].tolist())
    if missing:
        raise ConfigError(
            f"data.labelled: of {count} images drawn by data.labelled_seed {labels.labelled_seed}, "
            f"none is of class {min(missing)}; expected every class, take more or another seed"
        )
    return drawn


def train_targets(
    targets: Int64[Tensor, " N"], division: Division, labels: LabelSpec, num_classes: int
) -> Int64[Tensor, " T"]:
    """The labels that the student's images have: hidden ones are gone, some may be wrong.

    Args:
        targets: Class of every training image.
        division: What they are for.
        labels: Which labels are there.
        num_classes: C.
    """
    seen = torch.full_like(targets, UNKNOWN)
    known = targets[division.labelled]
    seen[division.labelled] = with_noise(
        known, labels.label_noise, num_classes, labels.label_noise_seed
    )
    return seen[division.train]


def with_noise(
    targets: Int64[Tensor, " N"], share: float, num_classes: int, seed: int
) -> Int64[Tensor, " N"]:
    """Labels of which a share is drawn anew, uniformly over all C classes; 1/C of those stay right.

    Args:
        targets: The labels.
        share: Share of them to draw anew.
        num_classes: C.
        seed: Seed of which ones, and of what they become.
    """
    if share == 0:
        return targets
    random = torch.Generator().manual_seed(derive_seed(seed, "label noise"))
    count = round(share * len(targets))
    wrong = torch.randperm(len(targets), generator=random)[:count]
    noisy = targets.clone()
    noisy[wrong] = torch.randint(num_classes, (count,), generator=random)
    return noisy


def test_division(targets: Int64[Tensor, " N"], fraction: float) -> tuple[Tensor, Tensor]:
    """Positions of images to train on and, a share of every class, of images to report on.

    The same ones every time; images without a label are trained on.

    Args:
        targets: Classes; `UNKNOWN` where there is no label.
        fraction: The share.

    Raises:
        ConfigError: A share that leaves no images on one side.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"test_fraction: expected a share between 0 and 1, found {fraction}")
    order = _permutation(len(targets), derive_seed(0, "test"))
    taken = torch.zeros_like(targets, dtype=torch.bool)
    for label in range(int(targets.max()) + 1):
        own = order[targets[order] == label]
        taken[own[: round(fraction * len(own))]] = True
    if not taken.any() or bool(taken[targets != UNKNOWN].all()):
        expected = f"a share that leaves images on both sides of {len(targets)}"
        raise ConfigError(f"test_fraction: expected {expected}, found {fraction}")
    return (~taken).nonzero().squeeze(1), taken.nonzero().squeeze(1)


def shard_rows(length: int, shard: Shard) -> slice:
    """The rows of one process: parts of (nearly) equal length, in order, that are all together."""
    rank, processes = shard
    return slice(rank * length // processes, (rank + 1) * length // processes)


def _validation_size(available: int, fraction: float) -> int:
    if not 0 <= fraction < 1:
        raise ConfigError(f"val_fraction: expected a share in [0, 1), found {fraction}")
    size = round(available * fraction)
    if 0 < size == available or (fraction > 0 and size == 0):
        expected = f"a share that leaves images on both sides of {available}"
        raise ConfigError(f"val_fraction: expected {expected}, found {fraction}")
    return size


def _permutation(length: int, seed: int) -> Int64[Tensor, " N"]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "split"))
    return torch.randperm(length, generator=generator)


def _rank_within_class(targets: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    """How many images of the same class come before each image."""
    by_class = torch.argsort(targets, stable=True)
    counts = torch.bincount(targets)
    first = (counts.cumsum(dim=0) - counts)[targets[by_class]]
    ranks = torch.empty_like(targets)
    ranks[by_class] = torch.arange(len(targets)) - first
    return ranks
