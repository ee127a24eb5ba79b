"""Batches on one device: an endless, seeded, resumable stream to train on, and a plain pass.

The images stay on the device as bytes. A stream draws the random numbers of a whole epoch on the
CPU, so that they are the same on every device, and moves them there once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor
from torch.nn import functional

from mtkd_env.data.augment import crop_and_flip, normalize
from mtkd_env.data.dataset import Split
from mtkd_env.errors import ConfigError
from mtkd_env.seeding import derive_seed
from mtkd_env.types import Batch


class StreamState(TypedDict):
    """Where a stream is; `samples` and `batch_size` guard against another stream's state."""

    generator: Tensor
    epoch: int
    step: int
    samples: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class _Epoch:
    """What is drawn for one epoch: the order of the images, and each one's crop and flip."""

    index: Int64[Tensor, " N"]
    offsets: Int64[Tensor, "N 2"]
    flips: Bool[Tensor, " N"]


class BatchStream(Iterator[Batch]):
    """Endless batches of shuffled, augmented, normalised images on one device.

    Every epoch visits the images in a new order and leaves out the last ones if they do not fill
    a batch. The order depends on the seed alone, not on the augmentation.

    Args:
        split: The images to draw from.
        batch_size: Number of images in every batch.
        mean: Mean of each channel in units of [0, 1].
        std: Standard deviation of each channel.
        device: Where the images live and the batches are made.
        seed: Seed of order, crops and flips.
        crop_padding: Zeros [pixels] that a random crop may reach into on each side.
        flip: Whether images are mirrored at random.
        augment: False switches crops and flips off.

    Attributes:
        batch_size: Number of images in every batch.
        samples: Number of images in the split.
        steps_per_epoch: Number of batches in an epoch.
        epoch: Number of completed epochs.
        step: Number of batches given out since the epoch began.

    Raises:
        ConfigError: A batch size that is not between 1 and the number of images.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        mean: Float32[Tensor, " K"],
        std: Float32[Tensor, " K"],
        device: torch.device | str,
        seed: int,
        crop_padding: int = 0,
        flip: bool = False,
        augment: bool = True,
    ) -> None:
        if not 1 <= batch_size <= len(split):
            raise ConfigError(
                f"batch_size: expected 1 to {len(split)}, the number of images, found {batch_size}"
            )
        self.batch_size = batch_size
        self.samples = len(split)
        self.steps_per_epoch = len(split) // batch_size
        self.epoch = 0
        self.step = 0
        self._padding = crop_padding if augment else 0
        self._flip = flip and augment
        self._size = (split.images.shape[2], split.images.shape[3])
        self._device = torch.device(device)
        self._images = functional.pad(split.images.to(device), (self._padding,) * 4).contiguous()
        self._targets = split.targets.to(device)
        self._mean, self._std = mean.to(device), std.to(device)
        self._drawn: _Epoch | None = None
        self._generator = torch.Generator()
        self.reseed(seed)

    def __next__(self) -> Batch:
        """The next batch; `index` is the position in the split."""
        if self._drawn is None:
            self._drawn = self._draw()
        rows = slice(self.step * self.batch_size, (self.step + 1) * self.batch_size)
        index = self._drawn.index[rows]
        offsets, flips = self._drawn.offsets[rows], self._drawn.flips[rows]
        images = crop_and_flip(self._images, index, offsets, flips, self._size)
        self._advance()
        return Batch(normalize(images, self._mean, self._std), self._targets[index], index)

    def reseed(self, seed: int) -> None:
        """Starts all over, from the first epoch of another seed."""
        self._generator.manual_seed(derive_seed(seed, "stream"))
        self._begin(epoch=0, step=0)

    def state_dict(self) -> StreamState:
        """All that the next batches depend on, in tensors and integers."""
        return {
            "generator": self._start.clone(),
            "epoch": self.epoch,
            "step": self.step,
            "samples": self.samples,
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: StreamState) -> None:
        """Goes on where another stream over the same split was.

        Raises:
            ConfigError: The state is of a stream with other numbers of images.
        """
        found, own = (state["samples"], state["batch_size"]), (self.samples, self.batch_size)
        if found != own:
            raise ConfigError(
                f"stream state: expected {own[0]} images in batches of {own[1]}, "
                f"found {found[0]} in batches of {found[1]}"
            )
        # A checkpoint may have been read onto the device of the images.
        self._generator.set_state(state["generator"].to("cpu"))
        self._begin(state["epoch"], state["step"])

    def _begin(self, epoch: int, step: int) -> None:
        """Stands at a step of an epoch whose numbers the generator is about to draw."""
        self.epoch, self.step = epoch, step
        self._start = self._generator.get_state()
        self._drawn = None

    def _advance(self) -> None:
        self.step += 1
        if self.step == self.steps_per_epoch:
            self._begin(self.epoch + 1, step=0)

    def _draw(self) -> _Epoch:
        """The numbers of an epoch; equally many are drawn for every kind of augmentation."""
        generator = self._generator
        index = torch.randperm(self.samples, generator=generator)
        shifts = 2 * self._padding + 1
        offsets = torch.randint(shifts, (self.samples, 2), generator=generator)
        flips = (torch.rand(self.samples, generator=generator) < 0.5) & self._flip
        # Not blocking spares the host a wait for the device; pageable memory is safe to free.
        index, offsets, flips = (
            drawn.to(self._device, non_blocking=True) for drawn in (index, offsets, flips)
        )
        return _Epoch(index, offsets, flips)


def evaluation_batches(
    split: Split,
    batch_size: int,
    *,
    mean: Float32[Tensor, " K"],
    std: Float32[Tensor, " K"],
    device: torch.device | str,
) -> Iterator[Batch]:
    """One pass over a split in its order, normalised only; the last batch may be smaller.

    To pass often without copying the images each time, give a split that is on the device.

    Raises:
        ConfigError: A batch size below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected 1 or more, found {batch_size}")
    split, mean, std = split.to(device), mean.to(device), std.to(device)
    positions = torch.arange(len(split), device=device)
    parts = (part.split(batch_size) for part in (split.images, split.targets, positions))
    return (
        Batch(normalize(images, mean, std), targets, index)
        for images, targets, index in zip(*parts, strict=True)
    )
