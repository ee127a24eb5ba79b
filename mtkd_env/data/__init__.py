"""Datasets and the batches made of them; to add one is a file and a line in the table.

Data know neither what is trained on them nor how.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from mtkd_env.data import cifar, digits, fashion_mnist, folder, npz
from mtkd_env.data.dataset import ImageData, ImageSet
from mtkd_env.data.image_files import ImageFiles
from mtkd_env.data.mixing import Mixing
from mtkd_env.data.split import Split, Splits
from mtkd_env.data.stream import BatchStream, StreamState, evaluation_batches
from mtkd_env.errors import ConfigError, check_arguments, check_types, lookup
from mtkd_env.files import whole_path

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
    "with_whole_paths",
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


def with_whole_paths(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a dataset, of which paths mean the same from another working directory."""
    load = DATASETS.get(name)
    parameters = inspect.signature(load).parameters if load else {}
    paths = {key for key, one in parameters.items() if Path in get_args(one.annotation)}
    return {
        key: whole_path(value) if key in paths and isinstance(value, str | Path) else value
        for key, value in arguments.items()
    }
