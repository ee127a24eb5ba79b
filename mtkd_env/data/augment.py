"""Crop, flip, normalisation and mixing of whole batches, on any device."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from mtkd_env.errors import check_not_negative
from mtkd_env.seeding import seeded
from mtkd_env.types import Batch


class Crops:
    """Crops of padded images, mirrored left to right where asked, as a single gather.

    Args:
        padded: All images with their padding, contiguous.
        size: Height and width of a crop.
        flip: Whether any is asked to be mirrored.
    """

    def __init__(
        self, padded: UInt8[Tensor, "N K H W"], size: tuple[int, int], *, flip: bool
    ) -> None:
        _, channels, height, width = padded.shape
        lines = torch.arange(channels)[:, None] * height + torch.arange(size[0])
        begins, pixels = (lines * width).view(1, -1, 1), padded.view(-1)
        # What is gathered, and places of that behind a crop's corner, of it as it is and mirrored.
        # Positions in the flat storage are several times faster than to index the four axes.
        if flip:
            columns = torch.arange(size[1])
            self._parts = pixels
            places = begins + torch.stack([columns, columns.flip(0)]).unsqueeze(1)
        else:  # Whole lines, which is several times as fast again.
            runs = max(0, len(pixels) - size[1] + 1)
            self._parts = pixels.as_strided((runs, size[1]), (1, 1))
            places = begins
        self._places, self._shape = places.flatten(1).to(padded.device), (channels, *size)
        self._image, self._width = channels * height * width, width

    def corners(
        self, index: Int64[Tensor, " B"], top: Int64[Tensor, " B"], left: Int64[Tensor, " B"]
    ) -> Int64[Tensor, " B"]:
        """Where in the storage crops of some images begin, at these corners of the padded ones."""
        return index * self._image + top * self._width + left

    def __call__(
        self, corners: Int64[Tensor, " B"], mirrored: Int64[Tensor, " B"]
    ) -> UInt8[Tensor, "B K H W"]:
        """The crops at some corners; mirrored where there is a 1 and not a 0."""
        positions = self._places.index_select(0, mirrored).add_(corners[:, None])
        return self._parts.index_select(0, positions.view(-1)).view(-1, *self._shape)


def normalize(
    images: UInt8[Tensor, "B K H W"], mean: Float32[Tensor, " K"], std: Float32[Tensor, " K"]
) -> Float32[Tensor, "B K H W"]:
    """Images scaled from 0..255 to [0, 1], less the mean of each channel, in units of its std."""
    # In place, because of large images new memory costs more than the arithmetic. To divide bytes
    # gives the same numbers, but takes as long as all of this.
    scaled = images.to(torch.float32, copy=True).div_(255)
    return scaled.sub_(mean[:, None, None]).div_(std[:, None, None])


@dataclass(frozen=True, slots=True)
class Mixing:
    """How strongly images are mixed; of two ways, every batch takes either with equal chances.

    Attributes:
        mixup: α of mixup (Zhang et al., 2018): shares are drawn from Beta(α, α); 0 is none.
        cutmix: α of cutmix (Yun et al., 2019), likewise.

    Raises:
        ConfigError: A negative or infinite α.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(mixup=self.mixup, cutmix=self.cutmix)

    def __bool__(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup > 0 or self.cutmix > 0


UNMIXED = Mixing()


class Mixer:
    """Mixes every image of a batch with the one before it, the first with the last.

    Args:
        mixing: How strongly; of at least one kind.
        num_classes: C.
    """

    def __init__(self, mixing: Mixing, num_classes: int) -> None:
        from torchvision.transforms import v2

        kinds = ((v2.MixUp, mixing.mixup), (v2.CutMix, mixing.cutmix))
        self._mix = v2.RandomChoice(
            [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
        )

    def __call__(self, batch: Batch, seed: int) -> Batch:
        """The mixed batch; its `mixture` says the shares, `targets` the class of the largest."""
        with seeded(seed), torch.no_grad():
            inputs, mixture = self._mix(batch.inputs, batch.targets)
        return replace(batch, inputs=inputs, targets=mixture.argmax(dim=1), mixture=mixture)
