"""Scikit-learn's bundled handwritten digits: 1797 real images of 8x8 pixels, no download."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from mtkd_env.data.dataset import ImageData

BRIGHTEST = 16


def load() -> ImageData:
    """All digits, 80 % to train and 20 % to test, stratified; the same division every time.

    Digits are not mirrored: many a mirrored one is no digit.
    """
    # Copies, because whoever loads them may change them.
    x_train, x_test, y_train, y_test = (tensor.clone() for tensor in _divided())
    return ImageData(
        name="digits",
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        num_classes=10,
        flip=False,
        crop_padding=1,
    )


@cache
def _divided() -> list[Tensor]:
    """Images and classes, those to train with before those to test with; read once, as a text."""
    # Here, because this import takes as long as torch's and only this dataset needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * 255 / BRIGHTEST).astype(np.uint8)[:, None]
    targets = digits.target.astype(np.int64)
    arrays = train_test_split(images, targets, test_size=0.2, random_state=0, stratify=targets)
    return [torch.from_numpy(array) for array in arrays]
