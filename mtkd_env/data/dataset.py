"""What a dataset is to those who train on it, and images in memory, checked on construction.

Where the images come from is a loader's business; those too many for the memory are
`image_files.ImageFiles`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Generic

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from mtkd_env.data.augment import UNMIXED, Mixer, Mixing, normalize
from mtkd_env.data.preprocessing import Preprocessing
from mtkd_env.data.split import (
    ALL_LABELS,
    WHOLE,
    LabelSpec,
    S,
    Shard,
    Split,
    Splits,
    divide,
    shard_rows,
    test_division,
    train_targets,
)
from mtkd_env.data.stream import BatchStream
from mtkd_env.data.views import FRESH, DrawnViews, MemoryViews, Views, ViewSet
from mtkd_env.errors import ConfigError, check_at_least_1, check_name
from mtkd_env.files import digest_of
from mtkd_env.types import UNKNOWN, Batch

MIN_SIDE = 8

NONE, CROP_FLIP = "none", "crop_flip"

# What torchvision does at random to an image that has been cropped and mirrored: RandAugment
# (Cubuk et al., 2020) and TrivialAugment (Müller and Hutter, 2021), with its defaults.
DRAWN = {"randaugment": "RandAugment", "trivialaugment": "TrivialAugmentWide"}

AUGMENTATIONS = (NONE, CROP_FLIP, *DRAWN)


class ImageSet(ABC, Generic[S]):
    """Images to learn from and images to report on, wherever they are.

    Attributes:
        name: Name in reports.
        num_classes: C; labels are 0 to C - 1.
        class_names: Name of each class; empty if they have none.
        repeats: How often an image occurs in an epoch.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    repeats: int = 1

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""

    @property
    @abstractmethod
    def moments(self) -> tuple[Float32[Tensor, " K"], Float32[Tensor, " K"]]:
        """`mean` and `std`."""

    @property
    def mean(self) -> Float32[Tensor, " K"]:
        """Mean of each channel that batches are normalised by, in units of [0, 1]."""
        return self.moments[0]

    @property
    def std(self) -> Float32[Tensor, " K"]:
        """Standard deviation of each channel that batches are normalised by."""
        return self.moments[1]

    @property
    def preprocessing(self) -> Preprocessing:
        """What is made of an image without augmentation, before a network sees it.

        By default pictures of another size are resized to that of the dataset's images.
        """
        return Preprocessing(self.image_shape, tuple(self.mean.tolist()), tuple(self.std.tolist()))

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of all that training and evaluation depend on, but names and places."""

    @property
    @abstractmethod
    def parts(self) -> tuple[S, S | None, S]:
        """All training images, the dataset's own validation images if any, its test images."""

    @abstractmethod
    def with_test(self, train: S, test: S) -> "ImageSet[S]":
        """The same with other images to train on and to report on."""

    @abstractmethod
    def augmented(self, name: str) -> "ImageSet[S]":
        """The same under another augmentation.

        Raises:
            ConfigError: It has none of that name.
        """

    def tested(self, fraction: float) -> "ImageSet[S]":
        """The same with images to report on, taken from those to train on if there are none.

        Args:
            fraction: Their share of every class.

        Raises:
            ConfigError: No share where there are none, or one where there are some.
        """
        train, _, test = self.parts
        if len(test) == 0 and not fraction:
            raise ConfigError(
                f"{self.name}: holds no test images; --data.test_fraction 0.2 takes a share of the "
                "training images"
            )
        if len(test) > 0 and fraction:
            raise ConfigError(
                f"test_fraction: expected 0, because {self.name} has test images, found {fraction}"
            )
        if not fraction:
            return self
        kept, taken = test_division(train.targets, fraction)
        return self.with_test(train.take(kept), train.take(taken))

    def split(
        self,
        val_fraction: float = 0.0,
        seed: int = 0,
        train_size: int | None = None,
        labels: LabelSpec = ALL_LABELS,
        reserved: Int64[Tensor, " R"] | None = None,
    ) -> Splits[S]:
        """Divides the training images at random; test images stay what they are.

        Args:
            val_fraction: Share of the training images to hold out.
            seed: Seed of the division.
            train_size: Number of the remaining images to keep; all of them by default.
            labels: Which of their labels are there.
            reserved: Positions of training images that are somebody else's.

        Raises:
            ConfigError: A share or a size that does not fit the number of images, or images to hold
                out where the dataset has validation images.
        """
        whole, val, test = self.parts
        if val_fraction and val is not None:
            raise ConfigError(
                f"val_fraction: expected 0, because {self.name} has images to validate on, "
                f"found {val_fraction}"
            )
        parts = divide(whole.targets, val_fraction, seed, train_size, labels, reserved)
        seen = train_targets(whole.targets, parts, labels, self.num_classes)
        train = whole.take(parts.train).relabelled(seen)
        return Splits(
            train=train,
            val=whole.take(parts.val) if len(parts.val) else val,
            test=test,
            labelled=whole.take(parts.heldout)
            if len(parts.heldout)
            else train.take((seen != UNKNOWN).nonzero().squeeze(1)),
        )

    def stream(
        self,
        split: S,
        *,
        batch_size: int,
        device: torch.device | str,
        seed: int,
        shard: Shard = WHOLE,
        mixing: Mixing = UNMIXED,
        view_set: ViewSet = FRESH,
    ) -> BatchStream:
        """Endless augmented batches of a split; see `BatchStream` for the arguments.

        Args:
            split: The images.
            batch_size: Images in every batch, over all processes.
            device: Where the batches are made.
            seed: Seed of order and augmentation.
            shard: Which process this is, and of how many.
            mixing: How images are mixed.
            view_set: Which views of them are seen.
        """
        return BatchStream(
            self.views(split, torch.device(device), view_set),
            batch_size=batch_size,
            seed=seed,
            shard=shard,
            mixer=Mixer(mixing, self.num_classes) if mixing else None,
            repeats=self.repeats,
        )

    @abstractmethod
    def views(self, split: S, device: torch.device, view_set: ViewSet) -> Views:
        """Augmented views of a split.

        Raises:
            ConfigError: A set of views that the images do not have.
        """

    @abstractmethod
    def evaluation_batches(
        self, split: S, batch_size: int, *, device: torch.device | str, shard: Shard = WHOLE
    ) -> Iterator[Batch]:
        """One unaugmented pass over a split in its order; the last batch may be smaller.

        Of several processes, each passes over a part of its own. To pass often without copying the
        images each time, give a split that is on the device.
        """

    @abstractmethod
    def pixels(self, split: S, positions: Int64[Tensor, " B"]) -> UInt8[Tensor, "B K H W"]:
        """A few images of a split, unaugmented and unnormalised, to look at."""


@dataclass(frozen=True, eq=False)
class ImageData(ImageSet[Split]):
    """A dataset in memory, on the CPU.

    It is what users' files end up in, so it checks the arrays itself, and says what is wrong.

    Attributes:
        name: Name in reports.
        x_train: Training images, uint8 (N, K, H, W).
        y_train: Their classes, int64 (N,); `UNKNOWN` for an image without a label.
        x_test: Test images, uint8 (N2, K, H, W); maybe none, see `tested`.
        y_test: Their classes, int64 (N2,).
        num_classes: C; labels are 0 to C - 1.
        flip: Whether a mirrored image is still one of its class.
        crop_padding: Zeros [pixels] that a random crop may reach into on each side.
        class_names: Name of each class; empty if they have none.
        x_val: Validation images, if the dataset has its own; none by default.
        y_val: Their classes.
        augmentation: Name in `AUGMENTATIONS`.

    Raises:
        ConfigError: Arrays that do not fit this description or each other; names the array.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    flip: bool
    crop_padding: int
    class_names: tuple[str, ...] = ()
    x_val: Tensor | None = None
    y_val: Tensor | None = None
    augmentation: str = CROP_FLIP

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise _wrong("crop_padding", "0 or more", self.crop_padding)
        for part in ("train", "test", "val"):
            images, targets = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            if part != "train" and (images is None or len(images) == 0):
                continue
            check_same_length(part, images, targets)
            _check_images(f"x_{part}", images)
            _check_targets(f"y_{part}", targets, self.num_classes, missing=part == "train")
            if images.shape[1:] != self.image_shape:
                expected = f"images of shape {self.image_shape} as in x_train"
                raise _wrong(f"x_{part}", expected, tuple(images.shape[1:]))
        if self.num_classes < 2:
            raise _wrong("num_classes", "at least 2", self.num_classes)
        if len(self.class_names) not in {0, self.num_classes}:
            expected = f"a name for each of {self.num_classes} classes, or none"
            raise _wrong("class_names", expected, len(self.class_names))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    @cached_property
    def moments(self) -> tuple[Float32[Tensor, " K"], Float32[Tensor, " K"]]:
        """Mean and deviation of each channel over the training images; 1 for a constant one."""
        # From counts of the 256 levels: exact, and without a float copy of the images.
        channels = self.x_train.unbind(dim=1)
        counts = [torch.bincount(channel.flatten(), minlength=256) for channel in channels]
        share = torch.stack(counts).double() / channels[0].numel()
        levels = torch.arange(256, dtype=torch.float64) / 255
        mean = share @ levels
        variance = (share * (levels - mean[:, None]).square()).sum(dim=1)
        constant = (share > 0).sum(dim=1) == 1
        std = torch.where(constant, 1.0, variance.sqrt())
        return mean.float(), std.float()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that training and evaluation depend on; names do not count."""
        augmentation = () if self.augmentation == CROP_FLIP else (self.augmentation,)
        settings = (self.num_classes, self.flip, self.crop_padding, *augmentation)
        train, val, test = self.parts
        parts = (train, test, *([val] if val else ()))
        pixels = chain.from_iterable(part.contents() for part in parts)
        return digest_of(chain([repr(settings).encode()], pixels))

    @property
    def parts(self) -> tuple[Split, Split | None, Split]:
        """All training images, the validation images if any, the test images."""
        val = None
        if self.x_val is not None and self.y_val is not None:
            val = Split(self.x_val, self.y_val, torch.arange(len(self.y_val)))
        train = Split(self.x_train, self.y_train, torch.arange(len(self.y_train)))
        return train, val, Split(self.x_test, self.y_test, torch.arange(len(self.y_test)))

    def with_test(self, train: Split, test: Split) -> "ImageData":
        """The same with other images to train on and to report on."""
        return replace(
            self,
            x_train=train.images,
            y_train=train.targets,
            x_test=test.images,
            y_test=test.targets,
        )

    def augmented(self, name: str) -> "ImageData":
        """The same under another augmentation.

        Raises:
            ConfigError: It has none of that name, or that is for other images.
        """
        check_name(AUGMENTATIONS, name, "augmentation")
        if name in DRAWN and self.image_shape[0] not in {1, 3}:
            raise _wrong("augmentation", "images of 1 or 3 channels", self.image_shape[0])
        return replace(self, augmentation=name)

    def views(self, split: Split, device: torch.device, view_set: ViewSet) -> Views:
        """Augmented views of images that live on the device."""
        moved = self.augmentation != NONE
        crops = MemoryViews(
            split.to(device),
            mean=self.mean,
            std=self.std,
            padding=self.crop_padding if moved else 0,
            flip=self.flip and moved,
            view_set=view_set,
        )
        drawn = DRAWN.get(self.augmentation)
        if drawn is None:
            return crops
        from torchvision.transforms import v2

        return DrawnViews(crops, getattr(v2, drawn)())

    def evaluation_batches(
        self, split: Split, batch_size: int, *, device: torch.device | str, shard: Shard = WHOLE
    ) -> Iterator[Batch]:
        """One unaugmented pass over a split."""
        check_at_least_1(batch_size=batch_size)
        split, mean, std = split.to(device), self.mean.to(device), self.std.to(device)
        positions = torch.arange(len(split), device=device)
        rows = shard_rows(len(split), shard)
        parts = (part[rows].split(batch_size) for part in (split.images, split.targets, positions))
        return (
            Batch(normalize(images, mean, std), targets, index)
            for images, targets, index in zip(*parts, strict=True)
        )

    def pixels(self, split: Split, positions: Int64[Tensor, " B"]) -> UInt8[Tensor, "B K H W"]:
        """The images at some positions of a split."""
        return split.images[positions]


def _wrong(what: str, expected: str, found: object) -> ConfigError:
    return ConfigError(f"{what}: expected {expected}, found {found}")


def check_more_images(data: ImageSet[Split], images: Tensor, targets: Tensor) -> None:
    """Raises a `ConfigError` unless further training images fit a dataset's shape and classes."""
    _check_images("x_train", images)
    if images.shape[1:] != data.image_shape:
        expected = f"images of shape {data.image_shape} as in {data.name}"
        raise _wrong("x_train", expected, tuple(images.shape[1:]))
    _check_targets("y_train", targets, data.num_classes, missing=True)


def check_same_length(part: str, images: Tensor, targets: Tensor) -> None:
    """Raises a `ConfigError` unless there is a label, known or not, for every image of a part."""
    if len(images) != len(targets):
        raise _wrong(f"y_{part}", f"{len(images)} labels as in x_{part}", len(targets))


def _check_images(what: str, images: Tensor) -> None:
    """Raises unless these are uint8 images (N, K, H, W), at least one, not too small."""
    if images.dtype != torch.uint8:
        raise _wrong(what, "uint8 images", images.dtype)
    if images.ndim != 4:
        raise _wrong(what, "4 axes (N, K, H, W)", f"shape {tuple(images.shape)}")
    if len(images) == 0:
        raise _wrong(what, "at least one image", "none")
    if images.shape[1] < 1 or min(images.shape[2:]) < MIN_SIDE:
        expected = f"channels and at least {MIN_SIDE}x{MIN_SIDE} pixels"
        raise _wrong(what, expected, f"(K, H, W) = {tuple(images.shape[1:])}")


def _check_targets(what: str, targets: Tensor, num_classes: int, *, missing: bool) -> None:
    """Raises unless these are int64 labels (N,) from 0 to C - 1, or `UNKNOWN` if some may miss."""
    if targets.dtype != torch.int64:
        raise _wrong(what, "int64 labels", targets.dtype)
    if targets.ndim != 1:
        raise _wrong(what, "1 axis (N,)", f"shape {tuple(targets.shape)}")
    if len(targets) == 0:
        raise _wrong(what, "at least one label", "none")
    low, high = int(targets.min()), int(targets.max())
    least = UNKNOWN if missing else 0
    if low < least or high >= num_classes:
        found = low if low < least else high
        raise _wrong(what, f"labels from 0 to {num_classes - 1}", found)
