"""Batches of images with boxes and masks, to train on and to judge by."""

from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

from experiments.transfer.coco import CocoSplit, Target
from mtkd_env.data.split import WHOLE, Shard
from mtkd_env.seeding import derive_seed

# An image, uint8 (3, H, W), and what is to be seen on it.
Example = tuple[Tensor, Target]

# Position of an image, and whether it is mirrored.
Request = tuple[int, bool]


def examples(
    requests: Sequence[Request], split: CocoSplit, *, masks: bool, truth: bool = False
) -> list[Example]:
    """The examples of a batch, with what a detector learns from or the whole truth."""
    make = split.truth if truth else split.target
    found: list[Example] = []
    for position, mirrored in requests:
        image, target = split.image(position), make(position, masks=masks)
        found.append(flip(image, target) if mirrored else (image, target))
    return found


def flip(image: UInt8[Tensor, "3 H W"], target: Target) -> Example:
    """An image and what is to be seen on it, mirrored from left to right."""
    left, top, right, bottom = target["boxes"].unbind(1)
    width = image.shape[-1]
    mirrored = {"boxes": torch.stack([width - right, top, width - left, bottom], 1)}
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(-1)
    return image.flip(-1), {**target, **mirrored}


def training_requests(
    split: CocoSplit,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    begin: int = 0,
    shard: Shard = WHOLE,
) -> list[list[Request]]:
    """A pass over the images with something on them, in a new order, mirrored at random.

    The last images are left out if they do not fill a batch. Order and mirroring depend on seed and
    epoch alone; of several processes, each gets its rows of the batches that a single one would.

    Args:
        split: The images.
        batch_size: Images in a batch, over all processes; a multiple of their number.
        seed: Seed.
        epoch: The epoch.
        begin: Number of the first batch to give, from 0.
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
    return [requests[first : first + own] for first in firsts]


def evaluation_requests(
    split: CocoSplit, *, batch_size: int, shard: Shard = WHOLE
) -> list[list[Request]]:
    """The batches of a pass over all images, as they are; every process gets each n-th of them.

    Args:
        split: The images.
        batch_size: Images in a batch of one process; the last one may have fewer.
        shard: Which process this is, and of how many.
    """
    number, count = shard
    own = [(position, False) for position in range(number, len(split.images), count)]
    return [own[begin : begin + batch_size] for begin in range(0, len(own), batch_size)]
