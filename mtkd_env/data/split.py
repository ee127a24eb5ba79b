"""Which images are learned from, chosen by and reported on, wherever the images themselves are.

Also which of them each of several processes works on.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from mtkd_env.errors import ConfigError
from mtkd_env.seeding import derive_seed

# Which process this is, counted from 0, and how many work together.
Shard = tuple[int, int]
WHOLE: Shard = (0, 1)


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

    @abstractmethod
    def to(self, device: torch.device | str) -> "ImageSplit":
        """The same split, with what there is of it in memory on a device."""


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

    def to(self, device: torch.device | str) -> "Split":
        """The same split on a device; no copy of what is there already."""
        return Split(self.images.to(device), self.targets.to(device), self.index.to(device))


S = TypeVar("S", bound=ImageSplit)


@dataclass(frozen=True, eq=False)
class Splits(Generic[S]):
    """The three parts of a dataset: to learn from, to choose by, to report on.

    Attributes:
        train: What students and teachers learn from.
        val: Held out of the training images for every choice; None if nothing was held out.
        test: The dataset's own test images.
    """

    train: S
    val: S | None
    test: S


def divide(
    targets: Int64[Tensor, " N"], val_fraction: float, seed: int, train_size: int | None
) -> tuple[Int64[Tensor, " T"], Int64[Tensor, " V"]]:
    """Positions to train on and positions to hold out, at random, each in ascending order.

    The validation images depend on `val_fraction` and `seed` alone, and a smaller training set is
    part of every larger one.

    Args:
        targets: Class of each image.
        val_fraction: Share of the images to hold out.
        seed: Seed of the division.
        train_size: Number of the remaining images to keep, as even over the classes as they
            allow; all of them by default.

    Raises:
        ConfigError: A fraction outside [0, 1) or too small to hold out an image, or a training
            size that is not between 1 and the number of images that remain.
    """
    held_out = _validation_size(len(targets), val_fraction)
    order = _permutation(len(targets), seed)
    val, train = order[:held_out], order[held_out:]
    if train_size is not None:
        if not 1 <= train_size <= len(train):
            expected = f"1 to {len(train)} ({len(order)} images, {held_out} held out)"
            raise ConfigError(f"train_size: expected {expected}, found {train_size}")
        by_rank = torch.argsort(_rank_within_class(targets[train]), stable=True)
        train = train[by_rank[:train_size]]
    return train.sort().values, val.sort().values


def shard_rows(length: int, shard: Shard) -> slice:
    """The rows of one process: parts of (nearly) equal length, in order, that are all together."""
    rank, processes = check_shard(shard)
    return slice(rank * length // processes, (rank + 1) * length // processes)


def check_shard(shard: Shard) -> Shard:
    """The same shard.

    Raises:
        ConfigError: The process is not one of them.
    """
    rank, processes = shard
    if not 0 <= rank < processes:
        raise ConfigError(f"shard: expected (0 to n - 1, n processes), found {shard}")
    return shard


def _validation_size(available: int, fraction: float) -> int:
    if not 0 <= fraction < 1:
        raise ConfigError(f"val_fraction: expected a share in [0, 1), found {fraction}")
    size = round(available * fraction)
    if size == available or (fraction > 0 and size == 0):
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
