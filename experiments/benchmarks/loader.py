"""What most programs make batches with, for comparison: torchvision, one image after the other."""

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from mtkd_env.data import ImageData, ImageFiles, Split
from mtkd_env.data.decoding import default_workers
from mtkd_env.data.image_files import FileSplit

# Channels of images that Pillow knows.
CHANNELS = (1, 3)


class PillowImages(Dataset[tuple[Tensor, int]]):
    """Randomly cropped and mirrored, normalised images, made one by one with Pillow.

    Args:
        data: The dataset, for its normalisation and augmentation; of one channel or three.
        split: The images.
    """

    def __init__(self, data: ImageData, split: Split) -> None:
        self._split = split
        self._transform = v2.Compose(
            [
                v2.RandomCrop(data.image_shape[1:], padding=data.crop_padding),
                v2.RandomHorizontalFlip(0.5 if data.flip else 0.0),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(data.mean.tolist(), data.std.tolist()),
            ]
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self._split)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        """An image and its class."""
        pixels = self._split.images[position].permute(1, 2, 0).squeeze(-1)
        image: Tensor = self._transform(Image.fromarray(pixels.numpy()))
        return image, int(self._split.targets[position])


def loaded_batches(
    data: ImageData, split: Split, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches on a device, made in this process, where its clock sees them."""
    loader = DataLoader(PillowImages(data, split), batch_size, shuffle=True, drop_last=True)
    while True:
        for images, targets in loader:
            yield images.to(device), targets.to(device)


class PillowFiles(Dataset[tuple[Tensor, int]]):
    """Images in files, decoded, randomly cropped, resized and mirrored one by one with Pillow.

    Args:
        data: The dataset, for the size of its images.
        split: The files.
    """

    def __init__(self, data: ImageFiles, split: FileSplit) -> None:
        self._split = split
        crop = v2.RandomResizedCrop(data.image_size)
        self._transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def __len__(self) -> int:
        """Number of images."""
        return len(self._split)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        """An image and its class."""
        (path,) = self._split.paths([position])
        with Image.open(path) as image:
            pixels: Tensor = self._transform(image.convert("RGB"))
        return pixels, int(self._split.targets[position])


def file_loader(
    data: ImageFiles, split: FileSplit, batch_size: int
) -> DataLoader[tuple[Tensor, int]]:
    """Torchvision's usual loader of files, with as many workers as the dataset's own; in bytes."""
    workers = default_workers() if data.workers is None else data.workers
    files = PillowFiles(data, split)
    return DataLoader(files, batch_size, shuffle=True, drop_last=True, num_workers=workers)
