"""Batches of images with boxes and masks, to train on and to judge by."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from experiments.transfer.coco import CocoSplit, Target
from mtkd_env.data.decoding import default_workers, made
from mtkd_env.data.split import WHOLE, Shard
from mtkd_env.errors import ConfigError
from mtkd_env.seeding import derive_seed

# An image, uint8 (3, H, W), and what is to be seen on it.
Example = tuple[Tensor, Target]

# Position of an image, and whether it is mirrored.
Request = tuple[int, bool]


class _Examples:
    """Makes batches of examples; runs in the workers."""

    def __init__(self, split: CocoSplit, *, masks: bool, truth: bool) -> None:
        self._split = split
        self._masks = masks
        self._make = split.truth if truth else split.target

    def __call__(self, requests: Sequence[Request]) -> list[Example]:
        """The examples of a batch."""
        return [self._example(*request) for request in requests]

    def _example(self, position: int, mirrored: bool) -> Example:
        image = self._split.image(position)
        target = self._make(position, masks=self._masks)
        return flip(image, target) if mirrored else (image, target)


def flip(image: UInt8[Tensor, "3 H W"], target: Target) -> Example:
    """An image and what is to be seen on it, mirrored from left to right."""
    left, top, right, bottom = target["boxes"].unbind(1)
    width = image.shape[-1]
    mirrored = {"boxes": torch.stack([width - right, top, width - left, bottom], 1)}
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(-1)
    return image.flip(-1), {**target, **mirrored}


@dataclass(frozen=True)
class Reading:
    """How examples are read.

    Attributes:
        masks: Whether with their masks.
        workers: Processes that do it, for each training process; one per core up to eight by
            default, and 0 reads in the training process.
        pin: Whether images lie where a GPU can fetch them without the host's waiting.
    """

    masks: bool
    workers: int | None = None
    pin: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers: expected 0 or more, got {self.workers}")


def training_batches(
    split: CocoSplit,
    reading: Reading,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    begin: int = 0,
    shard: Shard = WHOLE,
) -> Iterator[list[Example]]:
    """One pass over the images with something on them, in a new order, mirrored at random.

    The last images are left out if they do not fill a batch. Order and mirroring depend on seed and
    epoch alone; of several processes, each gets its rows of the batches that a single one would.

    Args:
        split: The images.
        reading: How they are read.
        batch_size: Images in a batch, over all processes; a multiple of their number.
        seed: Seed.
        epoch: The epoch.
        begin: Number of the first batch to give, from 0; those before are not read.
        shard: Which process this is, and of how many.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, f"images of epoch {epoch}"))
    order = torch.randperm(len(split.learnable), generator=generator).tolist()
    mirrored = (torch.rand(len(order), generator=generator) < 0.5).tolist()
    requests = [
        (split.learnable[row], flipped) for row, flipped in zip(order, mirrored, strict=True)
    ]
    number, count = shard
    own = batch_size // count
    firsts = range(number * own, len(order) // batch_size * batch_size, batch_size)[begin:]
    return _read(split, [requests[first : first + own] for first in firsts], reading, truth=False)


def evaluation_batches(
    split: CocoSplit, reading: Reading, *, batch_size: int, shard: Shard = WHOLE
) -> Iterator[list[Example]]:
    """One pass over all images, as they are; every process gets those at every n-th place.

    Args:
        split: The images.
        reading: How they are read.
        batch_size: Images in a batch of one process; the last one may have fewer.
        shard: Which process this is, and of how many.
    """
    number, count = shard
    own = [(position, False) for position in range(number, len(split.images), count)]
    parts = [own[begin : begin + batch_size] for begin in range(0, len(own), batch_size)]
    return _read(split, parts, reading, truth=True)


def _read(
    split: CocoSplit, requests: Sequence[Sequence[Request]], reading: Reading, *, truth: bool
) -> Iterator[list[Example]]:
    workers = default_workers() if reading.workers is None else reading.workers
    return made(
        _Examples(split, masks=reading.masks, truth=truth),
        requests,  # each a whole batch
        workers=min(workers, len(requests)),
        pin=reading.pin,
    )
