"""Where the batches of a stream come from; and those of images in memory, made on the device."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn import functional

from mtkd_env.data.augment import crop_and_flip, normalize
from mtkd_env.data.split import Split
from mtkd_env.types import Batch

LARGEST_SEED = 2**63 - 1


class Views(ABC):
    """Makes batches of normalised, randomly augmented views of the images of a split."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def batches(
        self, order: Int64[Tensor, " N"], generator: torch.Generator, rows: Sequence[slice]
    ) -> Iterator[Batch]:
        """Some batches of an epoch.

        Args:
            order: Positions in the split, in the order of the whole epoch.
            generator: Gives the random numbers of the whole epoch before the first batch.
            rows: The part of the order that each batch holds.
        """


class MemoryViews(Views):
    """Crops and mirrors of images that live on the device.

    Args:
        split: The images.
        mean: Mean of each channel in units of [0, 1].
        std: Standard deviation of each channel.
        device: Where the images live and the batches are made.
        padding: Zeros [pixels] that a random crop may reach into on each side.
        flip: Whether images are mirrored at random.
    """

    def __init__(
        self,
        split: Split,
        *,
        mean: Float32[Tensor, " K"],
        std: Float32[Tensor, " K"],
        device: torch.device | str,
        padding: int,
        flip: bool,
    ) -> None:
        self._padding = padding
        self._flip = flip
        self._size = (split.images.shape[2], split.images.shape[3])
        self._device = torch.device(device)
        self._images = functional.pad(split.images.to(device), (padding,) * 4).contiguous()
        self._targets = split.targets.to(device)
        self._mean, self._std = mean.to(device), std.to(device)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._targets)

    def batches(
        self, order: Int64[Tensor, " N"], generator: torch.Generator, rows: Sequence[slice]
    ) -> Iterator[Batch]:
        """Some batches of an epoch; equally many numbers are drawn for every augmentation."""
        shifts = 2 * self._padding + 1
        offsets = torch.randint(shifts, (len(order), 2), generator=generator)
        flips = (torch.rand(len(order), generator=generator) < 0.5) & self._flip
        # Not blocking spares the host a wait for the device; pageable memory is safe to free.
        order, offsets, flips = (
            drawn.to(self._device, non_blocking=True) for drawn in (order, offsets, flips)
        )
        for part in rows:
            index = order[part]
            images = crop_and_flip(self._images, index, offsets[part], flips[part], self._size)
            yield Batch(normalize(images, self._mean, self._std), self._targets[index], index)
