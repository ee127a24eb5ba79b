"""Images of a user's own program: of a map-style `Dataset` of torch, or of several.

They are read once, into memory; what is too large for that belongs into a folder. If a dataset
draws its images at random, those to train on are read again whenever they are seen.
"""

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from mtkd_env.data.dataset import ImageData, ImageSet
from mtkd_env.data.live import LiveImages
from mtkd_env.data.npz import count_classes
from mtkd_env.data.reading import pixels
from mtkd_env.errors import ConfigError, check_name, check_not_negative
from mtkd_env.imports import is_a, is_users, name_of
from mtkd_env.seeding import all_seeded
from mtkd_env.types import UNKNOWN

PARTS = ("train", "val", "test")

EXPECTED = (
    "a map-style torch Dataset of (image, label), a dict of such for train, test and val, or a "
    "class or function that gives either"
)

# How many images tell whether a dataset draws at random: a transform that is applied to every tenth
# image is not seen on 32 of them twice in a thousand times.
LOOKED_AT = 32

NORMALISED = "leave out Normalize in its transform: images are normalised by the training images"


def fits(found: Any) -> bool:
    """Whether something is, or makes, a dataset; as far as can be told without calling it."""
    if isinstance(found, Mapping):
        return "train" in found and all(map(_is_map_style, found.values()))
    return isinstance(found, ImageSet) or _is_map_style(found) or _makes(found)


def _is_map_style(found: Any) -> bool:
    plain = isinstance(found, type | str | list | tuple | Mapping | IterableDataset)
    return not plain and hasattr(found, "__getitem__") and hasattr(found, "__len__")


def _makes(found: Any) -> bool:
    if isinstance(found, type):
        return issubclass(found, Dataset | ImageSet)
    return is_a(found, (Dataset, ImageSet)) or (is_users(found) and not _is_map_style(found))


def loader(found: Any) -> Callable[..., ImageSet[Any]]:
    """Makes a dataset of keyword arguments: those of the class or function, or `collected`'s."""
    named = name_of(found)
    if not _makes(found):
        return partial(collected, found, named)

    def load(**arguments: Any) -> ImageSet[Any]:
        made = found(**arguments)
        if not fits(made) or _makes(made):
            raise ConfigError(f"'{named}' gives {made!r}, expected {EXPECTED}")
        return collected(made, named)

    load.__wrapped__ = found  # type: ignore[attr-defined]  # what `inspect.signature` follows
    return load


def collected(
    found: Any,
    named: str,
    *,
    name: str | None = None,
    flip: bool | None = None,
    crop_padding: int | None = None,
    num_classes: int | None = None,
    workers: int = 0,
) -> ImageSet[Any]:
    """Images in memory, of datasets that are read once, one image after the other.

    If the one to train on draws at random, by torch's, NumPy's or Python's global generator, it is
    read again for every batch, and no augmentation comes on top. Images are PIL's, tensors
    (K, H, W) or (H, W), or arrays (H, W, K) or (H, W): bytes, or floats from 0 to 1. Labels are
    integers from 0; -1 or None where one is missing in training.

    Args:
        found: An `ImageSet`, which is given back; a dataset to train on, of which a share has to
            become the test images; or datasets by the names train, test and val.
        named: What it is called, for errors.
        name: Name in reports; by default what it is called, without its module.
        flip: Whether images may be mirrored; by default those of three channels may.
        crop_padding: Padding [pixels] of random crops; an eighth of the height by default.
        num_classes: C; by default the number of a dataset's `classes`, or else of labels.
        workers: Processes that read images which are drawn at random.

    Raises:
        ConfigError: Something cannot be used; names the part and the position.
    """
    if isinstance(found, ImageSet):
        return found
    parts = found if isinstance(found, Mapping) else {"train": found}
    for part in parts:
        check_name(PARTS, part, "part of a dataset")
    arrays = {part: _read(f"{named}: {part}", dataset) for part, dataset in parts.items()}
    check_not_negative(workers=workers)
    images, labels = arrays["train"]
    classes = _class_names(parts["train"], num_classes)
    test = arrays.get("test", (images[:0], labels[:0]))
    x_val, y_val = arrays.get("val", (None, None))
    make: Callable[..., ImageData] = ImageData
    if _draws(parts["train"]):
        draw = partial(_draw, f"{named}: train", parts["train"], images[0].shape)
        make = partial(LiveImages, draw=draw, workers=workers)
    return make(
        name=name or named.rpartition(":")[2],
        x_train=images,
        y_train=labels,
        x_test=test[0],
        y_test=test[1],
        x_val=x_val,
        y_val=y_val,
        num_classes=num_classes or len(classes) or count_classes(labels, test[1]),
        flip=images.shape[1] == 3 if flip is None else flip,
        crop_padding=images.shape[2] // 8 if crop_padding is None else crop_padding,
        class_names=classes,
    )


def _class_names(dataset: Any, num_classes: int | None) -> tuple[str, ...]:
    """The names that a dataset of torchvision has for its classes; none if it has none."""
    names = getattr(dataset, "classes", ())
    known = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return tuple(names) if known and num_classes in {None, len(names)} else ()


def _read(where: str, dataset: Any) -> tuple[Tensor, Tensor]:
    """All images of a dataset (N, K, H, W), and their labels (N,)."""
    images: list[Tensor] = []
    labels = []
    for position in range(len(dataset)):
        shape = images[0].shape if images else None
        image, label = _item(where, dataset, shape, position, seed=position)
        images.append(image)
        labels.append(_label(f"{where}[{position}]", label))
    if not images:
        raise ConfigError(f"{where}: expected at least one image, found none")
    return torch.stack(images), torch.tensor(labels)


def _item(
    where: str, dataset: Any, shape: torch.Size | None, position: int, seed: int
) -> tuple[Tensor, Any]:
    """An image of a dataset (K, H, W), drawn under a seed, and what it has as label."""
    with all_seeded(seed):
        item = dataset[position]
    at = f"{where}[{position}]"
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise ConfigError(f"{at}: expected (image, label), found {_described(item)}")
    try:
        image = _image(item[0])
    except ValueError as error:
        raise ConfigError(f"{at}: {error}") from error
    if shape not in {None, image.shape}:
        expected = f"{tuple(shape or ())} as in the first image"
        raise ConfigError(
            f"{at}: expected shape {expected}, found {tuple(image.shape)}; a Resize in its "
            "transform makes them equal"
        )
    return image, item[1]


def _draw(where: str, dataset: Any, shape: torch.Size, position: int, seed: int) -> Tensor:
    return _item(where, dataset, shape, position, seed)[0]


def _draws(dataset: Any) -> bool:
    """Whether some of its images are others under another seed."""
    few = range(min(len(dataset), LOOKED_AT))
    return any(
        not torch.equal(*(_item("", dataset, None, position, seed)[0] for seed in (0, 1)))
        for position in few
    )


def _image(found: Any) -> Tensor:
    """An image as bytes (K, H, W).

    Raises:
        ValueError: It is none, or its numbers have no known range.
    """
    if isinstance(found, Image.Image):
        return torch.from_numpy(pixels(found))
    if isinstance(found, np.ndarray):
        found = torch.from_numpy(np.ascontiguousarray(found))
        found = found.permute(2, 0, 1) if found.ndim == 3 else found
    if not isinstance(found, Tensor) or found.ndim not in {2, 3}:
        expected = "an image of PIL, a tensor (K, H, W) or an array (H, W, K)"
        raise ValueError(f"expected {expected}, found {_described(found)}")
    found = found if found.ndim == 3 else found.unsqueeze(0)
    if found.dtype == torch.uint8:
        return found
    low, high = float(found.min()), float(found.max())
    if not found.is_floating_point() or not 0 <= low <= high <= 1:
        kind = str(found.dtype).removeprefix("torch.")
        raise ValueError(
            f"expected uint8, or floats from 0 to 1, found {kind} from {low:g} to {high:g}; "
            f"{NORMALISED}"
        )
    return (255 * found.float()).round().to(torch.uint8)


def _label(at: str, found: Any) -> int:
    if found is None:
        return UNKNOWN
    try:
        number: Any = found.item() if isinstance(found, Tensor) else found
        return operator.index(number)
    except (TypeError, RuntimeError, ValueError):
        raise ConfigError(f"{at}: expected a whole number as label, found {found!r}") from None


def _described(found: Any) -> str:
    keys = f" with the keys {', '.join(map(str, found))}" if isinstance(found, Mapping) else ""
    shape = f" of shape {tuple(found.shape)}" if hasattr(found, "shape") else ""
    return type(found).__name__ + keys + shape
