"""Datasets and the batches made of them; to add one is a file and a line in the table.

Data know neither what is trained on them nor how.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from mtkd_env.data import cifar, digits, fashion_mnist, folder, npz
from mtkd_env.data.dataset import ImageData, ImageSet
from mtkd_env.data.image_files import ImageFiles
from mtkd_env.data.mixing import Mixing
from mtkd_env.data.split import LabelSpec, Split, Splits
from mtkd_env.data.stream import BatchStream, StreamState, evaluation_batches
from mtkd_env.data.views import ViewSet
from mtkd_env.errors import ConfigError, check_arguments, lookup
from mtkd_env.files import user_path, whole_path
from mtkd_env.options import Options, typed

__all__ = [
    "DATASETS",
    "BatchStream",
    "DataSpec",
    "ImageData",
    "ImageFiles",
    "ImageSet",
    "Mixing",
    "Split",
    "Splits",
    "StreamState",
    "dataset_arguments",
    "evaluation_batches",
    "load_dataset",
    "load_training_images",
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


@dataclass(frozen=True)
class DataSpec(Options):
    """The images, and how the student's batches are made of them.

    Attributes:
        dataset: Name of a dataset.
        arguments: Keyword arguments of the dataset, such as path for npz.
        batch_size: B, images in a batch; also the number of sub-environments.
        val_fraction: Share of the (labelled) training images to hold out for choices, the split
            val.
        train_size: Training images to keep; all by default.
        labelled: Number of these that keep their label, as they come, or 0; all of them by default.
            The labels of the others are removed. Images that are held out for choices or rewards
            are taken from the labelled ones.
        labelled_seed: Seed of that choice; not the run's, so that all runs know the same labels. By
            default 0, and in a comparison of pools the pool's.
        heldout: Labelled images to set apart, which no loss sees and whose labels are never wrong,
            for the reward heldout and whoever else learns from labels; by default they look at
            those that the student learns from.
        label_noise: Share of the labels that the student learns from that are drawn anew, uniformly
            over all classes.
        label_noise_seed: Seed of which ones, and of what they become; by default likewise.
        mixup: Alpha of the mixup of the student's batches; 0 is none. Teachers in training see
            whole images.
        cutmix: Alpha of their cutmix; with both, every batch takes either.
        views: Views that each image is seen in, one after the other in the epochs; by default a new
            one at random every time. Teacher outputs on a few views can be kept.
        view_seed: Seed of the choice of so many views; not the run's, so that runs of all seeds can
            share the teachers' outputs.

    Raises:
        ConfigError: An unknown dataset or argument, or a number that is out of its range whatever
            the images are.
    """

    dataset: str = "digits"
    arguments: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    val_fraction: float = 0.0
    train_size: int | None = None
    labelled: int | None = None
    labelled_seed: int | None = None
    heldout: int = 0
    label_noise: float = 0.0
    label_noise_seed: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    views: int | None = None
    view_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments = dataset_arguments(self.dataset, self.arguments, "arguments")
        object.__setattr__(self, "arguments", arguments)
        Mixing(self.mixup, self.cutmix)
        ViewSet(self.views, self.view_seed)
        _ = self.labels

    @property
    def labels(self) -> LabelSpec:
        """Which labels are there, and which of them are wrong."""
        return LabelSpec(
            self.labelled,
            self.labelled_seed or 0,
            self.heldout,
            self.label_noise,
            self.label_noise_seed or 0,
        )

    @property
    def mixing(self) -> Mixing:
        """How strongly the student's images are mixed."""
        return Mixing(self.mixup, self.cutmix)

    @property
    def view_set(self) -> ViewSet:
        """Which of its views an image is seen in."""
        return ViewSet(self.views, self.view_seed)


def dataset_arguments(name: str, arguments: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Arguments of a dataset, checked without loading it.

    Args:
        name: Key of `DATASETS`.
        arguments: Arguments of the dataset itself.
        path: Where they stand, for errors.

    Returns:
        The same in the types that the dataset says; paths mean the same from another working
        directory.

    Raises:
        ConfigError: An unknown name, or an argument that the dataset does not take or that is of
            another type.
    """
    load = lookup(DATASETS, name, "dataset")
    check_arguments(load, arguments, path)
    parameters = inspect.signature(load).parameters
    return {
        key: whole_path(value)
        if isinstance(value, str) and Path in get_args(parameters[key].annotation)
        else value
        for key, value in typed(load, arguments, path).items()
    }


def load_dataset(name: str, /, **kwargs: Any) -> ImageSet[Any]:
    """A dataset of the table.

    Args:
        name: Key of `DATASETS`.
        **kwargs: Arguments of the dataset itself, such as `path`.

    Raises:
        ConfigError: A name or an argument that `dataset_arguments` refuses, an argument that is
            missing, or images that cannot be read.
    """
    kwargs = dataset_arguments(name, kwargs, name)
    load = DATASETS[name]
    try:
        inspect.signature(load).bind(**kwargs)
    except TypeError as error:
        raise ConfigError(f"dataset '{name}': {error}") from error
    return load(**kwargs)


def load_training_images(path: str, data: ImageSet[Any]) -> Any:
    """Training images of another file or folder, in the form of a dataset's own.

    Args:
        path: A folder if the dataset is in files, else a `.npz` file.
        data: Whose shape and classes they have.

    Raises:
        ConfigError: The path cannot be used, or its images or classes are others; names it.
    """
    found = user_path(path)
    if not isinstance(data, ImageFiles):
        return npz.load_training_images(found, data)
    if not found.is_dir():
        raise ConfigError(f"{path}: no such folder; expected one, as {data.name} is in files")
    return folder.load_training_images(found, data)
