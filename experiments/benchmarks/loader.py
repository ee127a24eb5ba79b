"""What most programs make batches with, for comparison: torchvision, one image after the other."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from mtkd_env.data import ImageData, ImageFiles
from mtkd_env.data.decoding import default_workers
from mtkd_env.data.image_files import FileSplit
from mtkd_env.data.split import Split

# Channels of images that Pillow knows.
CHANNELS = (1, 3)


class PillowImages(Dataset[tuple[Tensor, int]]):
    """Images that are read and made into tensors one by one with Pillow.

    Args:
        read: Gives the image of a position.
        targets: The classes.
    """

    def __init__(self, read: Callable[[int], Tensor], targets: Tensor) -> None:
        self._read, self._targets = read, targets

    def __len__(self) -> int:
        """Number of images."""
        return len(self._targets)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        """An image and its class."""
        return self._read(position), int(self._targets[position])


def pillow_images(data: ImageData, split: Split) -> PillowImages:
    """Randomly cropped and mirrored, normalised images; of one channel or three."""
    transform = v2.Compose(
        [
            v2.RandomCrop(data.image_shape[1:], padding=data.crop_padding),
            v2.RandomHorizontalFlip(0.5 if data.flip else 0.0),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data.mean.tolist(), data.std.tolist()),
        ]
    )

    def read(position: int) -> Tensor:
        pixels = split.images[position].permute(1, 2, 0).squeeze(-1).numpy()
        image: Tensor = transform(Image.fromarray(pixels))
        return image

    return PillowImages(read, split.targets)


def loaded_batches(
    data: ImageData, split: Split, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches on a device, made in this process, where its clock sees them."""
    loader = DataLoader(pillow_images(data, split), batch_size, shuffle=True, drop_last=True)
    while True:
        for images, targets in loader:
            yield images.to(device), targets.to(device)


def _decoded(split: FileSplit, transform: Callable[..., Tensor], position: int) -> Tensor:
    (path,) = split.paths([position])
    with Image.open(path) as image:
        return transform(image.convert("RGB"))


def file_loader(
    data: ImageFiles, split: FileSplit, batch_size: int
) -> DataLoader[tuple[Tensor, int]]:
    """Torchvision's usual loader of files, with as many workers as the dataset's own; in bytes."""
    workers = default_workers() if data.workers is None else data.workers
    # Decoded, randomly cropped, resized and mirrored.
    crop = v2.RandomResizedCrop(data.image_size)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    files = PillowImages(partial(_decoded, split, transform), split.targets)
    return DataLoader(files, batch_size, shuffle=True, drop_last=True, num_workers=workers)
