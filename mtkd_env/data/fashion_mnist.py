"""Fashion-MNIST (Xiao et al., 2017): 70,000 grey images of clothes, 28x28 pixels, 10 classes."""

import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

from mtkd_env.data.dataset import ImageData
from mtkd_env.data.download import found_root, read
from mtkd_env.errors import ConfigError

FOLDER = "FashionMNIST/raw"
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def load(
    root: str | Path | None = None,
    download: bool = False,
    flip: bool = True,
    crop_padding: int | None = None,
) -> ImageData:
    """60,000 training and 10,000 test images, which are cropped and mirrored at random.

    Args:
        root: Folder that holds `FashionMNIST/raw`; `data_folder()` by default.
        download: Whether to download what is missing.
        flip: Whether training images are mirrored.
        crop_padding: Pixels by which they are moved at most; by default an eighth of their side.

    Raises:
        ConfigError: Missing or damaged files, or a failed download; names the path.
    """
    from torchvision.datasets import FashionMNIST

    folder = found_root(root)
    train, test = read("fashion_mnist", FashionMNIST, FOLDER, _defects, folder, download=download)
    try:
        return ImageData(
            name="fashion_mnist",
            x_train=train.data[:, None].contiguous(),
            y_train=train.targets,
            x_test=test.data[:, None].contiguous(),
            y_test=test.targets,
            num_classes=len(FashionMNIST.classes),
            flip=flip,
            crop_padding=train.data.shape[1] // 8 if crop_padding is None else crop_padding,
            class_names=tuple(FashionMNIST.classes),
        )
    except ConfigError as error:
        raise ConfigError(f"{folder / FOLDER}: {error}") from error


def _defects(root: Path) -> Iterator[tuple[Path, str]]:
    """Files that are not there or are not as long as they say; these have no checksums."""
    for file in FILES:
        path = root / FOLDER / file
        if not path.is_file():
            yield path, "no such file"
        elif path.stat().st_size != _length(path):
            yield path, "damaged, it is not as long as it says"


def _length(path: Path) -> int:
    """Bytes that a file of the IDX format says it has: 4, 4 for each axis, 1 for each entry."""
    with path.open("rb") as file:
        header = file.read(4)
        axes = header[-1] if len(header) == 4 else 0
        shape = file.read(4 * axes)
    if not axes or len(shape) < 4 * axes:
        return -1
    return 4 + len(shape) + prod(struct.unpack(f">{axes}I", shape))
