"""A few training images and the weights that a run gave its teachers on them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.metrics import HEADS
from mtkd_env.data import ImageSet
from mtkd_env.data.npz import UNREADABLE
from mtkd_env.files import write_atomically
from mtkd_env.types import UNKNOWN
from mtkd_env.vector import StepRecord

FILE = "gallery.npz"

# Images that are kept of a batch.
MOST_IMAGES = 64

Array = NDArray[Any]


class LastStep:
    """Keeps the last step of an environment that it subscribes to."""

    def __init__(self) -> None:
        self.record: StepRecord | None = None

    def __call__(self, record: StepRecord) -> None:
        """Forgets the step before."""
        self.record = record.whole()


@dataclass(frozen=True)
class Gallery:
    """Training images of one batch, and what a run did with them.

    Attributes:
        images: Unaugmented images (B, K, H, W), uint8.
        index: Positions of the images in the dataset's training images (B,).
        targets: Their classes (B,).
        logit: Weights of the teachers in the logit terms (B, M).
        feature: Weights of the teachers in the feature terms (B, M).
        correct: Whether each teacher has the class right (B, M).
        names: Name of each image's class (B,); the class itself where classes have no names.
    """

    images: Array
    index: Array
    targets: Array
    logit: Array
    feature: Array
    correct: Array
    names: Array


def collect_gallery(record: StepRecord, data: ImageSet[Any], split: Any) -> Gallery:
    """The images of a step and their weights.

    Args:
        record: The step.
        data: The dataset.
        split: Its training split, which the step drew from.
    """

    def first(tensor: torch.Tensor) -> Array:
        array: Array = tensor[:MOST_IMAGES].cpu().numpy()
        return array

    position = record.index[:MOST_IMAGES].cpu()
    weights = {head: first(getattr(record.weights, head)) for head in HEADS}
    targets = split.targets[position].numpy()
    names = data.class_names or tuple(map(str, range(data.num_classes)))
    places = np.where(targets == UNKNOWN, len(names), targets)
    return Gallery(
        images=data.pixels(split, position).numpy(),
        index=split.index[position].numpy(),
        targets=targets,
        correct=first(record.correct),
        names=np.array([*names, "no label"])[places],
        **weights,
    )


def write_gallery(gallery: Gallery, folder: Path) -> None:
    """Writes `gallery.npz`, which holds arrays of numbers and of text alone."""
    write_atomically(
        folder / FILE, lambda temporary: np.savez_compressed(temporary, **vars(gallery))
    )


def read_gallery(folder: Path) -> Gallery | None:
    """The gallery of a run; none of a run that has none or a damaged one."""
    try:
        # NumPy leaves a damaged file open if it opens it itself.
        with (folder / FILE).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return Gallery(**arrays)
    except (*UNREADABLE, TypeError):
        return None
