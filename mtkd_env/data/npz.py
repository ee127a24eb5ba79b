"""A user's own images, from a NumPy archive; every defect of the file is named."""

import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from mtkd_env.data.dataset import MIN_SIDE, ImageData
from mtkd_env.errors import ConfigError, did_you_mean
from mtkd_env.files import user_path

KEYS = ("x_train", "y_train", "x_test", "y_test")
UNREADABLE = (ValueError, OSError, EOFError, BadZipFile, zlib.error, NotImplementedError)

Array = NDArray[Any]


def load(
    path: str | Path,
    name: str | None = None,
    flip: bool | None = None,
    crop_padding: int | None = None,
) -> ImageData:
    """Images of a `.npz` file with `x_train`, `y_train`, `x_test` and `y_test`.

    Args:
        path: The file; images are uint8, (N, H, W) or (N, H, W, channels), labels integers from 0.
        name: Name in reports; the file's by default.
        flip: Whether images may be mirrored; by default those of three channels may.
        crop_padding: Padding [pixels] of random crops; an eighth of the height by default.

    Raises:
        ConfigError: The file cannot be used; names the file, the array and what was expected.
    """
    file = user_path(path)
    arrays = _read(file)
    try:
        x_train, x_test = (_images(key, arrays[key]) for key in ("x_train", "x_test"))
        y_train, y_test = (_labels(key, arrays[key]) for key in ("y_train", "y_test"))
        return ImageData(
            name=file.stem if name is None else name,
            x_train=x_train,
            y_train=y_train,
            x_test=x_test,
            y_test=y_test,
            num_classes=_count_classes("y_train", arrays["y_train"]),
            flip=x_train.shape[1] == 3 if flip is None else flip,
            crop_padding=x_train.shape[2] // 8 if crop_padding is None else crop_padding,
        )
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _read(file: Path) -> dict[str, Array]:
    """All arrays that a dataset needs; never unpickles anything."""
    expected = f"expected a .npz archive with {', '.join(KEYS)}"
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; {expected}")
    # Opened here, because numpy leaves a damaged archive open.
    with file.open("rb") as opened:
        try:
            archive = np.load(opened, allow_pickle=False)
        except UNREADABLE as error:
            raise ConfigError(f"{file}: cannot be read ({error}); {expected}") from error
        if not isinstance(archive, NpzFile):
            raise ConfigError(f"{file}: holds a single array; {expected}")
        with archive:
            return {key: _read_array(file, archive, key) for key in KEYS}


def _read_array(file: Path, archive: NpzFile, key: str) -> Array:
    if key not in archive:
        hint, found = did_you_mean(key, archive.files), ", ".join(archive.files)
        raise ConfigError(f"{file}: no array '{key}'{hint} (found: {found}; expected: {KEYS})")
    try:
        array: Array = archive[key]
    except UNREADABLE as error:
        raise ConfigError(
            f"{file}: {key}: cannot be read ({error}); expected an array of integers"
        ) from error
    return array


def _images(key: str, array: Array) -> Tensor:
    """Images as (N, K, H, W)."""
    if array.dtype != np.uint8:
        raise ConfigError(f"{key}: expected uint8 images from 0 to 255, found {array.dtype}")
    expected = "expected shape (N, H, W) or (N, H, W, channels)"
    if array.ndim not in {3, 4}:
        raise ConfigError(f"{key}: {expected}, found {array.shape}")
    if array.ndim == 3:
        return torch.from_numpy(array[:, None])
    if array.shape[1] < MIN_SIDE <= array.shape[3]:
        raise ConfigError(
            f"{key}: {expected}, found {array.shape}, which looks like (N, channels, H, W); "
            "use array.transpose(0, 2, 3, 1)"
        )
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def _labels(key: str, array: Array) -> Tensor:
    if array.dtype.kind not in "iu":
        raise ConfigError(f"{key}: expected integer labels, found {array.dtype}")
    if array.ndim != 1:
        hint = ""
        if array.ndim == 2:
            column = array.shape[1] == 1
            hint = "; use array.reshape(-1)" if column else "; if one-hot, use array.argmax(1)"
        raise ConfigError(f"{key}: expected shape (N,), found {array.shape}{hint}")
    return torch.from_numpy(array.astype(np.int64))


def _count_classes(key: str, array: Array) -> int:
    """C, the number of labels; they must be 0 to C - 1."""
    labels = np.unique(array)
    if not np.array_equal(labels, np.arange(len(labels))):
        found = ", ".join(str(label) for label in labels[:10]) + ", ..." * (len(labels) > 10)
        raise ConfigError(f"{key}: expected labels from 0 with none left out, found {found}")
    return len(labels)
