"""Images in folders, a folder for each class: a user's own, or ImageNet."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any

import torch

from mtkd_env.data.download import found_root
from mtkd_env.data.image_files import READING, FileSplit, ImageFiles
from mtkd_env.data.reading import EXTENSIONS, image_files, visible
from mtkd_env.errors import ConfigError, did_you_mean
from mtkd_env.files import user_path
from mtkd_env.types import UNKNOWN

NO_IMAGES = f"holds no images ({', '.join(EXTENSIONS)})"

WHERE = " (--data.arguments.root says where to look)"

# What people call the folder of validation images.
VALIDATION = ("val", "valid", "validation")

# Folder of training images without a label.
UNLABELLED = "unlabelled"

WORDNET_ID = re.compile(r"n\d{8}")
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Layout:
    """What folders a dataset has beside `train/CLASS/*`, whose classes are numbered by their names.

    Attributes:
        held_out: Of these folders, the first that is there holds the images that are reported on, a
            second one those that are chosen by.
        expected: Both in words, for errors.
        name: Name in reports, and of the folder in `data_folder()` where it is by default; that of
            the user's folder by default.
    """

    held_out: tuple[str, ...]
    expected: str
    name: str | None = None


# A user's own images. Without the folders that are held out, `--data.test_fraction` takes a share
# of the training images. Images in `unlabelled` and below are training images without a label:
# with them, folders of `train` may be empty; without `train` the test images have the classes.
FOLDER = Layout(
    ("test", *VALIDATION), "expected train/CLASS/*.jpg and val/CLASS/*.jpg or test/CLASS/*.jpg"
)

# ILSVRC 2012, or a part of its classes, as `torchvision.datasets.ImageNet` lays it out; with all
# 1000, labels are those of published weights (`IMAGENET1K_V1` and others).
IMAGENET = Layout(
    ("val",),
    "expected train/n01440764/*.JPEG, ..., and val/n01440764/*.JPEG, ...; its owners give the "
    "archives to registered users only, and torchvision.datasets.ImageNet(root, split) unpacks "
    "them",
    "imagenet",
)


def loader(layout: Layout) -> Callable[..., ImageFiles]:
    """Makes a dataset of `root`, `name` and those fields of `ImageFiles` that are `READING`."""

    def load(root: str | Path | None = None, name: str | None = None, **reading: Any) -> ImageFiles:
        """Images in a folder, which is listed; none of them is read.

        Raises:
            ConfigError: Missing folders, classes without images, or a value that cannot be used.
        """
        if root is None and layout.name is None:
            raise ConfigError("dataset 'folder': missing a required argument: 'root'")
        folder = found_root(None) / str(layout.name) if root is None else user_path(root)
        classes, train, *parts = _splits(folder, layout)
        return ImageFiles(
            name=name or layout.name or folder.resolve().name,
            class_names=_names(classes),
            train=train,
            test=parts[0] if parts else train.take(torch.arange(0)),
            val=parts[1] if len(parts) > 1 else None,
            **reading,
        )

    *own, _ = signature(load).parameters.values()
    known = signature(ImageFiles).parameters
    named = [known[one].replace(kind=Parameter.KEYWORD_ONLY) for one in READING]
    load.__signature__ = Signature([*own, *named])  # type: ignore[attr-defined] # what checks look at
    return load


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


def _splits(root: Path, layout: Layout) -> tuple[list[str], FileSplit, *tuple[FileSplit, ...]]:
    """The classes, the training images, and those of the folders that are held out."""
    train, folders = root / "train", [root / part for part in layout.held_out]
    folders = [folder for folder in folders if folder.is_dir()]
    unlabelled = (root / UNLABELLED).is_dir()
    # One of another name may be meant as `train`.
    named = {*layout.held_out, UNLABELLED}
    known = root.is_dir() and named.issuperset(one.name for one in visible(root) if one.is_dir())
    if not train.is_dir() and not (unlabelled and folders and known):
        raise ConfigError(f"{train}: no such folder{WHERE}; {layout.expected}")
    if sum(one.name in VALIDATION for one in folders) > 1:
        raise ConfigError(
            f"{folders[-1]}: expected one folder of validation images; {layout.expected}"
        )
    classes = _classes(train if train.is_dir() else folders[0], layout.expected)
    labelled = _list_files(train, classes, layout.expected, least=0)
    counts = torch.bincount(labelled.targets, minlength=len(classes)).tolist()
    for name, count in zip(classes, counts, strict=True):
        if not count and not unlabelled:
            raise ConfigError(f"{train / name}: {NO_IMAGES}")
    held_out = [_list_files(folder, classes, layout.expected) for folder in folders]
    return classes, _with_unlabelled(labelled, root), *held_out


def _classes(folder: Path, layout: str) -> list[str]:
    names = [path.name for path in visible(folder) if path.is_dir()]
    if not names:
        raise ConfigError(f"{folder}: holds no folders; {layout}")
    return names


def _list_files(folder: Path, classes: list[str], layout: str, least: int = 1) -> FileSplit:
    there = _classes(folder, layout) if least or folder.is_dir() else ()
    if unknown := sorted(set(there) - set(classes)):
        hint = did_you_mean(unknown[0], classes)
        raise ConfigError(f"{folder / unknown[0]}: no such class among the training images{hint}")
    found = [
        (f"{name}/{image}", label)
        for label, name in enumerate(classes)
        for image in image_files(folder / name)
    ]
    if len(found) < least:
        raise ConfigError(f"{folder}: {NO_IMAGES}; {layout}")
    labels = torch.tensor([label for _, label in found], dtype=torch.int64)
    return FileSplit(folder, [name for name, _ in found], labels, torch.arange(len(found)))


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


def _names(folders: list[str]) -> tuple[str, ...]:
    """Names of classes: the folders', or for the thousand of ImageNet what they stand for."""
    if len(folders) != IMAGENET_CLASSES or not all(map(WORDNET_ID.fullmatch, folders)):
        return tuple(folders)
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
