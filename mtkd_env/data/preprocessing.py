"""What is made of an image before a network sees it, without augmentation."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from mtkd_env.data.augment import normalize
from mtkd_env.data.decoding import central_view
from mtkd_env.data.reading import colors, read_image
from mtkd_env.errors import ConfigError
from mtkd_env.options import Options

# Of pictures, by their number of channels.
MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Preprocessing(Options):
    """What is made of an image before a network sees it, without augmentation.

    Attributes:
        image_shape: Channels, height and width [pixels] of what the network sees.
        mean: Mean of each channel in units of [0, 1], which is subtracted.
        std: Standard deviation of each channel, which is divided by.
        resize: Shorter side [pixels] that images are resized to before their central square is
            taken; by default they are resized so that they just cover what the network sees, as
            images of that size are already.
        interpolation: How they are resized: bilinear or bicubic.
        exif: Whether they are turned as their EXIF data says.
    """

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    interpolation: str = "bilinear"
    exif: bool = False

    def __call__(self, image: Image.Image | str | Path) -> Float32[Tensor, "K H W"]:
        """An image, or that of a file, as the network sees it.

        Raises:
            ConfigError: A file that cannot be read, or a number of channels that pictures lack.
        """
        return self.normalized(self.pixels(image).unsqueeze(0)).squeeze(0)

    def pixels(self, image: Image.Image | str | Path) -> UInt8[Tensor, "K H W"]:
        """An image, or that of a file, as bytes of the size that the network sees; see above."""
        channels, height, width = self.image_shape
        if channels not in MODES:
            raise ConfigError(f"images with {channels} channels are not read from pictures")
        if isinstance(image, Image.Image):
            picture = colors(image, exif=self.exif)
        else:
            picture = read_image(image, exif=self.exif)
        picture = picture.convert(MODES[channels])
        if self.resize is not None:
            return central_view(height, self.resize, self.interpolation)(picture)
        method = Image.Resampling[self.interpolation.upper()]
        values = torch.from_numpy(np.array(ImageOps.fit(picture, (width, height), method)))
        # A grey picture has no axis of channels.
        return values.reshape(height, width, channels).permute(2, 0, 1)

    def normalized(self, images: UInt8[Tensor, "B K H W"]) -> Float32[Tensor, "B K H W"]:
        """Images of the size that the network sees, normalised, where they are."""
        mean, std = (torch.tensor(one, device=images.device) for one in (self.mean, self.std))
        return normalize(images, mean, std)
