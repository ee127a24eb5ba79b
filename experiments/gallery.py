"""A few training images and the weights that a run gave its teachers on them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.metrics import HEADS
from mtkd_env.data.dataset import Split
from mtkd_env.data.npz import UNREADABLE
from mtkd_env.env import StepRecord
from mtkd_env.files import write_atomically

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
        self.record = record


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
    """

    images: Array
    index: Array
    targets: Array
    logit: Array
    feature: Array
    correct: Array


def collect_gallery(record: StepRecord, split: Split) -> Gallery:
    """The images of a step and their weights.

    Args:
        record: The step.
        split: The training split that the step drew from.
    """

    def first(tensor: torch.Tensor) -> Array:
        array: Array = tensor[:MOST_IMAGES].cpu().numpy()
        return array

    position = record.index[:MOST_IMAGES].cpu()
    weights = {head: first(getattr(record.weights, head)) for head in HEADS}
    return Gallery(
        images=split.images[position].numpy(),
        index=split.index[position].numpy(),
        targets=first(record.targets),
        correct=first(record.correct),
        **weights,
    )


def write_gallery(gallery: Gallery, folder: Path) -> None:
    """Writes `gallery.npz`, which holds arrays of numbers alone."""
    write_atomically(
        folder / FILE, lambda temporary: np.savez_compressed(temporary, **vars(gallery))
    )


def read_gallery(folder: Path) -> Gallery | None:
    """The gallery of a run; none of a run that has none or a damaged one."""
    try:
        # NumPy leaves a damaged file open if it opens it itself.
        with (folder / FILE).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return Gallery(**{name: arrays[name] for name in Gallery.__dataclass_fields__})
    except (*UNREADABLE, KeyError):
        return None
