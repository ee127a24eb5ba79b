"""Datasets and the batches made of them; to add one is a file and a line in the table.

Data know neither what is trained on them nor how.

- `digits.py`, `npz.py`, `cifar.py`, `fashion_mnist.py`, `folder.py`, `own.py` (a program's own, of
  which `live.py` draws anew what is random): where images are from; `download.py` fetches some.
- `dataset.py`: what a dataset is, and images in memory; `image_files.py`: those in files, which
  `reading.py` reads and `decoding.py` makes views of; `preprocessing.py`: one image unaugmented.
- `split.py`: who learns from which images; `views.py` with `augment.py`, and `stream.py`: the
  batches made of them.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

from mtkd_env.data import cifar, digits, fashion_mnist, folder, npz, own
from mtkd_env.data.augment import Mixing as Mixing
from mtkd_env.data.dataset import ImageData as ImageData
from mtkd_env.data.dataset import ImageSet as ImageSet
from mtkd_env.data.image_files import ImageFiles as ImageFiles
from mtkd_env.data.split import LabelSpec
from mtkd_env.data.stream import BatchStream as BatchStream
from mtkd_env.data.views import ViewSet
from mtkd_env.errors import (
    ConfigError,
    check_arguments,
    check_at_least_1,
    check_not_negative,
)
from mtkd_env.files import user_path, whole_path
from mtkd_env.imports import Kind, Named, name_of
from mtkd_env.options import Options, typed

DATASETS: dict[str, Callable[..., ImageSet[Any]]] = {
    "digits": digits.load,
    "npz": npz.load,
    "cifar10": partial(cifar.load, 10),
    "cifar100": partial(cifar.load, 100),
    "fashion_mnist": fashion_mnist.load,
    "imagenet": folder.loader(folder.IMAGENET),
    "folder": folder.loader(folder.FOLDER),
}

DATASET: Kind[Callable[..., ImageSet[Any]]] = Kind(
    DATASETS, "dataset", own.fits, own.EXPECTED, own.loader
)


@dataclass(frozen=True)
class DataSpec(Options):
    """The images, and how the student's batches are made of them.

    Attributes:
        dataset: Name of a dataset. Or one's own: a map-style torch Dataset of
            (image, label), of which test_fraction takes the test images; a dict of such for train,
            test and val; or a class or function that gives either, as `module:name` or as an
            object. It is read into memory, once; if it draws its images at random, those to train
            on are read again whenever they are seen.
        arguments: Keyword arguments of the dataset, such as path for npz; those of one's own class
            or function, or name, flip, crop_padding, num_classes and workers of images that are
            there.
        batch_size: B, images in a batch; also the number of sub-environments.
        val_fraction: Share of the (labelled) training images to hold out for choices, the split
            val.
        test_fraction: Share of every class of the training images to report on, for a dataset
            without test images; the same ones in all runs.
        augmentation: How the student's and the teachers' images are changed at random: of images in
            memory none, crop_flip, randaugment or trivialaugment; of images in files none, standard
            or deit. By default crop_flip and standard.
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

    dataset: Named = "digits"
    arguments: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    val_fraction: float = 0.0
    test_fraction: float = 0.0
    augmentation: str | None = None
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
        load = DATASET.find(self.dataset)
        check_arguments(load, self.arguments, "arguments")
        arguments = typed(load, self.arguments, "arguments")
        parameters = inspect.signature(load).parameters
        for key in arguments.keys() & parameters.keys():
            # So that a run's configuration means the same from another working directory.
            if isinstance(arguments[key], str) and Path in get_args(parameters[key].annotation):
                arguments[key] = whole_path(arguments[key])
        object.__setattr__(self, "arguments", arguments)
        check_at_least_1(
            batch_size=self.batch_size, train_size=1 if self.train_size is None else self.train_size
        )
        check_not_negative(val_fraction=self.val_fraction, test_fraction=self.test_fraction)
        _ = self.mixing, self.view_set, self.labels

    def load(self) -> ImageSet[Any]:
        """The dataset, with test images and the augmentation.

        Raises:
            ConfigError: Images that cannot be read, an argument that is missing, test images that
                are missing or there already, or an augmentation that the dataset does not have.
        """
        load = DATASET.find(self.dataset)
        try:
            inspect.signature(load).bind(**self.arguments)
        except TypeError as error:
            raise ConfigError(f"dataset '{name_of(self.dataset)}': {error}") from error
        images = load(**self.arguments).tested(self.test_fraction)
        return images if self.augmentation is None else images.augmented(self.augmentation)

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
