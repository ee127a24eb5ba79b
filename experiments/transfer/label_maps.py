"""Datasets of images with a class for every pixel: where they lie and what their labels mean."""

import colorsys
from collections.abc import Callable, Iterable, Mapping
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
from mtkd_env.data.reading import image_files, is_image, open_image, read_image, visible
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

CITYSCAPES_LAYOUT = (
    "expected leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and "
    "gtFine/{train,val}/CITY/*_gtFine_labelIds.png"
)
ADE20K_LAYOUT = (
    "expected images/{training,validation}/*.jpg and annotations/{training,validation}/*.png of "
    "SceneParse150 (ADEChallengeData2016)"
)
COCO_STUFF_LAYOUT = (
    "expected {train2017,val2017}/*.jpg and stuffthingmaps/{train2017,val2017}/*.png, or the same "
    "in images/ and annotations/"
)
FOLDER_LAYOUT = (
    "expected images/{train,val}/*.jpg or *.png, and of each a labels/{train,val}/*.png of the "
    "same name, whose pixels hold classes from 0 on and 255 where none counts"
)

ADE20K_CLASSES = 150

# Of COCO-Stuff's 182 labels, the things that occur in no label map, such as hat and window.
COCO_STUFF_LABELS = 182
COCO_STUFF_UNUSED = frozenset({11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90})


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


def load_cityscapes(root: Path) -> LabelMaps:
    """Cityscapes (Cordts et al., 2016) with its fine labels: the 19 classes that are evaluated."""
    kinds = [kind for kind in Cityscapes.classes if kind.id >= 0]
    trained = sorted((kind.train_id, kind) for kind in kinds if kind.train_id != IGNORED)
    return LabelMaps(
        name="cityscapes",
        num_classes=len(trained),
        classes=_table({kind.id: kind.train_id for kind in kinds}),
        train=_cityscapes_pairs(root, "train"),
        val=_cityscapes_pairs(root, "val"),
        colors=torch.tensor([kind.color for _, kind in trained], dtype=torch.uint8),
    )


def _cityscapes_pairs(root: Path, part: str) -> tuple[Pair, ...]:
    pictured, labelled = (
        _folder(root, [f"{kind}/{part}"], CITYSCAPES_LAYOUT) for kind in ("leftImg8bit", "gtFine")
    )
    ends = "_leftImg8bit.png", "_gtFine_labelIds.png"
    pairs = [
        Pair(str(pictured / name), str(labelled / (name.removesuffix(ends[0]) + ends[1])))
        for name in image_files(pictured)
        if name.endswith(ends[0])
    ]
    return _checked(pairs, pictured, CITYSCAPES_LAYOUT)


def load_ade20k(root: Path) -> LabelMaps:
    """ADE20K (Zhou et al., 2017) as SceneParse150: 150 classes from 1 on, 0 is none of them."""
    classes = {0: IGNORED, **{label: label - 1 for label in range(1, ADE20K_CLASSES + 1)}}
    folders = (["images/{}"], ["annotations/{}"])
    return _paired("ade20k", root, classes, folders, ("training", "validation"), ADE20K_LAYOUT)


def load_coco_stuff(root: Path) -> LabelMaps:
    """COCO-Stuff-164k (Caesar et al., 2018): 80 things and 91 kinds of stuff, 171 classes.

    The labels of `stuffthingmaps`, in their order without those that do not occur, as
    MMSegmentation numbers them; 255 is none of them.
    """
    used = [label for label in range(COCO_STUFF_LABELS) if label not in COCO_STUFF_UNUSED]
    classes = {IGNORED: IGNORED, **{label: number for number, label in enumerate(used)}}
    folders = (["{}", "images/{}"], ["stuffthingmaps/{}", "annotations/{}"])
    parts = ("train2017", "val2017")
    return _paired("coco_stuff", root, classes, folders, parts, COCO_STUFF_LAYOUT)


def load_folder(root: Path, classes: int) -> LabelMaps:
    """A user's own images: `root/images/{train,val}/*` and `root/labels/{train,val}/*.png`."""
    known = {IGNORED: IGNORED, **{label: label for label in range(classes)}}
    folders = (["images/{}"], ["labels/{}"])
    return _paired(root.resolve().name, root, known, folders, ("train", "val"), FOLDER_LAYOUT)


def _paired(
    name: str,
    root: Path,
    classes: Mapping[int, int],
    folders: tuple[list[str], list[str]],
    parts: tuple[str, str],
    layout: str,
) -> LabelMaps:
    """A dataset of images and of label maps that have the same names.

    Args:
        name: Its name.
        root: Where it lies.
        classes: Class of each value that a label map may hold.
        folders: Of a part's images, and of its label maps, the names that the folder may have.
        parts: Names of the parts to train and to evaluate on.
        layout: What must lie there, for errors.
    """
    train, val = (_pairs(root, part, folders, layout) for part in parts)
    count = len(classes) - 1  # One value is ignored.
    return LabelMaps(name, count, _table(classes), train, val, distinct_colors(count))


FOLDER = "folder"

# Readers of the datasets whose classes are known.
LABELLED: Mapping[str, Callable[[Path], LabelMaps]] = {
    "cityscapes": load_cityscapes,
    "ade20k": load_ade20k,
    "coco_stuff": load_coco_stuff,
}


def load_label_maps(name: str, root: Path, classes: int | None = None) -> LabelMaps:
    """A dataset.

    Args:
        name: Name in `LABELLED`, or `folder`.
        root: Where it lies.
        classes: Number of classes of a folder.

    Raises:
        ConfigError: An unknown name; a folder or a label map that is not there; a number of
            classes that is missing, senseless or not for the user to choose.
    """
    check_name([*LABELLED, FOLDER], name, "dataset")
    root = user_path(root)
    if name == FOLDER:
        if classes is None or not 2 <= classes <= MOST_CLASSES:
            raise ConfigError(f"classes: expected 2 to {MOST_CLASSES} for a folder, got {classes}")
        return load_folder(root, classes)
    if classes is not None:
        raise ConfigError(f"classes: expected none for {name}, which has its own, got {classes}")
    return LABELLED[name](root)


def _pairs(
    root: Path, part: str, folders: tuple[list[str], list[str]], layout: str
) -> tuple[Pair, ...]:
    """The images of a part, each with the label map of the same name; see `_paired`."""
    pictured, labelled = (
        _folder(root, [form.format(part) for form in forms], layout) for forms in folders
    )
    return _checked(
        [
            Pair(str(path), str(labelled / f"{path.stem}.png"))
            for path in visible(pictured)
            if is_image(path.name)
        ],
        pictured,
        layout,
    )


def _folder(root: Path, names: list[str], layout: str) -> Path:
    """The first of some folders that is there."""
    folders = [root / name for name in names]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        looked = " and ".join(map(str, folders))
        raise ConfigError(f"{looked}: no such folder (--data says where to look); {layout}")
    return found


def _checked(pairs: list[Pair], folder: Path, layout: str) -> tuple[Pair, ...]:
    """The pairs of a folder's images, if there are any and all have their label maps."""
    if not pairs:
        raise ConfigError(f"{folder}: holds no images; {layout}")
    for pair in pairs:
        if not Path(pair.labels).is_file():
            raise ConfigError(f"{pair.labels}: no such label map of {pair.image}; {layout}")
    return tuple(pairs)


def _table(classes: Mapping[int, int]) -> tuple[int, ...]:
    """The class of every value of a byte."""
    return tuple(classes.get(value, UNKNOWN) for value in range(256))


def distinct_colors(count: int) -> UInt8[Tensor, "K 3"]:
    """Colours of classes, of which those with near numbers differ most; none is black."""
    colors = [
        colorsys.hsv_to_rgb(n * GOLDEN % 1, 0.55 + 0.4 * (n % 2), 0.95 - 0.2 * (n % 3))
        for n in range(count)
    ]
    return (255 * torch.tensor(colors)).to(torch.uint8)
