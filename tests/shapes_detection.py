"""A small dataset in COCO's format: discs, squares and triangles on textures."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from experiments.transfer.coco import CocoSplit, read_coco

CLASSES = ("disc", "square", "triangle")

# Ids as COCO has them: neither from 1 nor without gaps.
CATEGORY_IDS = (3, 7, 18)

# Corners of each shape, whose first one stands upright; a disc is a polygon of many.
CORNERS = {"disc": 24, "square": 4, "triangle": 3}

TRAIN, VAL = "shapes_train", "shapes_val"

Annotation = dict[str, Any]


def texture(draw: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Two dark colours in waves, and noise."""
    rows, columns = np.mgrid[:height, :width]
    angle, period = draw.uniform(0, math.pi), draw.uniform(8, 30)
    phase = (rows * math.sin(angle) + columns * math.cos(angle)) / period
    share = (0.5 + 0.5 * np.sin(2 * math.pi * phase))[..., None]
    first, second = draw.uniform(0, 110, (2, 3))
    noise = draw.normal(0, 12, (height, width, 3))
    return (share * first + (1 - share) * second + noise).clip(0, 255).astype(np.uint8)


def polygon(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    count = CORNERS[shape]
    turn = math.pi / 4 if shape == "square" else math.pi / 2
    angles = [2 * math.pi * corner / count + turn for corner in range(count)]
    return [(x + radius * math.cos(a), y - radius * math.sin(a)) for a in angles]


def _area(points: list[tuple[float, float]]) -> float:
    x, y = np.array(points).T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _overlap(one: list[float], other: list[float]) -> bool:
    return all(
        one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2]
        for axis in (0, 1)
    )


def scene(draw: np.random.Generator, size: int) -> tuple[Image.Image, list[Annotation]]:
    """An image with one to three shapes that do not overlap."""
    height, width = size, int(draw.integers(size * 3 // 4, size + 1))
    image = Image.fromarray(texture(draw, height, width))
    canvas = ImageDraw.Draw(image)
    annotations: list[Annotation] = []
    for _ in range(draw.integers(1, 4)):
        label = int(draw.integers(len(CLASSES)))
        radius = draw.uniform(0.13, 0.25) * size
        x, y = (draw.uniform(radius + 1, side - radius - 1) for side in (width, height))
        points = polygon(CLASSES[label], x, y, radius)
        low, high = np.min(points, 0), np.max(points, 0)
        box = [*low.tolist(), *(high - low).tolist()]
        if any(_overlap(box, other["bbox"]) for other in annotations):
            continue
        # A pixel's centre is at its number to the canvas, half a pixel further on to COCO.
        drawn = [(column - 0.5, row - 0.5) for column, row in points]
        canvas.polygon(drawn, fill=tuple(draw.integers(140, 256, 3).tolist()))
        annotations.append(
            {
                "category_id": CATEGORY_IDS[label],
                "bbox": box,
                "area": _area(points),
                "segmentation": [np.array(points).ravel().tolist()],
                "iscrowd": 0,
            }
        )
    return image, annotations


def write_split(root: Path, name: str, count: int, *, size: int, seed: int) -> Path:
    """Writes images and their annotations; gives the annotation file."""
    draw = np.random.default_rng(seed)
    folder, file = root / name, root / "annotations" / f"instances_{name}.json"
    folder.mkdir(parents=True)
    file.parent.mkdir(exist_ok=True)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": number, "name": label}
            for number, label in zip(CATEGORY_IDS, CLASSES, strict=True)
        ],
    }
    for number in range(count):
        image, annotations = scene(draw, size)
        entry = {"id": 100 + number, "file_name": f"{number:04d}.png"}
        image.save(folder / entry["file_name"])
        content["images"].append(entry | {"height": image.height, "width": image.width})
        for annotation in annotations:
            identity = {"id": len(content["annotations"]) + 1, "image_id": entry["id"]}
            content["annotations"].append(identity | annotation)
    file.write_text(json.dumps(content))
    return file


def write_shapes(root: Path, *, train: int = 160, val: int = 40, size: int = 96) -> Path:
    """Writes both splits; gives the folder."""
    write_split(root, TRAIN, train, size=size, seed=0)
    write_split(root, VAL, val, size=size, seed=1)
    return root


def edited(root: Path, edit: Callable[[dict[str, Any]], None], split: str = TRAIN) -> CocoSplit:
    """The split after an edit of its annotation file."""
    file = root / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    return read_coco(root, split)
