"""Training images without a label, from a user's own files."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fake_datasets import draw, write_images
from mtkd_env.data import ImageFiles, npz
from mtkd_env.data.split import LabelSpec
from mtkd_env.errors import ConfigError
from mtkd_env.types import UNKNOWN
from tiny import load_dataset

LABELS = np.arange(12) % 3


def archive(folder: Path, **changes: Any) -> Path:
    arrays = {
        "x_train": draw(0, 12, 8, 10, 3),
        "y_train": LABELS,
        "x_test": draw(1, 6, 8, 10, 3),
        "y_test": np.arange(6) % 3,
    } | changes
    np.savez(folder / "mine.npz", **arrays)
    return folder / "mine.npz"


def folder_of(root: Path, *unlabelled: str) -> Path:
    """A folder of three classes, nine images of each, with some files in `unlabelled`."""
    write_images(root, parts=("train", "test"))
    source = (root / "train" / "cat" / "0.png").read_bytes()
    for name in unlabelled:
        path = root / "unlabelled" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source)
    return root


def load_folder(root: Path) -> ImageFiles:
    return load_dataset("folder", root=root, image_size=16, resize=20, workers=0)


@pytest.mark.parametrize("empty", [True, False])
def test_a_folder_may_have_no_label_at_all_but_of_its_test_images(
    empty: bool, tmp_path: Path
) -> None:
    root = folder_of(tmp_path, "a.png", "b.png")
    for path in (root / "train").rglob("*.png"):
        path.unlink()
    if not empty:
        shutil.rmtree(root / "train")
    data = load_folder(root)
    assert data.class_names == load_folder(folder_of(tmp_path / "whole")).class_names
    assert data.train.targets.tolist() == [UNKNOWN] * 2
    assert data.test.targets.max() == data.num_classes - 1


def test_a_folder_of_another_name_is_not_taken_for_no_label_at_all(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "a.png")
    (root / "train").rename(root / "training")
    with pytest.raises(ConfigError, match="train: no such folder"):
        load_folder(root)


def test_an_archive_may_hide_labels_among_its_training_images(tmp_path: Path) -> None:
    labels = np.where(np.arange(12) < 5, LABELS, UNKNOWN)
    data = npz.load(archive(tmp_path, y_train=labels))
    assert data.y_train.tolist() == labels.tolist()
    assert data.num_classes == 3


def test_an_archive_may_have_images_without_labels_beside_the_others(tmp_path: Path) -> None:
    more = draw(2, 7, 8, 10, 3)
    data = npz.load(archive(tmp_path, x_unlabelled=more))
    assert data.y_train.tolist() == [*LABELS.tolist(), *[UNKNOWN] * 7]
    assert np.array_equal(data.x_train[12:].permute(0, 2, 3, 1).numpy(), more)


def test_where_labels_are_missing_the_test_images_may_have_further_classes(tmp_path: Path) -> None:
    labels = np.where(LABELS == 2, UNKNOWN, LABELS)
    assert npz.load(archive(tmp_path, y_train=labels)).num_classes == 3


def test_without_any_label_there_are_the_classes_of_the_test_images(tmp_path: Path) -> None:
    assert npz.load(archive(tmp_path, y_train=np.full(12, UNKNOWN))).num_classes == 3


def test_the_number_of_classes_may_be_said(tmp_path: Path) -> None:
    data = load_dataset("npz", path=archive(tmp_path), num_classes=5)
    assert data.num_classes == 5


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"y_test": np.arange(6) % 3 - 1}, {}, ("y_test", "0 to 2", "found -1")),
        ({"y_train": LABELS - 2}, {}, ("y_train", "found -2")),
        ({}, {"num_classes": 2}, ("y_train", "0 to 1", "found 2")),
        ({"x_unlabelled": draw(2, 7, 8, 9, 3)}, {}, ("x_unlabelled", "(3, 8, 10)", "(3, 8, 9)")),
        ({"x_unlabelled": draw(2, 7, 8, 10, 3) / 255}, {}, ("x_unlabelled", "uint8", "float64")),
        ({"x_unlabeled": draw(2, 7, 8, 10, 3)}, {}, ("'x_unlabelled'", "'x_unlabeled'")),
        ({"y_train": np.arange(11) % 3}, {}, ("y_train", "12 labels", "found 11")),
    ],
)
def test_a_defect_of_an_archive_is_named(
    tmp_path: Path, changes: dict[str, Any], arguments: dict[str, Any], words: tuple[str, ...]
) -> None:
    path = archive(tmp_path, **changes)
    with pytest.raises(ConfigError) as error:
        npz.load(path, **arguments)
    assert str(error.value).startswith(f"{path}: ")
    assert all(word in str(error.value) for word in words)


def test_images_in_a_folder_without_labels_are_found_however_deep(tmp_path: Path) -> None:
    names = ("a.png", "camera 1/b.png", "camera 1/monday/c.png")
    data = load_folder(folder_of(tmp_path, *names, "._a.png", ".thumbs/a.png", "notes.txt"))
    unlabelled = data.train.take(data.train.targets.eq(UNKNOWN).nonzero().squeeze(1))
    assert unlabelled.paths(range(3)) == [f"{tmp_path}/unlabelled/{name}" for name in names]
    assert len(data.train) == 27 + 3
    assert len(data.test) == 27


def test_labelled_images_stay_what_they_are_beside_others(tmp_path: Path) -> None:
    without = load_folder(folder_of(tmp_path)).train
    beside = load_folder(folder_of(tmp_path / "other", "a.png")).train
    kept = beside.take(torch.arange(27))
    assert kept.targets.equal(without.targets)
    assert [path.split("/train/")[1] for path in kept.paths(range(27))] == list(without.names)


def test_a_training_folder_may_be_a_link(tmp_path: Path) -> None:
    folder_of(tmp_path / "elsewhere")
    root = folder_of(tmp_path / "mine", "a.png")
    (root / "train").rename(root / "old")
    (root / "train").symlink_to(tmp_path / "elsewhere" / "train")
    data = load_folder(root)
    assert all(Path(path).is_file() for path in data.train.paths(range(len(data.train))))


def test_images_without_labels_are_decoded_like_the_others(tmp_path: Path) -> None:
    data = load_folder(folder_of(tmp_path, "a.png"))
    batch = next(iter(data.evaluation_batches(data.train, 28, device="cpu")))
    assert batch.targets[27] == UNKNOWN
    assert batch.inputs[27].equal(batch.inputs[0])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unlabelled/a.txt", ("unlabelled: holds no images",)),
        ("unlabeled/a.png", ("unlabeled: expected the name 'unlabelled'",)),
    ],
)
def test_a_folder_that_would_be_left_out_is_named(
    tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    root = folder_of(tmp_path)
    (root / name).parent.mkdir()
    (root / name).write_bytes(b"")
    with pytest.raises(ConfigError) as error:
        load_folder(root)
    assert all(word in str(error.value) for word in words)


def test_missing_labels_of_a_file_are_missing_for_the_student(tmp_path: Path) -> None:
    splits = load_folder(folder_of(tmp_path, "a.png", "b.png")).split()
    assert int(splits.train.targets.eq(UNKNOWN).sum()) == 2
    assert len(splits.labelled) == 27


def test_no_more_labels_are_kept_than_there_are(tmp_path: Path) -> None:
    data = load_folder(folder_of(tmp_path, "a.png", "b.png"))
    with pytest.raises(ConfigError, match=r"data\.labelled: expected 3, .* to 27, .* found 28"):
        data.split(labels=LabelSpec(labelled=28))
