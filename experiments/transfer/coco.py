"""Images with boxes and masks in the format of COCO.

`ROOT/annotations/instances_SPLIT.json` says what is to be seen on the images in `ROOT/SPLIT`.
"""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms.v2.functional import pil_to_tensor

from mtkd_env.data.reading import read_image
from mtkd_env.errors import ConfigError
from mtkd_env.imports import optional

LAYOUT = (
    "expected annotations/instances_{split}.json there and the images it names in {split}; those "
    "of COCO come in annotations_trainval2017.zip, train2017.zip and val2017.zip, to be unpacked "
    "side by side"
)

# Keys that the entries of an annotation file need here.
KEYS: Mapping[str, tuple[str, ...]] = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}

# No place, side or area is larger [pixels]; 32-bit floats hold such numbers with ease.
MOST_PIXELS = 2**40


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number, as places and areas are; NaN is none."""
    return isinstance(value, int | float) and -MOST_PIXELS <= value <= MOST_PIXELS


def _is_box(value: Any) -> bool:
    proper = isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))
    return proper and min(value[2:]) >= 0


WHOLE = (lambda value: type(value) is int), "a whole number"
SIDE = (lambda value: isinstance(value, int) and value >= 1), "1 or more"

# Whether a key's value can be used, and what is expected in words.
VALUES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("id", "image_id", "category_id"), WHOLE),
    **dict.fromkeys(("height", "width"), SIDE),
    "file_name": (lambda value: isinstance(value, str), "a name"),
    "bbox": (_is_box, "four finite numbers, the last two not negative"),
    "area": (_is_number, "a finite number"),
}

# Shortest side [pixels] of a box that is learned from.
MIN_SIDE = 1.0

Annotation = Mapping[str, Any]

# What torchvision's detectors learn from: boxes (N, 4), labels (N,) from 1, masks (N, H, W).
Target = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class CocoSplit:
    """The images of one annotation file.

    Attributes:
        file: The annotation file.
        folder: Folder of the images.
        class_names: Names of the classes, in the order of their labels; the background comes first.
        labels: Label of each category's id, from 1.
        images: The file's entry for each image.
        annotations: The entries for each image's objects, by the image's id.
        index: pycocotools' index of the file, which makes masks.
    """

    file: Path
    folder: Path
    class_names: tuple[str, ...]
    labels: Mapping[int, int]
    images: Sequence[Mapping[str, Any]]
    annotations: Mapping[int, Sequence[Annotation]]
    index: Any

    @cached_property
    def learnable(self) -> tuple[int, ...]:
        """Positions of the images on which there is something to learn from."""
        return tuple(position for position, image in enumerate(self.images) if self._usable(image))

    def image(self, position: int) -> UInt8[Tensor, "3 H W"]:
        """The pixels of an image.

        Raises:
            ConfigError: It cannot be read, or has another size than the annotations say.
        """
        entry = self.images[position]
        path = self.folder / entry["file_name"]
        if not path.is_file():
            raise ConfigError(f"{path}: no such image, but {self.file} names it")
        pixels: Tensor = pil_to_tensor(read_image(path))
        expected = entry["height"], entry["width"]
        if (found := tuple(pixels.shape[1:])) != expected:
            raise ConfigError(
                f"{path}: expected height and width {expected}, as in {self.file}, found {found}"
            )
        return pixels

    def target(self, position: int, *, masks: bool) -> Target:
        """What a detector learns from: no crowds, and no boxes that are next to nothing.

        Args:
            position: Position of the image.
            masks: Whether there are to be masks.

        Raises:
            ConfigError: A segmentation that no mask can be made of.
        """
        image = self.images[position]
        target = self._target(self._usable(image), image, masks=masks)
        target["boxes"] = clip_boxes_to_image(target["boxes"], (image["height"], image["width"]))
        return target

    def truth(self, position: int, *, masks: bool) -> Target:
        """What a detector is judged by: everything, with COCO's marks of crowds and its areas.

        Arguments and errors are those of `target`.
        """
        image = self.images[position]
        found = self.annotations[image["id"]]
        return {
            **self._target(found, image, masks=masks),
            "iscrowd": torch.tensor([is_crowd(one) for one in found], dtype=torch.int64),
            # Where there is none, the metric takes that of the mask or box.
            "area": torch.tensor([one.get("area", 0) for one in found], dtype=torch.float32),
        }

    def _usable(self, image: Mapping[str, Any]) -> list[Annotation]:
        size = image["height"], image["width"]
        return [
            one
            for one in self.annotations[image["id"]]
            if not is_crowd(one) and _is_large_enough(one["bbox"], size)
        ]

    def _target(
        self, found: Sequence[Annotation], image: Mapping[str, Any], *, masks: bool
    ) -> Target:
        boxes = torch.tensor([one["bbox"] for one in found], dtype=torch.float32)
        target = {
            "boxes": box_convert(boxes.reshape(-1, 4), "xywh", "xyxy"),
            "labels": torch.tensor(
                [self.labels[one["category_id"]] for one in found], dtype=torch.int64
            ),
        }
        if masks:
            size = image["height"], image["width"]
            nothing = torch.zeros(0, *size, dtype=torch.uint8)
            made = [self._mask(one, size)[None] for one in found]
            target["masks"] = torch.cat([nothing, *made])
        return target

    def _mask(self, annotation: Annotation, size: tuple[int, int]) -> UInt8[Tensor, "H W"]:
        where = f"{self.file}: the segmentation of annotation {annotation['id']}"
        try:
            with warnings.catch_warnings():
                # The library has yet to follow NumPy 2.
                warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
                mask = torch.from_numpy(self.index.annToMask(annotation))
        # The library raises whatever it happens upon, `Exception` itself included.
        except Exception as error:
            raise ConfigError(f"{where}: no mask ({type(error).__name__}: {error})") from error
        if (found := tuple(mask.shape)) != size:
            raise ConfigError(f"{where}: expected height and width {size}, found {found}")
        return mask


def is_crowd(annotation: Annotation) -> bool:
    """Whether an annotation is of objects that are too many to be told apart."""
    return bool(annotation.get("iscrowd", 0))


def _is_large_enough(box: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether enough of a box (x, y, width, height) lies on an image of a height and width."""
    x, y, width, height = box
    visible_width = min(x + width, size[1]) - max(x, 0)
    visible_height = min(y + height, size[0]) - max(y, 0)
    return min(visible_width, visible_height) >= MIN_SIDE


def read_coco(root: Path, split: str) -> CocoSplit:
    """Reads an annotation file; the images are read when they are needed.

    Args:
        root: Folder of both.
        split: Name of the split, such as train2017.

    Raises:
        ConfigError: Something is missing, or the file is not in COCO's format.
    """
    file, folder = root / "annotations" / f"instances_{split}.json", root / split
    for path, is_there in ((file, file.is_file()), (folder, folder.is_dir())):
        if not is_there:
            raise ConfigError(f"data: no {path}; looked in {root}: {LAYOUT.format(split=split)}")
    index = optional("pycocotools.coco").COCO()
    index.dataset = _checked(file)
    with redirect_stdout(StringIO()):  # It tells what it does.
        index.createIndex()
    categories = sorted(index.dataset["categories"], key=lambda entry: entry["id"])
    return CocoSplit(
        file=file,
        folder=folder,
        class_names=("background", *(str(entry["name"]) for entry in categories)),
        labels={entry["id"]: label for label, entry in enumerate(categories, 1)},
        images=index.dataset["images"],
        annotations=index.imgToAnns,
        index=index,
    )


def _checked(file: Path) -> dict[str, Any]:
    """The content of an annotation file.

    Raises:
        ConfigError: It is not what COCO's format says; names the first entry that is wrong.
    """
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON ({error})") from error
    for part, keys in KEYS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ConfigError(f"{file}: expected a list of {part}, as COCO's format has it")
        for number, entry in enumerate(entries):
            _check_entry(f"{file}: {part}[{number}]", entry, keys)
    _check_references(file, content, "image_id", "images")
    _check_references(file, content, "category_id", "categories")
    return content


def _check_entry(where: str, entry: Any, keys: Sequence[str]) -> None:
    found = entry if isinstance(entry, dict) else {}
    if missing := [key for key in keys if key not in found]:
        raise ConfigError(f"{where}: expected the key '{missing[0]}'")
    for key, (fits, expected) in VALUES.items():
        if key in found and not fits(found[key]):
            raise ConfigError(f"{where}: {key}: expected {expected}, got {found[key]!r}")


def _check_references(file: Path, content: dict[str, Any], key: str, part: str) -> None:
    ids = Counter(entry["id"] for entry in content[part])
    if again := [one for one, count in ids.items() if count > 1]:
        raise ConfigError(f"{file}: {part}: expected one entry with the id {again[0]}, got several")
    for one in content["annotations"]:
        if one[key] not in ids:
            name = f"{file}: annotation {one['id']}"
            raise ConfigError(f"{name}: {key}: no entry of {part} has the id {one[key]}")
