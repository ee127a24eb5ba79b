"""Datasets and the batches made of them; to add one is a file and a line in the table.

Data know neither what is trained on them nor how.
"""

import inspect
from collections.abc import Callable
from typing import Any

from mtkd_env.data import cifar, digits, fashion_mnist, folder, npz
from mtkd_env.data.dataset import ImageData, ImageSet
from mtkd_env.data.image_files import ImageFiles
from mtkd_env.data.mixing import Mixing
from mtkd_env.data.split import Split, Splits
from mtkd_env.data.stream import BatchStream, StreamState, evaluation_batches
from mtkd_env.errors import ConfigError, check_arguments, check_types, lookup

__all__ = [
    "DATASETS",
    "BatchStream",
    "ImageData",
    "ImageFiles",
    "ImageSet",
    "Mixing",
    "Split",
    "Splits",
    "StreamState",
    "evaluation_batches",
    "load_dataset",
]

DATASETS: dict[str, Callable[..., ImageSet[Any]]] = {
    "digits": digits.load,
    "npz": npz.load,
    "cifar10": cifar.load_cifar10,
    "cifar100": cifar.load_cifar100,
    "fashion_mnist": fashion_mnist.load,
    "imagenet": folder.load_imagenet,
    "folder": folder.load_folder,
}


def load_dataset(name: str, /, **kwargs: Any) -> ImageSet[Any]:
    """A dataset of the table.

    Args:
        name: Key of `DATASETS`.
        **kwargs: Arguments of the dataset itself, such as `path`.

    Raises:
        ConfigError: An unknown name, or an argument that the dataset does not take, that is of
            another type, or that is missing.
    """
    load = lookup(DATASETS, name, "dataset")
    check_arguments(load, kwargs, name)
    try:
        inspect.signature(load).bind(**kwargs)
    except TypeError as error:
        raise ConfigError(f"dataset '{name}': {error}") from error
    check_types(load, kwargs, name)
    return load(**kwargs)
