"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 60,000 colour images of 32x32 pixels."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtkd_env.data.dataset import ImageData
from mtkd_env.data.download import found_root, read

# The usual augmentation: random crops of the image in a frame of 4 zeros, and mirrors.
CROP_PADDING = 4


def load(classes: int, root: str | Path | None = None, download: bool = False) -> ImageData:
    """50,000 training and 10,000 test images of 10 classes, or of 100 (fine) ones.

    Args:
        classes: Their number.
        root: Folder that holds `cifar-10-batches-py` or `cifar-100-python`; `data_folder()` by
            default.
        download: Whether to download what is missing.

    Raises:
        ConfigError: Missing or damaged files, or a failed download; names the path.
    """
    from torchvision import datasets

    name, kind = f"cifar{classes}", getattr(datasets, f"CIFAR{classes}")

    def defects(folder: Path) -> Iterator[tuple[Path, str]]:
        """Files whose checksum, which torchvision checks before it reads them, is another."""
        listed = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        for file, checksum in listed:
            path = folder / kind.base_folder / file
            if not path.is_file():
                yield path, "no such file"
            elif not datasets.utils.check_integrity(path, checksum):
                yield path, "damaged, its checksum is not that of the published file"

    folder = found_root(root)
    train, test = read(name, kind, kind.base_folder, defects, folder, download=download)
    return ImageData(
        name=name,
        x_train=_images(train),
        y_train=torch.tensor(train.targets),
        x_test=_images(test),
        y_test=torch.tensor(test.targets),
        num_classes=len(train.classes),
        flip=True,
        crop_padding=CROP_PADDING,
        class_names=tuple(train.classes),
    )


def _images(part: Any) -> Tensor:
    """Images (N, K, H, W); torchvision has them as (N, H, W, K)."""
    return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
