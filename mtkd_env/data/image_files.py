"""Datasets that are too large for the memory: files, decoded while the training goes on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from mtkd_env.data.augment import normalize
from mtkd_env.data.dataset import MIN_SIDE, ImageSet
from mtkd_env.data.decoding import (
    CHUNK,
    MEAN,
    STD,
    Ahead,
    View,
    central_view,
    default_workers,
    deit_view,
    made,
    standard_view,
    view_bytes,
    views_of,
)
from mtkd_env.data.preprocessing import Preprocessing
from mtkd_env.data.split import WHOLE, ImageSplit, Shard, shard_rows
from mtkd_env.data.views import FRESH, SeededViews, Views, ViewSet
from mtkd_env.errors import ConfigError, check_at_least_1, check_name, check_not_negative
from mtkd_env.files import digest_of
from mtkd_env.types import Batch

# Makers of the views to train on, from image_size and scaled; `none` trains on the central view.
AUGMENTATIONS: dict[str, Callable[..., View]] = {
    "standard": standard_view,
    "deit": deit_view,
}
NO_AUGMENTATION = "none"

# How unaugmented images may be resized; the first one by default.
INTERPOLATIONS = ("bilinear", "bicubic")

PREFETCH_BYTES = 2**30

# Fields of `ImageFiles` that say how files are read, whatever folder they are in.
READING = (
    *("image_size", "resize", "interpolation", "repeats"),
    *("workers", "prefetch_bytes", "exif", "scaled"),
)


@dataclass(frozen=True, eq=False)
class FileSplit(ImageSplit):
    """Images in files, whose names are relative to a folder."""

    root: Path
    names: Sequence[str]
    targets: Int64[Tensor, " N"]
    index: Int64[Tensor, " N"]

    def take(self, positions: Int64[Tensor, " N"]) -> "FileSplit":
        """A part of the split."""
        names = [self.names[position] for position in positions.tolist()]
        return replace(super().take(positions), names=names)

    def contents(self) -> Iterator[bytes]:
        """Name, size and class of each file; to read the pixels would take longer than an epoch."""
        for name, target in zip(self.names, self.targets.tolist(), strict=True):
            size = (self.root / name).stat().st_size
            yield f"{name}\0{size}\0{target}\n".encode()

    def paths(self, positions: Sequence[int]) -> list[str]:
        """Paths of some of the files."""
        return [f"{self.root}/{self.names[position]}" for position in positions]


@dataclass(frozen=True, eq=False)
class ImageFiles(ImageSet[FileSplit]):
    """A dataset in files, of which batches are decoded when they are needed or a little earlier.

    Attributes:
        name: Name in reports.
        class_names: Name of each class, in the order of the labels.
        train: Training images.
        test: Test images; maybe none.
        val: Validation images, if the dataset has its own.
        image_size: Height and width [pixels] of what networks see.
        resize: Shorter side [pixels] that unaugmented images are resized to before their central
            square is taken; by default 8/7 of `image_size`, 256 for 224.
        interpolation: How they are resized: `bilinear`, torchvision's default, or `bicubic`, as
            DeiT does it. Augmented images are resized as their augmentation has it.
        augmentation: Name in `AUGMENTATIONS`, or `none`.
        repeats: How often an image occurs in an epoch, each time in another view, while others
            do not (repeated augmentation, Berman et al., 2019; DeiT: 3).
        workers: Processes that decode, for each training process; one per core up to eight by
            default, and 0 decodes in the training process.
        prefetch_bytes: Bytes that all images decoded ahead may take together, besides the batch in
            use; if they are fewer than a worker makes at a time, one worker works.
        exif: Whether images are turned as their EXIF data says, as phones write it. Torchvision's
            loaders, and with them most published weights, do not.
        scaled: Whether JPEGs to train on are decoded at a half, a quarter or an eighth of their
            height and width where the part that is shown still has `image_size` pixels then. By
            default they are: large photographs are read several times as fast, and a view, whose
            place is random anyway, moves by less than a pixel and differs by one or two of 255
            levels beside. Unaugmented images, on which accuracies are measured, never are.
        num_classes: C.

    Raises:
        ConfigError: A value that cannot be used; names it.
    """

    name: str
    class_names: tuple[str, ...]
    train: FileSplit
    test: FileSplit
    val: FileSplit | None = None
    image_size: int = 224
    resize: int | None = None
    interpolation: str = INTERPOLATIONS[0]
    augmentation: str = "standard"
    repeats: int = 1
    workers: int | None = None
    prefetch_bytes: int = PREFETCH_BYTES
    exif: bool = False
    scaled: bool = True
    num_classes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_classes", len(self.class_names))
        if self.num_classes < 2:
            raise ConfigError(f"class_names: expected at least 2, found {self.num_classes}")
        if self.image_size < MIN_SIDE:
            raise ConfigError(f"image_size: expected {MIN_SIDE} or more, found {self.image_size}")
        if self.shorter_side < self.image_size:
            expected = f"at least image_size = {self.image_size}"
            raise ConfigError(f"resize: expected {expected}, found {self.resize}")
        check_name(INTERPOLATIONS, self.interpolation, "interpolation")
        check_name([*AUGMENTATIONS, NO_AUGMENTATION], self.augmentation, "augmentation")
        check_at_least_1(repeats=self.repeats)
        check_not_negative(workers=self.workers or 0)

    @property
    def shorter_side(self) -> int:
        """Pixels that the shorter side of an unaugmented image is resized to."""
        return self.image_size * 8 // 7 if self.resize is None else self.resize

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return 3, self.image_size, self.image_size

    @property
    def moments(self) -> tuple[Float32[Tensor, " K"], Float32[Tensor, " K"]]:
        """ImageNet's mean and standard deviation of each channel."""
        return torch.tensor(MEAN), torch.tensor(STD)

    @property
    def preprocessing(self) -> Preprocessing:
        """ImageNet's moments, of central views."""
        return Preprocessing(
            self.image_shape, MEAN, STD, self.shorter_side, self.interpolation, self.exif
        )

    @cached_property
    def digest(self) -> str:
        """That of names, sizes and classes of the files, and of what is made of them."""
        sizes = (self.image_size, self.shorter_side, self.interpolation)
        flags = [name for name in ("exif", "scaled") if getattr(self, name)]
        settings = (*sizes, self.augmentation, self.repeats, *flags)
        parts = [part for part in self.parts if part is not None]
        files = chain.from_iterable(chain(part.contents(), [b"\n"]) for part in parts)
        return digest_of(chain([repr((self.num_classes, *settings)).encode()], files))

    @property
    def parts(self) -> tuple[FileSplit, FileSplit | None, FileSplit]:
        """All training images, the validation images if any, the test images."""
        return self.train, self.val, self.test

    def with_test(self, train: FileSplit, test: FileSplit) -> "ImageFiles":
        """The same with other images to train on and to report on."""
        train, test = (replace(one, index=torch.arange(len(one))) for one in (train, test))
        return replace(self, train=train, test=test)

    def augmented(self, name: str) -> "ImageFiles":
        """The same under another augmentation.

        Raises:
            ConfigError: It has none of that name.
        """
        return replace(self, augmentation=name)

    def views(self, split: FileSplit, device: torch.device, view_set: ViewSet) -> Views:
        """Augmented views of images that worker processes decode.

        Raises:
            ConfigError: Few views of images that occur several times in an epoch.
        """
        if view_set.count is not None and self.repeats > 1:
            raise ConfigError(
                f"views: expected none where repeats is {self.repeats}, since all of an image's "
                "views in an epoch are then the same"
            )
        return FileViews(self, split, device, view_set=view_set)

    def evaluation_batches(
        self,
        split: FileSplit,
        batch_size: int,
        *,
        device: torch.device | str,
        shard: Shard = WHOLE,
    ) -> Iterator[Batch]:
        """One pass over the central views of a split."""
        check_at_least_1(batch_size=batch_size)
        own = shard_rows(len(split), shard)
        order = torch.arange(len(split))[own]
        seeds = torch.zeros_like(order)
        rows = pieces(slice(0, len(order)), batch_size)
        views = FileViews(self, split, torch.device(device), augment=False)
        return views.batches(order, seeds, rows)

    def pixels(self, split: FileSplit, positions: Int64[Tensor, " B"]) -> UInt8[Tensor, "B K H W"]:
        """Central views of the images at some positions of a split."""
        request = (split.paths(positions.tolist()), [0] * len(positions))
        return views_of(self.view(augment=False), self.exif, request)

    def view(self, *, augment: bool) -> View:
        """What is made of an image."""
        if augment and self.augmentation != NO_AUGMENTATION:
            return AUGMENTATIONS[self.augmentation](self.image_size, scaled=self.scaled)
        return central_view(self.image_size, self.shorter_side, self.interpolation)

    def ahead(self, view: View) -> Ahead:
        """How much is decoded ahead."""
        workers = default_workers() if self.workers is None else self.workers
        return Ahead.within(self.prefetch_bytes, CHUNK * view_bytes(view), workers)


class FileViews(SeededViews):
    """Views of image files; central ones without `augment`."""

    def __init__(
        self,
        data: ImageFiles,
        split: FileSplit,
        device: torch.device,
        *,
        augment: bool = True,
        view_set: ViewSet = FRESH,
    ) -> None:
        alike = not augment or data.augmentation == NO_AUGMENTATION
        super().__init__(split.targets.to(device), view_set, split.index.cpu(), alike=alike)
        self._data = data
        self._split = split
        self._view = data.view(augment=augment)
        self._mean, self._std = data.mean.to(device), data.std.to(device)

    def inputs(
        self, order: Int64[Tensor, " N"], drawn: Int64[Tensor, " N"], rows: Sequence[slice]
    ) -> Iterator[Float32[Tensor, "B K H W"]]:
        """The images of some batches alone, under the seeds of their places."""
        chunks = [pieces(part, CHUNK) for part in rows]
        requests = (
            (self._split.paths(order[chunk].tolist()), drawn[chunk].tolist())
            for chunk in chain.from_iterable(chunks)
        )
        # A single chunk is made sooner than workers are.
        ahead = self._data.ahead(self._view) if sum(map(len, chunks)) > 1 else Ahead(0, 0)
        decoded = made(
            partial(views_of, self._view, self._data.exif),
            requests,
            workers=ahead.workers,
            pin=self.device.type == "cuda",
            prefetch=ahead.chunks or None,
            flag="data.arguments.workers",
            relief="fewer of them, or a smaller data.arguments.prefetch_bytes, need less memory",
        )
        for part in chunks:
            own = [views.to(self.device, non_blocking=True) for views in islice(decoded, len(part))]
            inputs = own[0] if len(own) == 1 else torch.cat(own)
            if inputs.dtype == torch.uint8:
                inputs = normalize(inputs, self._mean, self._std)
            yield inputs


def pieces(rows: slice, size: int) -> list[slice]:
    """Rows in pieces of a size, the last of which may be smaller."""
    begins = range(rows.start, rows.stop, size)
    return [slice(begin, min(begin + size, rows.stop)) for begin in begins]
