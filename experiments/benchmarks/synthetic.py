"""Images of noise, of any size and number: what a step costs does not depend on what they show."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mtkd_env import DataSpec

LEVELS = 256


@dataclass(frozen=True)
class Noise:
    """Images of noise.

    Attributes:
        channels: K.
        classes: C.
        side: Height and width [pixels].
        count: Training images; no fewer than there are classes.
    """

    channels: int
    classes: int
    side: int
    count: int

    def write(self, folder: Path) -> Path:
        """Makes a file of them that the dataset `npz` reads; gives it."""
        draw = np.random.default_rng(0)
        count = max(self.count, self.classes)
        images = draw.integers(LEVELS, size=(count, self.side, self.side, self.channels))
        labels = np.arange(count) % self.classes
        path = folder / "noise.npz"
        np.savez(
            path,
            x_train=images.astype(np.uint8),
            y_train=labels,
            x_test=images[:1].astype(np.uint8),
            y_test=labels[:1],
        )
        return path


def on_noise(data: DataSpec, path: Path, batch_size: int) -> DataSpec:
    """The same on a file of noise, all of it, in batches of another size."""
    return replace(
        data,
        dataset="npz",
        arguments={"path": str(path)},
        batch_size=batch_size,
        val_fraction=0.0,
        train_size=None,
    )
