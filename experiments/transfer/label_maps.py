"""Datasets of images with a class for every pixel: where they lie and what their labels mean."""

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.datasets import Cityscapes

from experiments.transfer.label_views import IGNORED, Labelled, as_tensors, random_view
from mtkd_env.data.reading import image_files, open_image, read_image
from mtkd_env.errors import ConfigError, check_name
from mtkd_env.files import user_path

# In the table of a dataset: a value that its label maps do not hold.
UNKNOWN = -1

# Labels are bytes, one of which is taken.
MOST_CLASSES = 255

# Modes of images of one byte a pixel: a grey value, or a position in a palette.
BYTES = ("L", "P")

# Step in hue from one class to the next.
GOLDEN = 0.618034


class Pair(NamedTuple):
    """An image's file and its label map's."""

    image: str
    labels: str


@dataclass(frozen=True, eq=False)
class LabelMaps:
    """A dataset in files.

    Attributes:
        name: Name in reports.
        num_classes: K.
        classes: Class of each value, 0 to 255, that a label map may hold: 0 to K - 1, `IGNORED` or
            `UNKNOWN`.
        train: Files to train on.
        val: Files to evaluate on.
        colors: Colour of each class in pictures, uint8 (K, 3).
    """

    name: str
    num_classes: int
    classes: tuple[int, ...]
    train: tuple[Pair, ...]
    val: tuple[Pair, ...]
    colors: Tensor = field(repr=False)

    def read(self, pair: Pair) -> tuple[Image.Image, Image.Image]:
        """An image, and its classes as an image of one byte a pixel.

        Raises:
            ConfigError: A file that cannot be read, does not fit the other or holds a value that is
                no class; names it.
        """
        image = read_image(pair.image)
        raw = open_image(pair.labels)
        if raw.mode not in BYTES:
            raise ConfigError(f"{pair.labels}: expected one byte a pixel, found mode {raw.mode}")
        if raw.size != image.size:
            raise ConfigError(
                f"{pair.labels}: expected {image.width} x {image.height} pixels as in "
                f"{pair.image}, found {raw.width} x {raw.height}"
            )
        labels = np.array(self.classes, dtype=np.int16)[np.asarray(raw)]
        if (labels == UNKNOWN).any():
            found = int(np.asarray(raw)[labels == UNKNOWN][0])
            raise ConfigError(
                f"{pair.labels}: holds the label {found}, which is none of the {self.num_classes} "
                f"classes of {self.name}"
            )
        return image, Image.fromarray(labels.astype(np.uint8))

    def views(self, requests: Iterable[tuple[int, int]], size: tuple[int, int]) -> Labelled:
        """Views of some training images, each made by its seed.

        Args:
            requests: Position and seed of each image.
            size: Height and width of the views [pixels].
        """
        views = [
            random_view(*self.read(self.train[position]), size, seed) for position, seed in requests
        ]
        return Labelled(*map(torch.stack, zip(*views, strict=True)))

    def whole(self, position: int) -> Labelled:
        """An image to evaluate on, as it is."""
        return as_tensors(*self.read(self.val[position]))


class Dataset(NamedTuple):
    """Where the files of a dataset lie, and what their labels mean.

    Attributes:
        images: Names that the folder of a part's images may have.
        labels: Likewise of their label maps, which have the same names.
        parts: Names of the parts to train and to evaluate on.
        classes: Class of each value that a label map may hold, or `IGNORED`.
        expected: What must lie there, in words.
        ends: What the names of images end in, and those of label maps in its place.
        colors: Colour of each class in pictures; distinct ones by default.
    """

    images: Sequence[str]
    labels: Sequence[str]
    parts: tuple[str, str]
    classes: Mapping[int, int]
    expected: str
    ends: tuple[str, str] = ("", "")
    colors: Sequence[tuple[int, int, int]] | None = None

    def load(self, name: str, root: Path) -> LabelMaps:
        """What lies in a folder."""
        train, val = (self._pairs(root, part) for part in self.parts)
        count = len({*self.classes.values()} - {IGNORED})
        table = tuple(self.classes.get(value, UNKNOWN) for value in range(256))
        colors = (
            distinct_colors(count)
            if self.colors is None
            else torch.tensor(self.colors, dtype=torch.uint8)
        )
        return LabelMaps(name, count, table, train, val, colors)

    def _pairs(self, root: Path, part: str) -> tuple[Pair, ...]:
        """The images of a part, each with its label map."""
        pictured, labelled = (
            self._folder(root, part, names) for names in (self.images, self.labels)
        )
        own, other = self.ends
        stems = {name: name.rpartition(".")[0] for name in image_files(pictured)}
        pairs = tuple(
            Pair(str(pictured / name), str(labelled / f"{stem.removesuffix(own)}{other}.png"))
            for name, stem in stems.items()
            if stem.endswith(own)
        )
        if not pairs:
            raise ConfigError(f"{pictured}: holds no images; {self.expected}")
        for pair in pairs:
            if not Path(pair.labels).is_file():
                raise ConfigError(
                    f"{pair.labels}: no such label map of {pair.image}; {self.expected}"
                )
        return pairs

    def _folder(self, root: Path, part: str, names: Sequence[str]) -> Path:
        """The first of some folders that is there."""
        folders = [root / name.format(part) for name in names]
        found = next((folder for folder in folders if folder.is_dir()), None)
        if found is None:
            looked = " and ".join(map(str, folders))
            raise ConfigError(
                f"{looked}: no such folder (--data says where to look); {self.expected}"
            )
        return found


# Of COCO-Stuff's 182 labels, the things that occur in no label map, such as hat and window.
COCO_STUFF_LABELS = 182
COCO_STUFF_UNUSED = frozenset({11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90})

ADE20K_CLASSES = 150

CITYSCAPES = [kind for kind in Cityscapes.classes if kind.id >= 0]

# Datasets whose classes are known.
LABELLED: Mapping[str, Dataset] = {
    # Cordts et al., 2016: the 19 classes that are evaluated, of the fine labels.
    "cityscapes": Dataset(
        images=["leftImg8bit/{}"],
        labels=["gtFine/{}"],
        parts=("train", "val"),
        classes={kind.id: kind.train_id for kind in CITYSCAPES},
        expected="expected leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and "
        "gtFine/{train,val}/CITY/*_gtFine_labelIds.png",
        ends=("_leftImg8bit", "_gtFine_labelIds"),
        colors=[
            kind.color
            for kind in sorted(CITYSCAPES, key=lambda kind: kind.train_id)
            if kind.train_id != IGNORED
        ],
    ),
    # Zhou et al., 2017, as SceneParse150: 150 classes from 1 on, 0 is none of them.
    "ade20k": Dataset(
        images=["images/{}"],
        labels=["annotations/{}"],
        parts=("training", "validation"),
        classes={0: IGNORED, **{label: label - 1 for label in range(1, ADE20K_CLASSES + 1)}},
        expected="expected images/{training,validation}/*.jpg and "
        "annotations/{training,validation}/*.png of SceneParse150 (ADEChallengeData2016)",
    ),
    # COCO-Stuff-164k (Caesar et al., 2018), 80 things and 91 kinds of stuff: the labels of
    # `stuffthingmaps` without those that do not occur, as MMSegmentation numbers them.
    "coco_stuff": Dataset(
        images=["{}", "images/{}"],
        labels=["stuffthingmaps/{}", "annotations/{}"],
        parts=("train2017", "val2017"),
        classes={
            label: number
            for number, label in enumerate(sorted({*range(COCO_STUFF_LABELS)} - COCO_STUFF_UNUSED))
        }
        | {IGNORED: IGNORED},
        expected="expected {train2017,val2017}/*.jpg and stuffthingmaps/{train2017,val2017}/*.png, "
        "or the same in images/ and annotations/",
    ),
}

FOLDER = "folder"


def load_label_maps(name: str, root: Path, classes: int | None = None) -> LabelMaps:
    """A dataset.

    Args:
        name: Name in `LABELLED`, or `folder` for a user's own images.
        root: Where it lies.
        classes: Number of classes of a folder.

    Raises:
        ConfigError: An unknown name; a folder or a label map that is not there; a number of
            classes that is missing, senseless or not for the user to choose.
    """
    check_name([*LABELLED, FOLDER], name, "dataset")
    root = user_path(root)
    if name != FOLDER:
        if classes is not None:
            raise ConfigError(
                f"classes: expected none for {name}, which has its own, got {classes}"
            )
        return LABELLED[name].load(name, root)
    if classes is None or not 2 <= classes <= MOST_CLASSES:
        raise ConfigError(f"classes: expected 2 to {MOST_CLASSES} for a folder, got {classes}")
    own = Dataset(
        images=["images/{}"],
        labels=["labels/{}"],
        parts=("train", "val"),
        classes={IGNORED: IGNORED, **{label: label for label in range(classes)}},
        expected="expected images/{train,val}/*.jpg or *.png, and of each a "
        "labels/{train,val}/*.png of the same name, whose pixels hold classes from 0 on and 255 "
        "where none counts",
    )
    return own.load(root.resolve().name, root)


def distinct_colors(count: int) -> UInt8[Tensor, "K 3"]:
    """Colours of classes, of which those with near numbers differ most; none is black."""
    colors = [
        colorsys.hsv_to_rgb(n * GOLDEN % 1, 0.55 + 0.4 * (n % 2), 0.95 - 0.2 * (n % 3))
        for n in range(count)
    ]
    return (255 * torch.tensor(colors)).to(torch.uint8)
