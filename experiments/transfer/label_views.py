"""Views of images with a class for every pixel, made by processes that read ahead.

What a view is depends on the image and on one seed, so that neither the number of processes nor
what they made before changes it.
"""

from typing import NamedTuple

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from mtkd_env.data.decoding import MEAN

# Label of pixels that count neither in the loss nor in the result.
IGNORED = 255

# Factors on height and width of the images to train on, each as likely as any between.
SCALES = (0.5, 2.0)

# What padding is filled with: the colour that is nearly 0 once it is normalised.
FILL = [round(255 * mean) for mean in MEAN]


class Labelled(NamedTuple):
    """Images and their labels.

    Attributes:
        images: Pixels, uint8 (3, H, W), or (B, 3, H, W) of a batch.
        labels: Class of each pixel or `IGNORED`, uint8 (H, W) or (B, H, W).
    """

    images: Tensor
    labels: Tensor


def random_view(
    image: Image.Image, labels: Image.Image, size: tuple[int, int], seed: int
) -> Labelled:
    """A part of an image, scaled and mirrored at random, padded where the image is too small.

    Args:
        image: The image.
        labels: Its classes.
        size: Height and width of the view [pixels].
        seed: Seed of scale, place and mirroring.
    """
    generator = torch.Generator().manual_seed(seed)
    share, top, left, mirror = torch.rand(4, generator=generator).tolist()
    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * share
    row, rows, height = _stretch(image.height, size[0], scale, top)
    column, columns, width = _stretch(image.width, size[1], scale, left)
    # Scales nothing but the part.
    parts = [
        functional.resized_crop(part, row, column, rows, columns, [height, width], interpolation)
        for part, interpolation in (
            (image, InterpolationMode.BILINEAR),
            (labels, InterpolationMode.NEAREST),
        )
    ]
    if mirror < 0.5:
        parts = [functional.horizontal_flip(part) for part in parts]
    pixels, classes = as_tensors(*parts)
    return Labelled(padded(pixels, size, FILL), padded(classes[None], size, [IGNORED])[0])


def _stretch(side: int, wanted: int, scale: float, place: float) -> tuple[int, int, int]:
    """As many rows as give so many once they are scaled, or all that there are.

    Args:
        side: Rows of the image.
        wanted: Rows of the view.
        scale: Factor on them.
        place: Where to begin, from 0 to 1.

    Returns:
        The first row, the number of rows, and how many they are scaled to.
    """
    length = max(1, round(wanted / scale))
    if length < side:
        return int(place * (side - length + 1)), length, wanted
    return 0, side, min(wanted, max(1, round(side * scale)))


def as_tensors(image: Image.Image, labels: Image.Image) -> Labelled:
    """The pixels of an image and their classes."""
    return Labelled(functional.pil_to_tensor(image), functional.pil_to_tensor(labels)[0])


def padded(
    pixels: UInt8[Tensor, "K H W"], size: tuple[int, int], fill: int | list[int]
) -> UInt8[Tensor, "K H2 W2"]:
    """An image in the upper left corner of a larger one, filled channel by channel."""
    height, width = (larger - side for larger, side in zip(size, pixels.shape[1:], strict=True))
    return functional.pad(pixels, [0, 0, width, height], fill)


def fitted(
    pixels: UInt8[Tensor, "K H W"],
    size: tuple[int, int],
    interpolation: InterpolationMode,
    fill: int = 255,
) -> UInt8[Tensor, "K H2 W2"]:
    """An image scaled to fit into a frame of a height and width [pixels], by default white."""
    scale = min(wanted / side for wanted, side in zip(size, pixels.shape[1:], strict=True))
    scaled = [max(1, round(scale * side)) for side in pixels.shape[1:]]
    return padded(functional.resize(pixels, scaled, interpolation), size, fill)
