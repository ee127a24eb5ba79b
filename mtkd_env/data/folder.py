"""Images in folders, a folder for each class: a user's own, or ImageNet."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from mtkd_env.data.download import found_root
from mtkd_env.data.image_files import INTERPOLATIONS, PREFETCH_BYTES, FileSplit, ImageFiles
from mtkd_env.data.reading import EXTENSIONS, image_files, visible
from mtkd_env.errors import ConfigError, did_you_mean
from mtkd_env.files import user_path
from mtkd_env.types import UNKNOWN

NO_IMAGES = f"holds no images ({', '.join(EXTENSIONS)})"

WHERE = " (--data.arguments.root says where to look)"

LAYOUT = "expected train/CLASS/*.jpg and val/CLASS/*.jpg or test/CLASS/*.jpg"

# What people call the folder of validation images.
VALIDATION = ("val", "valid", "validation")

# Folder of training images without a label.
UNLABELLED = "unlabelled"

IMAGENET_LAYOUT = (
    "expected train/n01440764/*.JPEG, ..., and val/n01440764/*.JPEG, ...; its owners give the "
    "archives to registered users only, and torchvision.datasets.ImageNet(root, split) unpacks them"
)
WORDNET_ID = re.compile(r"n\d{8}")
IMAGENET_CLASSES = 1000


def load_folder(
    root: str | Path,
    *,
    name: str | None = None,
    image_size: int = 224,
    resize: int = 256,
    interpolation: str = INTERPOLATIONS[0],
    repeats: int = 1,
    workers: int | None = None,
    prefetch_bytes: int = PREFETCH_BYTES,
    exif: bool = False,
) -> ImageFiles:
    """A user's own images: `root/train/CLASS/*`, and `root/val/CLASS/*` or `root/test/CLASS/*`.

    Classes are numbered in the order of their folders' names. Where there are both, `test` is what
    is reported on and `val` (`valid`, `validation`) what is chosen by; either alone is what is
    reported on. Without either, `--data.test_fraction` takes a share of the training images. Images
    in `root/unlabelled` and below are training images without a label.

    Args:
        root: The folder.
        name: Name in reports; the folder's by default.
        image_size: Height and width [pixels] of what networks see.
        resize: Shorter side [pixels] of unaugmented images before their central square is taken.
        interpolation: How they are resized: `bilinear`, or `bicubic` as for DeiT.
        repeats: How often an image occurs in an epoch; see `ImageFiles`.
        workers: Processes that decode; one per core up to eight by default.
        prefetch_bytes: Bytes that all images decoded ahead may take together.
        exif: Whether images are turned as their EXIF data says; torchvision does not.

    Raises:
        ConfigError: Missing folders, classes without images, or a value that cannot be used.
    """
    folder = user_path(root)
    return _image_files(
        folder,
        ("test", *VALIDATION),
        LAYOUT,
        name=name or folder.resolve().name,
        image_size=image_size,
        resize=resize,
        interpolation=interpolation,
        repeats=repeats,
        workers=workers,
        prefetch_bytes=prefetch_bytes,
        exif=exif,
    )


def load_training_images(path: Path, data: ImageFiles) -> FileSplit:
    """The images of a further folder: `path/train/CLASS/*` or `path/CLASS/*`.

    Args:
        path: The folder.
        data: Whose classes they are of; not all of them need be there.

    Raises:
        ConfigError: No images, or a class that the dataset does not have.
    """
    root = path / "train" if (path / "train").is_dir() else path
    return _list_files(root, list(data.class_names), "expected CLASS/*.jpg or train/CLASS/*.jpg")


def load_imagenet(
    root: str | Path | None = None,
    *,
    image_size: int = 224,
    resize: int = 256,
    interpolation: str = INTERPOLATIONS[0],
    repeats: int = 1,
    workers: int | None = None,
    prefetch_bytes: int = PREFETCH_BYTES,
    exif: bool = False,
) -> ImageFiles:
    """ImageNet (ILSVRC 2012) or a part of its classes, as `torchvision.datasets.ImageNet` lays out.

    Classes are numbered in the order of their WordNet ids, as torchvision does: with all 1000,
    labels are those of published weights (`IMAGENET1K_V1` and others).

    Args:
        root: Folder with `train` and `val`; `imagenet` in `data_folder()` by default.
        image_size: Height and width [pixels] of what networks see.
        resize: Shorter side [pixels] of unaugmented images before their central square is taken.
        interpolation: How they are resized: `bilinear`, or `bicubic` as for DeiT.
        repeats: How often an image occurs in an epoch; see `ImageFiles`.
        workers: Processes that decode; one per core up to eight by default.
        prefetch_bytes: Bytes that all images decoded ahead may take together.
        exif: Whether images are turned as their EXIF data says; torchvision does not.

    Raises:
        ConfigError: Missing folders, classes without images, or a value that cannot be used.
    """
    folder = found_root(None) / "imagenet" if root is None else user_path(root)
    return _image_files(
        folder,
        ("val",),
        IMAGENET_LAYOUT,
        name="imagenet",
        image_size=image_size,
        resize=resize,
        interpolation=interpolation,
        repeats=repeats,
        workers=workers,
        prefetch_bytes=prefetch_bytes,
        exif=exif,
    )


def _image_files(root: Path, held_out: tuple[str, ...], layout: str, **settings: Any) -> ImageFiles:
    """Lists the files of a folder; reads none of them.

    Of the folders `held_out`, the first that is there holds the test images, a second one the
    validation images.
    """
    if not (root / "train").is_dir():
        raise ConfigError(f"{root / 'train'}: no such folder{WHERE}; {layout}")
    folders = [root / part for part in held_out if (root / part).is_dir()]
    if sum(one.name in VALIDATION for one in folders) > 1:
        raise ConfigError(f"{folders[-1]}: expected one folder of validation images; {layout}")
    classes = _classes(root / "train", layout)
    train = _list_files(root / "train", classes, layout)
    _check_none_empty(train, classes)
    train = _with_unlabelled(train, root)
    parts = [_list_files(folder, classes, layout) for folder in folders]
    return ImageFiles(
        class_names=_names(classes),
        train=train,
        test=parts[0] if parts else train.take(torch.arange(0)),
        val=parts[1] if len(parts) > 1 else None,
        **settings,
    )


def _classes(folder: Path, layout: str) -> list[str]:
    names = [path.name for path in visible(folder) if path.is_dir()]
    if not names:
        raise ConfigError(f"{folder}: holds no folders; {layout}")
    return names


def _list_files(folder: Path, classes: list[str], layout: str) -> FileSplit:
    unknown = sorted(set(_classes(folder, layout)) - set(classes))
    if unknown:
        hint = did_you_mean(unknown[0], classes)
        raise ConfigError(f"{folder / unknown[0]}: no such class among the training images{hint}")
    found = [
        (f"{name}/{image}", label)
        for label, name in enumerate(classes)
        for image in image_files(folder / name)
    ]
    if not found:
        raise ConfigError(f"{folder}: {NO_IMAGES}; {layout}")
    names, labels = zip(*found, strict=True)
    return FileSplit(folder, names, torch.tensor(labels), torch.arange(len(found)))


def _with_unlabelled(train: FileSplit, root: Path) -> FileSplit:
    """The training images, and behind them those without a label if there are any."""
    folders = [path.name for path in visible(root) if path.is_dir()]
    for name in get_close_matches(UNLABELLED, folders, n=1, cutoff=0.85):
        if name != UNLABELLED:
            raise ConfigError(f"{root / name}: expected the name '{UNLABELLED}'")
    if UNLABELLED not in folders:
        return train
    more = [f"{UNLABELLED}/{image}" for image in image_files(root / UNLABELLED)]
    if not more:
        raise ConfigError(f"{root / UNLABELLED}: {NO_IMAGES}")
    names = [*(f"{train.root.name}/{name}" for name in train.names), *more]
    targets = torch.cat([train.targets, torch.full((len(more),), UNKNOWN)])
    return FileSplit(root, names, targets, torch.arange(len(names)))


def _check_none_empty(train: FileSplit, classes: list[str]) -> None:
    counts = torch.bincount(train.targets, minlength=len(classes)).tolist()
    for name, count in zip(classes, counts, strict=True):
        if count == 0:
            raise ConfigError(f"{train.root / name}: {NO_IMAGES}")


def _names(folders: list[str]) -> tuple[str, ...]:
    """Names of classes: the folders', or for the thousand of ImageNet what they stand for."""
    if len(folders) != IMAGENET_CLASSES or not all(map(WORDNET_ID.fullmatch, folders)):
        return tuple(folders)
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
