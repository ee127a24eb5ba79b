"""Tiny datasets in the formats of the real ones, written to disk.

Checksums are torchvision's business: a test puts those of its own files in their place.
"""

import gzip
import hashlib
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

WORDNET_IDS = ("n01440764", "n01443537", "n01484850", "n01491361")
IMAGE_SIZE = 24
RESIZE = 28

# The labels of CIFAR's pickles.
LABELS: dict[Any, str] = {CIFAR10: "labels", CIFAR100: "fine_labels"}


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def write_cifar(root: Path, kind: Any, patch: pytest.MonkeyPatch) -> None:
    """CIFAR's pickles with images enough for every class in both parts."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    classes = 10 if kind is CIFAR10 else 100
    for part in ("train_list", "test_list"):
        listed = []
        for number, (name, _) in enumerate(getattr(kind, part)):
            labels = [(3 * row) % classes for row in range(classes)]
            content = {"data": draw(len(name) + number, classes, 3072), LABELS[kind]: labels}
            (folder / name).write_bytes(pickle.dumps(content))
            listed.append([name, md5(folder / name)])
        patch.setattr(kind, part, listed)
    meta = folder / kind.meta["filename"]
    names = [f"class {label}" for label in range(classes)]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: names}))
    patch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})


def write_fashion_mnist(root: Path) -> None:
    """Fashion-MNIST's four files: 40 and 20 images."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        images = struct.pack(">4I", 0x803, count, 28, 28) + draw(count, count, 28, 28).tobytes()
        labels = struct.pack(">2I", 0x801, count) + bytes(row % 10 for row in range(count))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def write_images(
    root: Path,
    *,
    parts: tuple[str, ...] = ("train", "val"),
    classes: tuple[str, ...] = ("cat", "dog", "fox"),
    count: int = 9,
    suffix: str = "png",
) -> None:
    """`count` images of different sizes for each class and part."""
    for number, part in enumerate(parts):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for row in range(count):
                pixels = draw(100 * number + 10 * label + row, 30 + row, 40 - row, 3)
                Image.fromarray(pixels).save(folder / f"{row}.{suffix}")


def write_npz(root: Path) -> None:
    """A user's archive: 60 and 20 colour images of 4 classes."""
    arrays = {
        "x_train": draw(0, 60, 8, 10, 3),
        "y_train": np.arange(60) % 4,
        "x_test": draw(1, 20, 8, 10, 3),
        "y_test": np.arange(20) % 4,
    }
    np.savez(root / "mine.npz", **arrays)


Arguments = dict[str, Any]
FILES = {"image_size": IMAGE_SIZE, "resize": RESIZE, "workers": 0}


def _digits(*_: Any) -> Arguments:
    return {}


def _npz(root: Path, _: pytest.MonkeyPatch) -> Arguments:
    write_npz(root)
    return {"path": root / "mine.npz"}


def _cifar(kind: Any, root: Path, patch: pytest.MonkeyPatch) -> Arguments:
    write_cifar(root, kind, patch)
    return {"root": root}


def _fashion_mnist(root: Path, _: pytest.MonkeyPatch) -> Arguments:
    write_fashion_mnist(root)
    return {"root": root}


def _imagenet(root: Path, _: pytest.MonkeyPatch) -> Arguments:
    write_images(root, classes=WORDNET_IDS, suffix="JPEG")
    return {"root": root, **FILES}


def _folder(root: Path, _: pytest.MonkeyPatch) -> Arguments:
    write_images(root, parts=("train", "test"))
    return {"root": root, **FILES}


# For each dataset: writes a tiny one and gives the arguments that load it.
FAKES: dict[str, Callable[[Path, pytest.MonkeyPatch], Arguments]] = {
    "digits": _digits,
    "npz": _npz,
    "cifar10": partial(_cifar, CIFAR10),
    "cifar100": partial(_cifar, CIFAR100),
    "fashion_mnist": _fashion_mnist,
    "imagenet": _imagenet,
    "folder": _folder,
}
STREAMED = ("imagenet", "folder")
IN_MEMORY = tuple(name for name in FAKES if name not in STREAMED)


# What a download finds.


def pack_cifar(root: Path, kind: Any, served: Path, patch: pytest.MonkeyPatch) -> None:
    """Moves CIFAR's files into the archive that is downloaded."""
    archive = served / kind.filename
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(root / kind.base_folder, kind.base_folder)
    patch.setattr(kind, "tgz_md5", md5(archive))


def pack_fashion_mnist(root: Path, served: Path, patch: pytest.MonkeyPatch) -> None:
    """Moves Fashion-MNIST's files into the archives that are downloaded."""
    resources = []
    for file in sorted((root / "FashionMNIST" / "raw").iterdir()):
        archive = served / f"{file.name}.gz"
        archive.write_bytes(gzip.compress(file.read_bytes(), mtime=0))
        resources.append((archive.name, md5(archive)))
    patch.setattr(FashionMNIST, "resources", resources)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of a folder's files on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder)) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
