"""A user's own images, from a NumPy archive; every defect of the file is named."""

import zlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from mtkd_env.data.dataset import (
    MIN_SIDE,
    ImageData,
    ImageSet,
    check_more_images,
    check_same_length,
)
from mtkd_env.data.split import Split
from mtkd_env.errors import ConfigError, did_you_mean, errors_of
from mtkd_env.files import user_path
from mtkd_env.types import UNKNOWN

TRAINING = ("x_train", "y_train")
KEYS = (*TRAINING, "x_test", "y_test")
UNLABELLED = "x_unlabelled"
UNREADABLE = (ValueError, OSError, EOFError, BadZipFile, zlib.error, NotImplementedError)

Array = NDArray[Any]


def load(
    path: str | Path,
    name: str | None = None,
    flip: bool | None = None,
    crop_padding: int | None = None,
    num_classes: int | None = None,
) -> ImageData:
    """Images of a `.npz` file with `x_train`, `y_train`, `x_test` and `y_test`.

    Training images without a label have -1 in `y_train`, or are in a further array `x_unlabelled`.

    Args:
        path: The file; images are uint8, (N, H, W) or (N, H, W, channels), labels integers from 0.
        name: Name in reports; the file's by default.
        flip: Whether images may be mirrored; by default those of three channels may.
        crop_padding: Padding [pixels] of random crops; an eighth of the height by default.
        num_classes: C; by default the number of labels, of both parts where some are missing.

    Raises:
        ConfigError: The file cannot be used; names the file, the array and what was expected.
    """
    file = user_path(path)
    arrays = _read(file, KEYS)
    with errors_of(file):
        x_train, y_train = _training(arrays)
        x_test, y_test = _images("x_test", arrays["x_test"]), _labels("y_test", arrays["y_test"])
        return ImageData(
            name=file.stem if name is None else name,
            x_train=x_train,
            y_train=y_train,
            x_test=x_test,
            y_test=y_test,
            num_classes=count_classes(y_train, y_test) if num_classes is None else num_classes,
            flip=x_train.shape[1] == 3 if flip is None else flip,
            crop_padding=x_train.shape[2] // 8 if crop_padding is None else crop_padding,
        )


def load_training_images(path: Path, data: ImageSet[Split]) -> Split:
    """The training images of a further `.npz` file, which need not have others.

    Args:
        path: The file; see `load`.
        data: Whose shape and classes they have.

    Raises:
        ConfigError: The file cannot be used; names the file, the array and what was expected.
    """
    arrays = _read(path, TRAINING)
    with errors_of(path):
        images, targets = _training(arrays)
        check_more_images(data, images, targets)
    return Split(images, targets, torch.arange(len(targets)))


def _training(arrays: Mapping[str, Array]) -> tuple[Tensor, Tensor]:
    """Training images and their classes; those of `x_unlabelled` come last."""
    images, labels = _images("x_train", arrays["x_train"]), _labels("y_train", arrays["y_train"])
    check_same_length("train", images, labels)
    if UNLABELLED not in arrays:
        return images, labels
    more = _images(UNLABELLED, arrays[UNLABELLED])
    if more.shape[1:] != images.shape[1:]:
        expected = f"images of shape {tuple(images.shape[1:])} as in x_train"
        raise ConfigError(f"{UNLABELLED}: expected {expected}, found {tuple(more.shape[1:])}")
    unknown = torch.full((len(more),), UNKNOWN)
    return torch.cat([images, more]), torch.cat([labels, unknown])


def _read(file: Path, keys: Sequence[str]) -> dict[str, Array]:
    """All arrays that are needed, and `x_unlabelled` if it is there; never unpickles anything."""
    expected = f"expected a .npz archive with {', '.join(keys)}"
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
            _check_no_misspelling(file, archive.files)
            wanted = [*keys, *({UNLABELLED} & set(archive.files))]
            return {key: _read_array(file, archive, key, keys) for key in wanted}


def _check_no_misspelling(file: Path, found: Sequence[str]) -> None:
    """Raises for what would be left out in silence: images under nearly the right name."""
    for key in get_close_matches(UNLABELLED, found, n=1, cutoff=0.85):
        if key != UNLABELLED:
            raise ConfigError(f"{file}: expected '{UNLABELLED}', found '{key}'")


def _read_array(file: Path, archive: NpzFile, key: str, keys: Sequence[str]) -> Array:
    if key not in archive:
        hint, found = did_you_mean(key, archive.files), ", ".join(archive.files)
        raise ConfigError(f"{file}: no array '{key}'{hint} (found: {found}; expected: {keys})")
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


def count_classes(y_train: Tensor, y_test: Tensor) -> int:
    """C, the number of labels; they must be 0 to C - 1.

    Where some are missing, a class may be known from the test images alone.

    Raises:
        ConfigError: They are not.
    """
    known = y_train[y_train != UNKNOWN]
    if len(known) < len(y_train):
        known = torch.cat([known, y_test[y_test != UNKNOWN]])
    labels = known.unique().tolist()
    if labels != [*range(len(labels))]:
        found = ", ".join(str(label) for label in labels[:10]) + ", ..." * (len(labels) > 10)
        raise ConfigError(
            "y_train: expected labels from 0 with none left out, unless num_classes says how many "
            f"there are, found {found}"
        )
    return len(labels)
