"""Images of shapes on textures with a class for every pixel, in the layouts of real datasets."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

# Background, disc, square, triangle.
CLASSES = 4
IGNORED = 255

SMALLEST, LARGEST = 64, 96

# Mean colour of each class.
COLORS = np.array([[120, 120, 120], [190, 90, 80], [90, 170, 90], [90, 100, 190]])

Array = NDArray[np.uint8]


class Layout(NamedTuple):
    """Where a dataset keeps images and label maps, and how labels are written.

    Attributes:
        parts: Names of the parts to train and to evaluate on.
        image: Name of an image, from the part and the image's name.
        labels: Name of its label map.
        written: Label of each of the four classes, and that of what is none.
        read: What these are read as.
        classes: Number of classes of the dataset.
    """

    parts: tuple[str, str]
    image: str
    labels: str
    written: tuple[int, ...]
    read: tuple[int, ...]
    classes: int


LAYOUTS = {
    "folder": Layout(
        ("train", "val"),
        "images/{part}/{name}.png",
        "labels/{part}/{name}.png",
        (0, 1, 2, 3, 255),
        (0, 1, 2, 3, 255),
        CLASSES,
    ),
    "cityscapes": Layout(
        ("train", "val"),
        "leftImg8bit/{part}/town/town_{name}_leftImg8bit.png",
        "gtFine/{part}/town/town_{name}_gtFine_labelIds.png",
        (7, 8, 24, 33, 0),
        (0, 1, 11, 18, 255),
        19,
    ),
    "ade20k": Layout(
        ("training", "validation"),
        "images/{part}/ADE_{name}.jpg",
        "annotations/{part}/ADE_{name}.png",
        (1, 2, 3, 150, 0),
        (0, 1, 2, 149, 255),
        150,
    ),
    "coco_stuff": Layout(
        ("train2017", "val2017"),
        "{part}/{name}.jpg",
        "stuffthingmaps/{part}/{name}.png",
        (0, 12, 92, 181, 255),
        (0, 11, 81, 170, 255),
        171,
    ),
}


def draw(seed: int) -> tuple[Array, Array]:
    """An image (H, W, 3) of a few shapes and its labels (H, W); edges of shapes are none."""
    generator = np.random.default_rng(seed)
    height, width = generator.integers(SMALLEST, LARGEST + 1, 2)
    image = texture(generator, height, width, 0)
    labels = np.zeros((height, width), dtype=np.uint8)
    for _ in range(generator.integers(2, 5)):
        kind = int(generator.integers(1, CLASSES))
        inside, edge = masks(generator, height, width, kind)
        image[inside] = texture(generator, height, width, kind)[inside]
        labels[inside] = kind
        labels[edge] = IGNORED
    return image, labels


def texture(generator: np.random.Generator, height: int, width: int, kind: int) -> Array:
    """Blotches and noise around the colour of a class, which varies from one to the next."""
    coarse = generator.normal(0, 25, (height // 8 + 1, width // 8 + 1, 1))
    blotches = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    noise = generator.normal(0, 20, (height, width, 3))
    color = COLORS[kind] + generator.normal(0, 20, 3)
    return (color + blotches + noise).clip(0, 255).astype(np.uint8)


def masks(
    generator: np.random.Generator, height: int, width: int, kind: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The pixels of a shape, and those of its edge."""
    radius = int(generator.integers(9, 19))
    x = int(generator.integers(radius, width - radius))
    y = int(generator.integers(radius, height - radius))
    box = (x - radius, y - radius, x + radius, y + radius)
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    if kind == 1:
        pen.ellipse(box, fill=1, outline=2)
    elif kind == 2:
        pen.rectangle(box, fill=1, outline=2)
    else:
        corners = [(x, box[1]), (box[0], box[3]), (box[2], box[3])]
        pen.polygon(corners, fill=1, outline=2)
    drawn = np.asarray(canvas)
    return drawn > 0, drawn == 2


def write_shapes(root: Path, dataset: str = "folder", *, train: int = 160, val: int = 40) -> None:
    """Writes images in the layout of a dataset.

    Args:
        root: Where to.
        dataset: Name in `LAYOUTS`.
        train: Images to train on.
        val: Images to evaluate on.
    """
    layout = LAYOUTS[dataset]
    written = np.full(256, layout.written[CLASSES], dtype=np.uint8)
    written[:CLASSES] = layout.written[:CLASSES]
    for number, (part, count) in enumerate(zip(layout.parts, (train, val), strict=True)):
        for position in range(count):
            image, labels = draw(10_000 * number + position)
            for pattern, pixels in ((layout.image, image), (layout.labels, written[labels])):
                path = root / pattern.format(part=part, name=f"{position:06}")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
