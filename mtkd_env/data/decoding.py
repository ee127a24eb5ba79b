"""Views of image files, decoded ahead by worker processes that hold a limited number of them.

What a view is depends on the file and on one seed, so that neither the number of workers nor the
batches that came before change it.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mtkd_env.data.reading import Part, read_image
from mtkd_env.errors import ConfigError
from mtkd_env.seeding import seeded

# Of the images of ImageNet, per channel; published networks were trained on images normalised so.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Images that a worker makes at a time; the workers share the work of a batch.
CHUNK = 32

# Chunks that one worker makes ahead at most.
MOST_AHEAD = 8

# DeiT's RandAugment (Touvron et al., 2021): magnitudes from a normal distribution around 9 of 10.
LEVELS = 10
STEPS_PER_LEVEL = 4
MAGNITUDE = 9.0
MAGNITUDE_STD = 0.5

# Paths of the images of a chunk, and the seed of each one's view.
Request = tuple[list[str], list[int]]

# What workers are asked for, and what they make of it.
Asked = TypeVar("Asked")
Product = TypeVar("Product")


@dataclass(frozen=True)
class View:
    """Makes what a batch holds of an image: bytes, or floats that are normalised already.

    Attributes:
        make: Makes it of the part that is shown.
        choose: Chooses this part, of width and height; by default the whole image is shown.
    """

    make: Callable[[Image.Image], Tensor]
    choose: Callable[[tuple[int, int]], Part] | None = None

    def __call__(self, image: Image.Image) -> Tensor:
        """Of an image."""
        return self.make(image if self.choose is None else self.choose(image.size).of(image))

    def read(self, path: str, *, exif: bool) -> Tensor:
        """Of an image file, turned as its EXIF data says if `exif`.

        Raises:
            ConfigError: It cannot be read; names it.
        """
        return self.make(read_image(path, exif=exif, choose=self.choose))


def central_view(image_size: int, resize: int, interpolation: str) -> View:
    """The unaugmented view: the shorter side resized, the central square taken."""
    from torchvision.transforms import InterpolationMode, v2

    resized = v2.Resize(resize, InterpolationMode(interpolation))
    return View(v2.Compose([resized, v2.CenterCrop(image_size), v2.PILToTensor()]))


def _random_part(image_size: int, scaled: bool, size: tuple[int, int]) -> Part:
    """What torchvision's `RandomResizedCrop` would cut out of an image of such width and height."""
    from torchvision.transforms import v2

    # Only the size of an image is looked at.
    empty = torch.empty(size[::-1], device="meta")
    box = v2.RandomResizedCrop(image_size).make_params([empty])
    left, top = box["left"], box["top"]
    needed = image_size if scaled else None
    return Part(left, top, left + box["width"], top + box["height"], needed)


def standard_view(image_size: int, *, scaled: bool = False) -> View:
    """A part of random size and shape, resized, mirrored at random.

    Resized as a tensor, three times as fast as by Pillow and within a few levels of the same; and
    of the image only that part is copied.

    Args:
        image_size: Height and width [pixels].
        scaled: Whether images may be decoded smaller; see `reading.read_image`.
    """
    from torchvision.transforms import v2

    flip = v2.RandomHorizontalFlip()

    def make(part: Image.Image) -> Tensor:
        # The channels are last in memory.
        pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1)
        return flip(v2.functional.resize(pixels, [image_size, image_size]))

    return View(make, partial(_random_part, image_size, scaled))


def deit_view(image_size: int, *, scaled: bool = False) -> View:
    """`standard_view`, RandAugment (9, 0.5) and random erasing with probability 0.25; normalised.

    The augmentation of DeiT (Touvron et al., 2021), appendix, table 9. Its RandAugment is timm's,
    whose scale of ten levels is kept; torchvision's always applies both of the operations that it
    draws, where timm's skips each with probability 1/2, and never adds to dark pixels alone.
    """
    from torchvision.transforms import InterpolationMode, v2

    size = (image_size, image_size)
    make = v2.Compose(
        [
            v2.Resize(size, InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            _rand_augment(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(p=0.25, value="random"),
        ]
    )
    return View(make, partial(_random_part, image_size, scaled))


def _rand_augment() -> Any:
    """RandAugment with two operations, whose magnitude is drawn anew for every image."""
    from torchvision.transforms import InterpolationMode, v2

    spread = round(2 * MAGNITUDE_STD * STEPS_PER_LEVEL)
    middle = round(MAGNITUDE * STEPS_PER_LEVEL)
    last = LEVELS * STEPS_PER_LEVEL
    magnitudes = range(middle - spread, min(middle + spread, last) + 1)
    return v2.RandomChoice(
        [
            v2.RandAugment(
                num_ops=2,
                magnitude=magnitude,
                num_magnitude_bins=last + 1,
                interpolation=InterpolationMode.BILINEAR,
                fill=[round(255 * mean) for mean in MEAN],
            )
            for magnitude in magnitudes
        ],
        p=[_density(magnitude / STEPS_PER_LEVEL) for magnitude in magnitudes],
    )


def _density(magnitude: float) -> float:
    return math.exp(-(((magnitude - MAGNITUDE) / MAGNITUDE_STD) ** 2) / 2)


def view_bytes(view: View) -> int:
    """Bytes that one view takes."""
    with seeded(0):
        return view(Image.new("RGB", (64, 64))).nbytes


def default_workers() -> int:
    """One worker for each core that this process may use, up to eight."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, usable or 1)


@dataclass(frozen=True)
class Ahead:
    """How much is decoded ahead.

    Attributes:
        workers: Processes that decode; 0 decodes each chunk when it is asked for.
        chunks: Chunks that each of them makes ahead, the one in the making included.
    """

    workers: int
    chunks: int

    @classmethod
    def within(cls, prefetch_bytes: int, chunk_bytes: int, workers: int) -> "Ahead":
        """As much as fits into some memory, but at least one chunk, by at most so many workers."""
        chunks = max(1, prefetch_bytes // chunk_bytes)
        workers = min(workers, chunks)
        return cls(workers, min(MOST_AHEAD, chunks // workers) if workers else 0)


class _Made(Dataset[Any]):
    """Makes what is requested; runs in the workers."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __getitem__(self, request: Any) -> Any:
        """What was requested, or an error, which so arrives as it is and not as a traceback."""
        try:
            return self._make(request)
        except ConfigError as error:
            return error


def made(
    make: Callable[[Asked], Product],
    requests: Iterable[Asked],
    *,
    workers: int,
    pin: bool,
    prefetch: int | None = None,
    flag: str = "workers",
    relief: str = "fewer of them need less memory",
) -> Iterator[Product]:
    """What is made of every request, in order; the workers end with the iteration.

    Args:
        make: Makes it, in a worker.
        requests: What it is given.
        workers: Processes that make it ahead; 0 makes it when it is asked for.
        pin: Whether tensors lie where a GPU can fetch them without the host's waiting.
        prefetch: How many each worker makes ahead; torch's choice by default.
        flag: What the number of workers is called, for the error.
        relief: What helps where workers need too much memory.

    Raises:
        ConfigError: A file that cannot be used, named; or a worker that was killed.
    """
    loader = DataLoader(
        _Made(make),
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=pin,
        # Only so that the loader leaves the global one alone.
        generator=torch.Generator(),
    )
    try:
        for product in loader:
            if isinstance(product, ConfigError):
                raise product
            yield product
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{flag}: a process that decodes images died ({reason}); {relief}"
        ) from error


def views_of(view: View, exif: bool, request: Request) -> Tensor:
    """Views of files, each under its seed, as one tensor; see `View.read`."""
    return torch.stack([_see(view, exif, *one) for one in zip(*request, strict=True)])


def _see(view: View, exif: bool, path: str, seed: int) -> Tensor:
    with seeded(seed):
        return view.read(path, exif=exif)
