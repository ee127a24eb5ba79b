from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.gallery import (
    FILE,
    MOST_IMAGES,
    LastStep,
    collect_gallery,
    read_gallery,
    write_gallery,
)
from fake_datasets import write_images
from known_optimum import started_env
from mtkd_env.data import ImageData
from mtkd_env.types import TeacherWeights
from run_folders import gallery
from tiny import load_dataset

NAMES = ("none", "one", "two", "three")


def data(size: int, **changes: Any) -> ImageData:
    """Images that say where they are from; only every second one is trained on."""
    images = torch.arange(size, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    images, targets = images.contiguous(), torch.arange(size) % 4
    fields = {"num_classes": 4, "flip": False, "crop_padding": 0, "class_names": NAMES}
    return ImageData("numbered", images, targets, images, targets, **{**fields, **changes})


def test_images_are_those_of_the_last_step() -> None:
    env = started_env()
    env.subscribe(last := LastStep())
    assert last.record is None
    made = [env.distill(TeacherWeights.uniform(env.state.divergence)) for _ in range(2)]
    assert last.record is not None
    assert last.record.index.equal(made[-1].index)
    numbered = data(100)
    train = numbered.split(0.5).train
    found = collect_gallery(made[-1], numbered, train)
    index = train.index[made[-1].index].tolist()
    assert index != made[-1].index.tolist()
    assert found.images[:, 0, 0, 0].tolist() == index
    assert found.index.tolist() == index
    assert found.targets.tolist() == [position % 4 for position in index]
    assert found.names.tolist() == [NAMES[position % 4] for position in index]
    assert found.correct.tolist() == made[-1].correct.tolist()
    assert found.logit.tolist() == made[-1].weights.logit.tolist()
    assert found.feature.tolist() == made[-1].weights.feature.tolist()


def test_of_a_large_batch_only_the_first_images_are_kept() -> None:
    env = started_env()
    record = env.distill(TeacherWeights.uniform(env.state.divergence)).whole()
    copies = MOST_IMAGES
    many = replace(
        record,
        index=record.index.repeat(copies),
        targets=record.targets.repeat(copies),
        correct=record.correct.repeat(copies, 1),
        weights=TeacherWeights(
            record.weights.logit.repeat(copies, 1), record.weights.feature.repeat(copies, 1)
        ),
    )
    found = collect_gallery(many, data(50), data(50).split().train)
    assert {len(array) for array in vars(found).values()} == {MOST_IMAGES}


def test_classes_without_names_are_named_by_their_numbers() -> None:
    env = started_env()
    record = env.distill(TeacherWeights.uniform(env.state.divergence))
    nameless = data(50, class_names=())
    found = collect_gallery(record, nameless, nameless.split().train)
    assert found.names.tolist() == [str(target) for target in found.targets]


def test_images_in_files_are_decoded(tmp_path: Path) -> None:
    write_images(tmp_path, classes=("cat", "dog"), count=30)
    files = load_dataset("folder", root=tmp_path, image_size=24, resize=24, augmentation="deit")
    env = started_env()
    record = env.distill(TeacherWeights.uniform(env.state.divergence))
    found = collect_gallery(record, files, files.train)
    assert found.images.dtype == np.uint8
    assert found.images.shape[1:] == (3, 24, 24)
    assert found.names.tolist() == [("cat", "dog")[target] for target in found.targets]


def test_a_gallery_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = gallery(3)
    write_gallery(made, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    found = read_gallery(tmp_path)
    assert found is not None
    for name, array in vars(made).items():
        assert vars(found)[name].dtype == array.dtype
        np.testing.assert_array_equal(vars(found)[name], array)


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"PK\x03\x04 damaged"])
def test_there_is_no_gallery_without_a_whole_file(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    assert read_gallery(tmp_path) is None


def test_a_gallery_never_runs_code(tmp_path: Path) -> None:
    arrays = vars(gallery(2)) | {"index": np.array([print], dtype=object)}
    np.savez(tmp_path / FILE, **arrays)
    assert read_gallery(tmp_path) is None


def test_a_gallery_of_another_version_is_none(tmp_path: Path) -> None:
    np.savez(tmp_path / FILE, images=gallery(2).images)
    assert read_gallery(tmp_path) is None
