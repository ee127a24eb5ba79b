"""Images of noise, of any size and number: what a step costs does not depend on what they show."""

from pathlib import Path

import numpy as np

LEVELS = 256


def write_noise(folder: Path, channels: int, classes: int, side: int, count: int) -> Path:
    """Makes a file of noise that the dataset `npz` reads; gives it.

    Args:
        folder: Where.
        channels: K.
        classes: C.
        side: Height and width [pixels].
        count: Training images; made as many as there are classes if they are fewer.
    """
    draw = np.random.default_rng(0)
    count = max(count, classes)
    images = draw.integers(LEVELS, size=(count, side, side, channels)).astype(np.uint8)
    labels = np.arange(count) % classes
    path = folder / "noise.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:1], y_test=labels[:1])
    return path
