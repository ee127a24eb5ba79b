import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torchvision.datasets.folder import pil_loader

from mtkd_env.data.reading import (
    BITS,
    ORIENTATION,
    PHOTOMETRIC,
    PLANAR,
    Part,
    image_files,
    is_hidden,
    read_image,
    visible,
)
from mtkd_env.errors import ConfigError
from tiny import load_dataset

# Every value of 16 bits, and what each is in 8.
RAMP = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
SCALED = np.rint(RAMP / 257).astype(np.uint8)

COLORS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def grey(path: Path) -> np.ndarray:
    """The values of a file that all channels share."""
    image = read_image(path)
    assert image.mode == "RGB"
    channels = np.asarray(image)
    assert (channels == channels[..., :1]).all()
    return channels[..., 0]


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif", "ramp.pgm"])
def test_sixteen_bits_are_scaled_by_their_range(name: str, tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / name)
    assert (grey(tmp_path / name) == SCALED).all()


def test_the_order_of_bytes_does_not_matter(tmp_path: Path) -> None:
    swapped = Image.frombytes("I;16B", RAMP.shape, RAMP.astype(">u2").tobytes())
    swapped.save(tmp_path / "ramp.tif")
    assert (grey(tmp_path / "ramp.tif") == SCALED).all()


def test_floats_from_zero_to_one_are_scaled(tmp_path: Path) -> None:
    Image.fromarray((RAMP / (2**16 - 1)).astype(np.float32)).save(tmp_path / "ramp.tif")
    assert (grey(tmp_path / "ramp.tif") == SCALED).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_where_zero_is_white_it_is_read_as_white(bits: int, tmp_path: Path) -> None:
    tags = ImageFileDirectory_v2()
    tags[PHOTOMETRIC] = 0
    values = RAMP if bits == 16 else SCALED
    Image.fromarray(values).save(tmp_path / "ramp.tif", tiffinfo=tags)
    # Pillow's writer inverts bytes itself, and no other values.
    assert (grey(tmp_path / "ramp.tif") == (SCALED if bits == 8 else 255 - SCALED)).all()


@pytest.mark.parametrize(
    ("values", "found"),
    {
        "levels": (RAMP.astype(np.float32), r"float32 from 0\.0 to 65535\.0"),
        "a NaN": (np.full((8, 8), np.nan, np.float32), "float32 from nan to nan"),
        "negative": (-np.ones((8, 8), np.float32), r"float32 from -1\.0"),
        "32 bits": (RAMP.astype(np.int32), "int32 from 0 to 65535"),
    }.values(),
)
def test_numbers_of_an_unknown_range_are_refused(
    values: np.ndarray, found: str, tmp_path: Path
) -> None:
    Image.fromarray(values).save(tmp_path / "strange.tif")
    with pytest.raises(ConfigError, match=rf"strange\.tif: cannot be .* 8 or 16 bits .*{found}"):
        read_image(tmp_path / "strange.tif")


def test_channels_that_pillow_mixes_up_are_refused(tmp_path: Path) -> None:
    path, planes = tmp_path / "planes.tif", RAMP.astype("<u2").tobytes() * 3
    tags = ImageFileDirectory_v2(b"II*\0\x08\0\0\0")
    tags[256], tags[257], tags[BITS] = 256, 256, (16, 16, 16)
    tags[259], tags[PHOTOMETRIC], tags[277], tags[PLANAR] = 1, 2, 3, 2
    size = len(planes) // 3
    tags[273], tags[278], tags[279] = (8, 8 + size, 8 + 2 * size), 256, (size, size, size)
    begin = 8 + len(planes)
    path.write_bytes(b"II*\0" + struct.pack("<L", begin) + planes + tags.tobytes(begin))
    with pytest.raises(ConfigError, match=r"planes\.tif: .*more than 8 bits that lie apart"):
        read_image(path)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *(("1", f"a.{end}") for end in ("png", "tif", "bmp")),
        *(("L", f"a.{end}") for end in ("png", "jpg", "pgm", "webp")),
        *(("P", f"a.{end}") for end in ("png", "gif", "bmp")),
        *(("LA", "a.png"), ("PA", "a.tif"), ("RGBA", "a.png"), ("RGBA", "a.tif")),
        *(("CMYK", "a.jpg"), ("CMYK", "a.tif"), ("YCbCr", "a.tif"), ("RGB", "a.ppm")),
    ],
)
def test_bytes_are_read_as_by_other_programs(mode: str, name: str, tmp_path: Path) -> None:
    image = Image.fromarray(COLORS)
    image = image.convert("RGBA").convert(mode) if mode == "PA" else image.convert(mode)
    image.save(tmp_path / name)
    assert (np.asarray(read_image(tmp_path / name)) == pil_loader(tmp_path / name)).all()


def test_colours_of_a_palette_stay_where_it_is_transparent(tmp_path: Path) -> None:
    image = Image.fromarray(COLORS).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert (np.asarray(read_image(tmp_path / "a.png")) == np.asarray(image.convert("RGB"))).all()


def test_programs_that_other_formats_start_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ConfigError, match=r"a\.png: cannot be read as an image"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.gif", "a.bmp", "a.webp", "a.ppm"])
def test_damaged_images_are_read_or_named(name: str, tmp_path: Path) -> None:
    Image.fromarray(COLORS).save(tmp_path / name)
    whole, generator = (tmp_path / name).read_bytes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole[: generator.randint(0, len(whole))])
        for _ in range(generator.randint(0, 8) if damaged else 0):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (tmp_path / name).write_bytes(damaged)
        message = ""
        try:
            assert read_image(tmp_path / name).mode == "RGB"
        except ConfigError as error:
            message = str(error)
        assert not message or message.startswith(f"{tmp_path / name}: cannot be read as an image")


# Folders.

HIDDEN = (".ipynb_checkpoints", ".DS_Store", "._a.png", "__MACOSX", "@eaDir", ".git")


@pytest.mark.parametrize("name", HIDDEN)
def test_what_programs_leave_behind_is_hidden(name: str) -> None:
    assert is_hidden(name)
    assert not is_hidden(name.strip("._@") or "x")


@pytest.fixture
def littered(tmp_path: Path) -> Callable[..., Path]:
    """Writes images of two classes into folders, with what other programs leave between them."""

    def write(*parts: str) -> Path:
        for part in parts:
            for folder in ("cat", "dog/deep", *HIDDEN, f"cat/{HIDDEN[0]}", f"dog/deep/{HIDDEN[3]}"):
                place = tmp_path / part / folder
                place.mkdir(parents=True)
                for name in ("a.png", "._a.png", "Thumbs.db"):
                    Image.fromarray(COLORS).save(place / name, format="PNG")
        return tmp_path

    return write


def test_the_images_of_a_folder_are_those_that_a_user_sees(littered: Callable[..., Path]) -> None:
    folder = littered("train") / "train"
    assert [path.name for path in visible(folder)] == ["cat", "dog"]
    assert list(image_files(folder)) == ["cat/a.png", "dog/deep/a.png"]


@pytest.mark.parametrize("dataset", ["folder", "imagenet"])
def test_hidden_folders_are_no_classes_and_hold_no_images(
    dataset: str, littered: Callable[..., Path]
) -> None:
    data: Any = load_dataset(dataset, root=littered("train", "val"))
    assert data.class_names == ("cat", "dog")
    assert list(data.train.names) == list(data.test.names) == ["cat/a.png", "dog/deep/a.png"]
    assert data.train.targets.tolist() == [0, 1]


def test_images_behind_links_are_found(tmp_path: Path, littered: Callable[..., Path]) -> None:
    folder = littered("train") / "train"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cat").symlink_to(folder / "cat")
    assert list(image_files(tmp_path / "linked")) == ["cat/a.png"]


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says_if_asked(
    name: str, orientation: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLORS[:9]).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as image:
        stored, turned = np.asarray(image), np.asarray(ImageOps.exif_transpose(image))
    for asked, expected in ((False, stored), (True, turned)):
        assert (np.asarray(read_image(tmp_path / name, exif=asked)) == expected).all()


@pytest.mark.parametrize(
    ("side", "needed", "divisor"),
    [(100, None, 1), (100, 51, 1), (100, 50, 2), (100, 25, 4), (100, 12, 8), (100, 1, 8)],
)
def test_jpeg_is_decoded_as_small_as_its_part_may_become(
    side: int, needed: int | None, divisor: int, tmp_path: Path
) -> None:
    Image.fromarray(RAMP.astype(np.uint8)).convert("RGB").save(tmp_path / "a.jpg")
    part = Part(16, 40, 16 + side, 40 + side, needed)
    assert part.divisor == divisor
    found = read_image(tmp_path / "a.jpg", choose=lambda _: part)
    whole = read_image(tmp_path / "a.jpg")
    # Up to one pixel more, where the part does not end with one.
    assert {-(-side // divisor), -(-side // divisor) + 1} >= set(found.size)
    assert min(found.size) >= (needed or side)
    if divisor == 1:
        assert (np.asarray(found) == np.asarray(whole.crop((16, 40, 116, 140)))).all()
    for name in ("a.png", "a.mpo"):
        frames = {"save_all": True, "append_images": [whole]} if name == "a.mpo" else {}
        whole.save(tmp_path / name, **frames)
        size = read_image(tmp_path / name, choose=lambda _: part).size
        assert size == (found.size if name == "a.mpo" else (side, side))


def test_part_is_chosen_from_the_image_as_it_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for name in ("a.jpg", "a.png", "a.tif"):
        Image.fromarray(np.tile(COLORS, (2, 4, 1))).save(tmp_path / name, exif=exif)
        sizes: list[tuple[int, int]] = []

        def choose(size: tuple[int, int], sizes: list[tuple[int, int]] = sizes) -> Part:
            sizes.append(size)
            return Part(1, 30, 30, 63)

        found = read_image(tmp_path / name, choose=choose, exif=True)
        assert sizes == [(32, 64)]
        turned = read_image(tmp_path / name, exif=True).crop((1, 30, 30, 63))
        assert (np.asarray(found) == np.asarray(turned)).all()


def test_part_of_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"a\.jpg: cannot be read as an image"):
        read_image(tmp_path / "a.jpg", choose=lambda size: Part(0, 0, *size))
