"""Files of images: which of a folder's count, and what one of them shows, in 8 bits a channel."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from mtkd_env.errors import ConfigError

# What programs put between a user's own folders, beside names that begin with a dot.
NOT_THE_USERS = ("__MACOSX", "@eaDir", "lost+found")

# How the names of images end.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Formats that are read, whatever a file's name ends in; Pillow starts other programs for some more.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# Tags of TIFF (revision 6.0): bits of each channel; whether 0 is white (0) or black; whether the
# channels of a pixel lie together (1) or those of the image (2).
BITS, PHOTOMETRIC, PLANAR = 258, 262, 284

# Tag of EXIF, and its values for images that lie on their side.
ORIENTATION, ON_THEIR_SIDE = 274, (5, 6, 7, 8)

# What JPEG's decoder can divide width and height by while it decodes; the largest first.
DIVISORS = (8, 4, 2)

# Formats whose grey values of more than 8 bits Pillow gives as 32-bit integers from 0 to 65535.
SCALED_TO_16_BITS = ("PNG", "PPM")

# Levels of 16 bits for each of 8: 65535 / 255.
LEVELS = 257


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not the user's: `.ipynb_checkpoints`, `._a.png`, `__MACOSX`."""
    return name.startswith(".") or name in NOT_THE_USERS


def visible(folder: Path) -> list[Path]:
    """The files and folders in a folder, in the order of their names, without hidden ones."""
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))


def image_files(folder: Path) -> Iterator[str]:
    """The images in a folder and those below it, as names relative to it, in a fixed order.

    Hidden files, and what is in hidden folders, are left out; links to folders are followed.
    """
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(files):
            if name.lower().endswith(EXTENSIONS) and not is_hidden(name):
                yield (Path(root) / name).relative_to(folder).as_posix()


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """An image file, of which the pixels are not read yet, and may be in the block."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            tags = _tags(image)
            # Pillow takes those for other pixels, or finds them truncated.
            if tags.get(PLANAR) == 2 and max(tags.get(BITS, (8,))) > 8:
                raise ValueError("Pillow cannot read channels of more than 8 bits that lie apart")
            yield image
    # Readers of damaged files raise whatever they happen upon.
    except Exception as error:
        raise ConfigError(f"{path}: cannot be read as an image ({error})") from error


def open_image(path: str | Path) -> Image.Image:
    """An image file, read as it is.

    Raises:
        ConfigError: It cannot be read; names it.
    """
    with _opened(path) as image:
        image.load()
    return image


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """The tags of a TIFF; none of other files."""
    return getattr(image, "tag_v2", {})


@dataclass(frozen=True)
class Part:
    """A part of an image, from left and top until before right and bottom [pixels].

    Attributes:
        needed: The least height and width [pixels] that will do; by default all that it has.
    """

    left: int
    top: int
    right: int
    bottom: int
    needed: int | None = None

    @property
    def divisor(self) -> int:
        """What its height and width can be divided by."""
        shorter = min(self.right - self.left, self.bottom - self.top)
        fitting = (by for by in DIVISORS if self.needed and shorter // by >= self.needed)
        return next(fitting, 1)

    def of(self, image: Image.Image, divisor: int = 1) -> Image.Image:
        """The part of an image that is so many times smaller than the one it was chosen from."""
        right, bottom = (-(-one // divisor) for one in (self.right, self.bottom))
        return image.crop((self.left // divisor, self.top // divisor, right, bottom))


def read_image(
    path: str | Path,
    *,
    exif: bool = False,
    choose: Callable[[tuple[int, int]], Part] | None = None,
) -> Image.Image:
    """The first picture of a file in colours of 8 bits a channel; what is transparent is not.

    Integers of 16 bits are scaled by their range, floats from that of 0 to 1. A part of a JPEG may
    be smaller, but no smaller than needed: it is then decoded at a half, a quarter or an eighth of
    its height and width, which saves most of the time that large photographs take. The part so
    begins and ends up to a pixel of the smaller image further out.

    Args:
        path: The file.
        exif: Whether it is turned as its EXIF data says.
        choose: Gives the part that is wanted, of width and height, after that; called once.

    Raises:
        ConfigError: It cannot be read, or its numbers have no known range; names it.
    """
    with _opened(path) as image:
        if choose is None or not isinstance(image, JpegImageFile):
            image.load()
            whole = colors(image, exif=exif)
            return whole if choose is None else choose(whole.size).of(whole)
        on_its_side = exif and image.getexif().get(ORIENTATION) in ON_THEIR_SIDE
        part = choose(image.size[::-1] if on_its_side else image.size)
        smaller = (image.width // part.divisor, image.height // part.divisor)
        divisor = part.divisor if image.draft(None, smaller) is not None else 1
        image.load()
        return part.of(colors(image, exif=exif), divisor)


def colors(image: Image.Image, *, exif: bool = False) -> Image.Image:
    """An image in colours of 8 bits a channel; see `read_image`.

    Raises:
        ValueError: Its numbers have no known range.
    """
    if exif:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        grey = _bytes(image)
        # Of bytes, Pillow has seen to it.
        inverted = _tags(image).get(PHOTOMETRIC) == 0
        return Image.fromarray(~grey if inverted else grey).convert("RGB")
    if image.mode in {"P", "La", "RGBa"}:
        # Pillow takes the colours of a palette that is partly transparent, and colours that are
        # multiplied by their transparency, no other way.
        image = image.convert("RGBA" if image.mode != "La" else "LA")
    # Pillow would copy what is in that mode already.
    return image if image.mode == "RGB" else image.convert("RGB")


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    """An image as bytes (K, H, W): of one channel if it is grey, else of three; see `colors`.

    Raises:
        ValueError: The range of its numbers is not known.
    """
    shown = np.asarray(colors(image)).transpose(2, 0, 1)
    grey = image.mode in {"1", "L", "F"} or image.mode.startswith("I")
    return np.ascontiguousarray(shown[:1] if grey else shown)


def _bytes(image: Image.Image) -> NDArray[np.uint8]:
    """Grey values of 16 bits or of floats, as bytes; a `ValueError` if their range is not known."""
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SCALED_TO_16_BITS):
        return ((values.astype(np.int64) + LEVELS // 2) // LEVELS).astype(np.uint8)
    if image.mode == "F" and ((values >= 0) & (values <= 1)).all():
        return np.rint(255 * values).astype(np.uint8)
    found = f"{values.dtype} from {values.min()} to {values.max()}"
    raise ValueError(f"expected 8 or 16 bits a channel, or floats from 0 to 1, found {found}")
