"""Images of a user's own Dataset that draws them at random: anew in every epoch, as it would."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from mtkd_env.data.augment import normalize
from mtkd_env.data.dataset import NONE, ImageData
from mtkd_env.data.decoding import made
from mtkd_env.data.split import Split
from mtkd_env.data.views import SeededViews, Views, ViewSet
from mtkd_env.errors import ConfigError

# What the augmentation of such images is called.
OWN = "own"

# Makes an image of its position in the dataset and of a seed.
Draw = Callable[[int, int], UInt8[Tensor, "K H W"]]


@dataclass(frozen=True, eq=False)
class LiveSplit(Split):
    """Training images that can be drawn anew.

    Attributes:
        places: Position of each in the user's dataset.
    """

    places: Int64[Tensor, " N"]


@dataclass(frozen=True, eq=False)
class LiveImages(ImageData):
    """Images of which those to train on are drawn anew whenever they are seen.

    All else, such as their mean and what is held out of them, is of the images that were drawn
    once; see `ImageData`.

    Attributes:
        draw: Draws one of the training images, in the training process or in others.
        workers: Processes that draw; 0 draws in the training process.
        places: Position of each training image in the user's dataset; all by default.
    """

    augmentation: str = OWN
    draw: Draw = field(kw_only=True)
    workers: int = 0
    places: Int64[Tensor, " N"] | None = None

    @property
    def parts(self) -> tuple[Split, Split | None, Split]:
        """All training images, the validation images if any, the test images."""
        train, val, test = super().parts
        places = train.index if self.places is None else self.places
        return LiveSplit(**vars(train), places=places), val, test

    def with_test(self, train: Split, test: Split) -> "LiveImages":
        """The same with other images to train on and to report on."""
        assert isinstance(train, LiveSplit)
        images = super().with_test(train, test)
        assert isinstance(images, LiveImages)
        return replace(images, places=train.places)

    def augmented(self, name: str) -> "LiveImages":
        """The same; to what is drawn nothing is done.

        Raises:
            ConfigError: An augmentation is asked for.
        """
        if name != NONE:
            raise ConfigError(
                f"augmentation: expected none, because {self.name} itself draws its images at "
                f"random, found {name}"
            )
        return self

    def views(self, split: Split, device: torch.device, view_set: ViewSet) -> Views:
        """Images that are drawn when they are seen; of other images see `ImageData`."""
        if not isinstance(split, LiveSplit):
            return super().views(split, device, view_set)
        return LiveViews(self, split, device, view_set)


class LiveViews(SeededViews):
    """Images that are drawn under a seed each."""

    def __init__(
        self, data: LiveImages, split: LiveSplit, device: torch.device, view_set: ViewSet
    ) -> None:
        super().__init__(split.targets.to(device), view_set, split.places, alike=False)
        self._data = data
        self._places = split.places
        self._mean, self._std = data.mean.to(device), data.std.to(device)

    def inputs(
        self, order: Int64[Tensor, " N"], drawn: Int64[Tensor, " N"], rows: Sequence[slice]
    ) -> Iterator[Float32[Tensor, "B K H W"]]:
        """The images of some batches alone, under the seeds of their places."""
        places = self._places[order]
        asked = ([*zip(places[part].tolist(), drawn[part].tolist(), strict=True)] for part in rows)
        batches = made(
            partial(_stacked, self._data.draw),
            asked,
            workers=self._data.workers,
            pin=self.device.type == "cuda",
            flag="data.arguments.workers",
        )
        for images in batches:
            yield normalize(images.to(self.device, non_blocking=True), self._mean, self._std)


def _stacked(draw: Draw, asked: Sequence[tuple[int, int]]) -> Any:
    return torch.stack([draw(*one) for one in asked])
