"""Datasets in memory and the batches made of them; to add one is a file and a line in the table.

Data know neither what is trained on them nor how.
"""

import inspect
from collections.abc import Callable
from typing import Any

from mtkd_env.data import digits, npz
from mtkd_env.data.dataset import ImageData, Split, Splits
from mtkd_env.data.stream import BatchStream, StreamState, evaluation_batches
from mtkd_env.errors import ConfigError, check_arguments, lookup

__all__ = [
    "DATASETS",
    "BatchStream",
    "ImageData",
    "Split",
    "Splits",
    "StreamState",
    "evaluation_batches",
    "load_dataset",
]

DATASETS: dict[str, Callable[..., ImageData]] = {
    "digits": digits.load,
    "npz": npz.load,
}


def load_dataset(name: str, **kwargs: Any) -> ImageData:
    """A dataset of the table.

    Args:
        name: Key of `DATASETS`.
        **kwargs: Arguments of the dataset itself, such as `path`.

    Raises:
        ConfigError: An unknown name, or an argument that the dataset does not take or that is
            missing.
    """
    load = lookup(DATASETS, name, "dataset")
    check_arguments(load, kwargs, name)
    try:
        inspect.signature(load).bind(**kwargs)
    except TypeError as error:
        raise ConfigError(f"dataset '{name}': {error}") from error
    return load(**kwargs)
