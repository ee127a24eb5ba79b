import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

from fake_datasets import (
    FAKES,
    IN_MEMORY,
    STREAMED,
    WORDNET_IDS,
    draw,
    pack_cifar,
    pack_fashion_mnist,
    served,
    write_cifar,
    write_fashion_mnist,
    write_images,
)
from mtkd_env.data import DATASETS, ImageData, ImageFiles, ImageSet
from mtkd_env.data.download import data_folder
from mtkd_env.data.folder import _names
from mtkd_env.errors import ConfigError
from mtkd_env.registration import ENV_NAMES
from tiny import load_dataset

DOWNLOADED = ("cifar10", "cifar100", "fashion_mnist")
KINDS: dict[str, Any] = {"cifar10": CIFAR10, "cifar100": CIFAR100, "fashion_mnist": FashionMNIST}

# A file of each, relative to the root.
FILES = {
    "cifar10": "cifar-10-batches-py/data_batch_3",
    "cifar100": "cifar-100-python/train",
    "fashion_mnist": "FashionMNIST/raw/t10k-images-idx3-ubyte",
}


@pytest.fixture(params=DATASETS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Loads a tiny dataset of the name."""
    arguments = FAKES[name](tmp_path, monkeypatch)
    return lambda **changes: load_dataset(name, **{**arguments, **changes})


def test_every_dataset_has_a_tiny_one_and_an_environment() -> None:
    assert set(FAKES) == set(DATASETS) == set(ENV_NAMES.values())


def test_dataset_describes_its_images(load: Callable[[], ImageSet[Any]], name: str) -> None:
    data = load()
    assert isinstance(data, ImageData if name in IN_MEMORY else ImageFiles)
    splits = data.split()
    shape = data.pixels(splits.train, torch.tensor([0, 3])).shape
    assert shape == (2, *data.image_shape)
    for split in (splits.train, splits.test):
        assert split.targets.unique().tolist() == list(range(data.num_classes))
        assert split.index.tolist() == list(range(len(split)))
    assert data.mean.shape == data.std.shape == data.image_shape[:1]
    assert len(data.class_names) in {0, data.num_classes}


def test_dataset_is_the_same_every_time(load: Callable[[], ImageSet[Any]]) -> None:
    assert load().digest == load().digest


# Datasets that torchvision reads.


@pytest.mark.parametrize("name", DOWNLOADED, indirect=True)
def test_class_names_are_the_datasets_own(load: Callable[[], ImageSet[Any]], name: str) -> None:
    names = load().class_names
    assert names[-1] == {"fashion_mnist": "Ankle boot"}.get(name, f"class {len(names) - 1}")


@pytest.mark.parametrize(
    ("name", "shape", "classes", "padding"),
    [
        ("cifar10", (3, 32, 32), 10, 4),
        ("cifar100", (3, 32, 32), 100, 4),
        ("fashion_mnist", (1, 28, 28), 10, 3),
    ],
    indirect=["name"],
)
def test_images_are_cropped_and_mirrored_as_is_usual(
    load: Callable[[], ImageData], shape: tuple[int, ...], classes: int, padding: int
) -> None:
    data = load()
    assert (data.image_shape, data.num_classes) == (shape, classes)
    assert (data.flip, data.crop_padding) == (True, padding)


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_cifar_holds_the_pixels_and_fine_labels_of_its_files(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, kind, monkeypatch)
    data = load_dataset(kind.__name__.lower(), root=str(tmp_path))
    contents = [
        pickle.loads((tmp_path / kind.base_folder / file).read_bytes())
        for file, _ in kind.train_list
    ]
    rows = np.concatenate([content["data"] for content in contents])
    assert np.array_equal(data.x_train.flatten(1).numpy(), rows)
    labels = "labels" if kind is CIFAR10 else "fine_labels"
    assert data.y_train.tolist() == [label for content in contents for label in content[labels]]


def test_fashion_mnist_holds_the_pixels_and_labels_of_its_files(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    data = load_dataset("fashion_mnist", root=tmp_path)
    assert np.array_equal(data.x_test[:, 0].numpy(), draw(20, 20, 28, 28))
    assert data.y_test.tolist() == [row % 10 for row in range(20)]


@pytest.mark.parametrize("name", DOWNLOADED, indirect=True)
def test_root_is_that_of_the_environment_by_default(
    load: Callable[[], ImageData], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTKD_DATA", str(tmp_path))
    assert load_dataset(name).digest == load().digest


def test_data_are_kept_in_the_cache_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MTKD_DATA", raising=False)
    monkeypatch.setenv("MTKD_CACHE", str(tmp_path))
    assert data_folder() == tmp_path / "data"


@pytest.mark.parametrize("name", DOWNLOADED)
def test_missing_data_are_an_error_that_names_path_and_flag(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_dataset(name, root=tmp_path / "nowhere")
    message = str(caught.value)
    first = {"cifar10": "data_batch_1", "fashion_mnist": "train-images-idx3-ubyte"}
    folder = Path(FILES[name]).parent
    path = tmp_path / "nowhere" / folder / first.get(name, "train")
    assert message.startswith(f"{name}: {path}: no such file; looked in {tmp_path / 'nowhere'}")
    assert "--data.arguments.download true downloads it" in message
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", DOWNLOADED, indirect=True)
@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda _: b"", lambda b: b + b"more"])
def test_damaged_file_is_named(
    load: Callable[[], ImageData], name: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / FILES[name]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=f"{path.name}: damaged, it.*download true"):
        load()


def test_labels_that_do_not_fit_the_images_are_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    folder = tmp_path / "FashionMNIST" / "raw"
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes((folder / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(ConfigError, match=r"raw: y_train: expected 40 labels .* found 20"):
        load_dataset("fashion_mnist", root=tmp_path)


# Downloads.


@pytest.fixture
def online(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """A server of the dataset's archives; gives their folder."""
    source, archives = tmp_path / "source", tmp_path / "archives"
    for folder in (source, archives):
        folder.mkdir()
    FAKES[name](source, monkeypatch)
    kind = KINDS[name]
    monkeypatch.setenv("no_proxy", "*")
    with served(archives) as address:
        if name == "fashion_mnist":
            pack_fashion_mnist(source, archives, monkeypatch)
            monkeypatch.setattr(kind, "mirrors", [address])
        else:
            pack_cifar(source, kind, archives, monkeypatch)
            monkeypatch.setattr(kind, "url", address + kind.filename)
        yield archives
    capsys.readouterr()


def files(root: Path) -> dict[str, bytes]:
    found = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("name", DOWNLOADED, indirect=True)
class TestDownload:
    def test_gives_the_dataset_and_shows_its_progress(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root = tmp_path / "root"
        data = load_dataset(name, root=root, download=True)
        assert data.digest == load_dataset(name, root=tmp_path / "source").digest
        assert "100%" in capsys.readouterr().err
        assert load_dataset(name, root=root).digest == data.digest

    def test_leaves_alone_what_is_there(self, name: str, tmp_path: Path, online: Path) -> None:
        for archive in online.iterdir():
            archive.unlink()
        before = files(tmp_path / "source")
        load_dataset(name, root=tmp_path / "source", download=True)
        assert files(tmp_path / "source") == before

    def test_replaces_what_is_damaged(self, name: str, tmp_path: Path) -> None:
        root = tmp_path / "source"
        digest = load_dataset(name, root=root).digest
        (root / FILES[name]).write_bytes(b"damaged")
        assert load_dataset(name, root=root, download=True).digest == digest

    def test_leaves_nothing_behind_if_it_breaks_off(
        self, name: str, tmp_path: Path, online: Path
    ) -> None:
        for archive in online.iterdir():
            archive.write_bytes(archive.read_bytes()[:-10])
        root = tmp_path / "root"
        with pytest.raises(ConfigError, match=f"{name}: cannot download to .*root: .*corrupted"):
            load_dataset(name, root=root, download=True)
        assert list(root.iterdir()) == []

    def test_out_of_reach_is_an_error(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nobody = "http://127.0.0.1:1/"
        monkeypatch.setattr(KINDS[name], "url", nobody, raising=False)
        monkeypatch.setattr(KINDS[name], "mirrors", [nobody], raising=False)
        with pytest.raises(ConfigError, match=f"{name}: cannot download to .*refused"):
            load_dataset(name, root=tmp_path / "root", download=True)


# Folders of images.


def test_classes_are_numbered_in_the_order_of_their_folders(tmp_path: Path) -> None:
    write_images(tmp_path, classes=("b", "B", "a"), count=2)
    data = load_dataset("folder", root=tmp_path)
    assert data.class_names == ("B", "a", "b")
    assert [name.split("/")[0] for name in data.train.names] == ["B", "B", "a", "a", "b", "b"]
    assert data.train.targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.name == tmp_path.name
    assert load_dataset("folder", root=tmp_path, name="mine").name == "mine"


def test_a_class_may_be_missing_among_the_test_images(tmp_path: Path) -> None:
    write_images(tmp_path, parts=("train",))
    write_images(tmp_path, parts=("val",), classes=("fox",))
    assert load_dataset("folder", root=tmp_path).test.targets.unique().tolist() == [2]


@pytest.mark.parametrize("suffix", ["png", "jpeg", "JPG", "bmp", "webp"])
def test_images_of_any_usual_kind_are_found_and_others_left_out(
    tmp_path: Path, suffix: str
) -> None:
    write_images(tmp_path, count=2, suffix=suffix)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    data = load_dataset("folder", root=tmp_path)
    assert len(data.train) == 6
    assert data.pixels(data.train, torch.arange(6)).shape == (6, 3, 224, 224)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_images_of_any_mode_become_three_channels(tmp_path: Path, mode: str) -> None:
    write_images(tmp_path, count=1)
    path = tmp_path / "train" / "cat" / "0.png"
    image = Image.open(path).convert(mode)
    path.unlink()
    image.save(path.with_suffix(".tif"))
    data = load_dataset("folder", root=tmp_path)
    assert data.pixels(data.train, torch.tensor([0])).shape == (1, 3, 224, 224)


def test_a_folder_with_test_and_val_is_chosen_by_val(tmp_path: Path) -> None:
    write_images(tmp_path, parts=("train", "val", "test"))
    splits = load_dataset("folder", root=tmp_path).split()
    assert splits.val.root == tmp_path / "val"
    assert splits.test.root == tmp_path / "test"
    with pytest.raises(ConfigError, match=r"val_fraction: expected 0, because .* has images to"):
        load_dataset("folder", root=tmp_path).split(0.5)


def test_imagenet_is_measured_on_val_and_numbered_by_wordnet_id(tmp_path: Path) -> None:
    write_images(tmp_path, classes=WORDNET_IDS[::-1], count=1, suffix="JPEG")
    (tmp_path / "test").mkdir()  # of images without labels
    data = load_dataset("imagenet", root=tmp_path)
    assert data.class_names == WORDNET_IDS
    assert data.train.names[0] == "n01440764/0.JPEG"
    assert data.test.root == tmp_path / "val"
    assert data.split().val is None


def test_all_of_imagenets_classes_have_the_names_of_published_weights() -> None:
    names = _names([f"n{number:08}" for number in range(1000)])
    assert (names[0], names[-1]) == ("tench", "toilet tissue")


def test_imagenet_is_looked_for_among_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTKD_DATA", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"imagenet/train: no such folder .*root .* registered users"
    ):
        load_dataset("imagenet")
    write_images(tmp_path / "imagenet", classes=WORDNET_IDS, count=1)
    assert load_dataset("imagenet").num_classes == len(WORDNET_IDS)


def without(*parts: str) -> Callable[[Path], None]:
    def remove(root: Path) -> None:
        for part in parts:
            for path in sorted((root / part).rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            (root / part).rmdir()

    return remove


def emptied(part: str) -> Callable[[Path], None]:
    def empty(root: Path) -> None:
        for path in (root / part).rglob("*.png"):
            path.unlink()

    return empty


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("train"), r"train: no such folder \(--data.arguments.root .*; expected train/"),
        (without("val"), r"holds no test images; --data\.test_fraction 0\.2 takes a share"),
        (without("train/cat", "train/dog", "train/fox"), "train: holds no folders; expected"),
        (without("val/cat", "val/dog", "val/fox"), "val: holds no folders; expected"),
        (without("train/cat"), "val/cat: no such class among the training images"),
        (emptied("train/dog"), r"train/dog: holds no images \(\.jpg, "),
        (emptied("val"), r"val: holds no images \(\.jpg, .*; expected train/"),
    ],
)
@pytest.mark.parametrize("name", STREAMED)
def test_folder_of_another_layout_is_named(
    name: str, change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write_images(tmp_path, count=1)
    change(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_dataset(name, root=tmp_path)


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    write_images(tmp_path, classes=("cat",))
    with pytest.raises(ConfigError, match="class_names: expected at least 2, found 1"):
        load_dataset("folder", root=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 7}, "image_size: expected 8 or more, found 7"),
        (
            {"image_size": 300, "resize": 256},
            "resize: expected at least image_size = 300, found 256",
        ),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'; did you mean 'bicubic'"),
        ({"augmentation": "diet"}, "unknown augmentation 'diet'; did you mean 'deit'"),
        ({"repeats": 0}, "repeats: expected at least 1, got 0"),
        ({"workers": -1}, "workers: expected a finite number >= 0, got -1"),
        ({"size": 64}, r"arguments\.size: unknown key; did you mean 'image_size'"),
        ({"worker": 1}, r"arguments\.worker: unknown key; did you mean 'workers'"),
    ],
)
def test_value_that_cannot_be_used_is_named(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_images(tmp_path, count=1)
    with pytest.raises(ConfigError, match=message):
        load_dataset("folder", root=tmp_path, **arguments)


def test_a_small_image_is_shown_as_whole_as_a_large_one(tmp_path: Path) -> None:
    write_images(tmp_path, count=1)
    resized = [
        load_dataset("folder", root=tmp_path, **sizes).preprocessing.resize
        for sizes in ({}, {"image_size": 448}, {"image_size": 64}, {"image_size": 64, "resize": 80})
    ]
    assert resized == [256, 512, 73, 80]


def test_no_image_is_read_before_it_is_needed(tmp_path: Path) -> None:
    write_images(tmp_path, count=2)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"no image")
    data = load_dataset("folder", root=tmp_path)
    assert len(data.split(0.5).val) == 3
    assert len(data.digest) == 64


def test_digest_of_files_depends_on_names_sizes_classes_and_views(tmp_path: Path) -> None:
    for copy in ("one", "two"):
        write_images(tmp_path / copy)

    def digest(**changes: Any) -> str:
        return load_dataset("folder", **{"root": tmp_path / "one", **changes}).digest

    first = digest()
    assert digest(root=tmp_path / "two", workers=1, prefetch_bytes=1, name="other") == first
    views: list[dict[str, Any]] = [
        {"image_size": 200},
        {"resize": 300},
        {"interpolation": "bicubic"},
        {"augmentation": "deit"},
        {"repeats": 3},
    ]
    others = {digest(**changes) for changes in views}
    file = tmp_path / "two" / "val" / "cat" / "0.png"
    file.write_bytes(file.read_bytes() + b"\0")
    others.add(digest(root=tmp_path / "two"))
    file.rename(file.with_name("renamed.png"))
    others.add(digest(root=tmp_path / "two"))
    assert len(others - {first}) == len(views) + 2
