"""Batches of images with boxes and masks, to train on and to judge by."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from experiments.transfer.coco import CocoSplit, Target
from mtkd_env.data.decoding import made
from mtkd_env.data.split import WHOLE, Shard
from mtkd_env.seeding import derive_seed

# An image, uint8 (3, H, W), and what is to be seen on it.
Example = tuple[Tensor, Target]

# Position of an image, and whether it is mirrored.
Request = tuple[int, bool]


def _examples(
    split: CocoSplit, requests: Sequence[Request], *, masks: bool, truth: bool
) -> list[Example]:
    """The examples of a batch; runs in the workers."""
    make = split.truth if truth else split.target
    examples: list[Example] = []
    for position, mirrored in requests:
        image, target = split.image(position), make(position, masks=masks)
        examples.append(flip(image, target) if mirrored else (image, target))
    return examples


def flip(image: UInt8[Tensor, "3 H W"], target: Target) -> Example:
    """An image and what is to be seen on it, mirrored from left to right."""
    left, top, right, bottom = target["boxes"].unbind(1)
    width = image.shape[-1]
    mirrored = {"boxes": torch.stack([width - right, top, width - left, bottom], 1)}
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(-1)
    return image.flip(-1), {**target, **mirrored}


class Reading(NamedTuple):
    """How examples are read.

    Attributes:
        masks: Whether with their masks.
        workers: Processes that do it, for each training process; 0 reads in the training process.
        pin: Whether images lie where a GPU can fetch them without the host's waiting.
    """

    masks: bool
    workers: int
    pin: bool = False


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
    make = partial(_examples, split, masks=reading.masks, truth=truth)
    # Each request is a whole batch.
    return made(make, requests, workers=min(reading.workers, len(requests)), pin=reading.pin)
