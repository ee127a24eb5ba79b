"""Images in memory, checked on construction, and their division into train, val and test.

Where the images come from is a loader's business, how they become batches the stream's.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from mtkd_env.errors import ConfigError
from mtkd_env.seeding import derive_seed

MIN_SIDE = 8


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Images that belong together, and their classes.

    Attributes:
        images: Unnormalised images.
        targets: Class of each image.
        index: Position of each image in the array it was taken from.
    """

    images: UInt8[Tensor, "N K H W"]
    targets: Int64[Tensor, " N"]
    index: Int64[Tensor, " N"]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def to(self, device: torch.device | str) -> "Split":
        """The same split on a device; no copy of what is there already."""
        return Split(self.images.to(device), self.targets.to(device), self.index.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """The three parts of a dataset: to learn from, to choose by, to report on.

    Attributes:
        train: What students and teachers learn from.
        val: Held out of the training images for every choice; None if nothing was held out.
        test: The dataset's own test images.
    """

    train: Split
    val: Split | None
    test: Split


@dataclass(frozen=True, eq=False)
class ImageData:
    """A dataset in memory, on the CPU.

    It is what users' files end up in, so it checks the arrays itself, and says what is wrong.

    Attributes:
        name: Name in reports.
        x_train: Training images, uint8 (N, K, H, W).
        y_train: Their classes, int64 (N,).
        x_test: Test images, uint8 (N2, K, H, W).
        y_test: Their classes, int64 (N2,).
        num_classes: C; labels are 0 to C - 1.
        flip: Whether a mirrored image is still one of its class.
        crop_padding: Zeros [pixels] that a random crop may reach into on each side.

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

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise _wrong("crop_padding", "0 or more", self.crop_padding)
        for part, images, targets in (
            ("train", self.x_train, self.y_train),
            ("test", self.x_test, self.y_test),
        ):
            _check_images(f"x_{part}", images)
            _check_targets(f"y_{part}", targets, self.num_classes)
            if len(images) != len(targets):
                raise _wrong(f"y_{part}", f"{len(images)} labels as in x_{part}", len(targets))
        if self.x_test.shape[1:] != self.image_shape:
            found = tuple(self.x_test.shape[1:])
            raise _wrong("x_test", f"images of shape {self.image_shape} as in x_train", found)
        if self.num_classes < 2:
            raise _wrong("num_classes", "at least 2", self.num_classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    @cached_property
    def mean(self) -> Float32[Tensor, " K"]:
        """Mean of each channel over the training images, in units of [0, 1]."""
        return self._moments[0]

    @cached_property
    def std(self) -> Float32[Tensor, " K"]:
        """Standard deviation of each channel over the training images; 1 for a constant one."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[Float32[Tensor, " K"], Float32[Tensor, " K"]]:
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
        """SHA-256 of all that training and evaluation depend on; the name does not count."""
        settings = (self.num_classes, self.flip, self.crop_padding)
        sha = hashlib.sha256(repr(settings).encode())
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            sha.update(repr(tuple(array.shape)).encode())
            sha.update(array.contiguous().numpy().data)
        return sha.hexdigest()

    def split(
        self, val_fraction: float = 0.0, seed: int = 0, train_size: int | None = None
    ) -> Splits:
        """Divides the training images at random; test images stay what they are.

        The validation images depend on `val_fraction` and `seed` alone, and a smaller training
        set is part of every larger one.

        Args:
            val_fraction: Share of the training images to hold out.
            seed: Seed of the division.
            train_size: Number of the remaining images to keep, as even over the classes as
                they allow; all of them by default.

        Raises:
            ConfigError: A fraction outside [0, 1) or too small to hold out an image, or a training
                size that is not between 1 and the number of images that remain.
        """
        held_out = _validation_size(len(self.y_train), val_fraction)
        order = _permutation(len(self.y_train), seed)
        val, train = order[:held_out], order[held_out:]
        if train_size is not None:
            if not 1 <= train_size <= len(train):
                expected = f"1 to {len(train)} ({len(order)} images, {held_out} held out)"
                raise _wrong("train_size", expected, train_size)
            by_rank = torch.argsort(_rank_within_class(self.y_train[train]), stable=True)
            train = train[by_rank[:train_size]]
        return Splits(
            train=self._take(train),
            val=self._take(val) if held_out else None,
            test=Split(self.x_test, self.y_test, torch.arange(len(self.y_test))),
        )

    def _take(self, positions: Int64[Tensor, " N"]) -> Split:
        index = positions.sort().values
        return Split(self.x_train[index], self.y_train[index], index)


def _wrong(what: str, expected: str, found: object) -> ConfigError:
    return ConfigError(f"{what}: expected {expected}, found {found}")


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


def _check_targets(what: str, targets: Tensor, num_classes: int) -> None:
    """Raises unless these are int64 labels (N,) from 0 to C - 1, at least one."""
    if targets.dtype != torch.int64:
        raise _wrong(what, "int64 labels", targets.dtype)
    if targets.ndim != 1:
        raise _wrong(what, "1 axis (N,)", f"shape {tuple(targets.shape)}")
    if len(targets) == 0:
        raise _wrong(what, "at least one label", "none")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= num_classes:
        found = low if low < 0 else high
        raise _wrong(what, f"labels from 0 to {num_classes - 1}", found)


def _validation_size(available: int, fraction: float) -> int:
    if not 0 <= fraction < 1:
        raise _wrong("val_fraction", "a share in [0, 1)", fraction)
    size = round(available * fraction)
    if size == available or (fraction > 0 and size == 0):
        expected = f"a share that leaves images on both sides of {available}"
        raise _wrong("val_fraction", expected, fraction)
    return size


def _permutation(length: int, seed: int) -> Int64[Tensor, " N"]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "split"))
    return torch.randperm(length, generator=generator)


def _rank_within_class(targets: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    """How many images of the same class come before each image."""
    by_class = torch.argsort(targets, stable=True)
    counts = torch.bincount(targets)
    first = (counts.cumsum(dim=0) - counts)[targets[by_class]]
    ranks = torch.empty_like(targets)
    ranks[by_class] = torch.arange(len(targets)) - first
    return ranks
