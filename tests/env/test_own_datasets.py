"""Datasets of a user's own program: objects, classes and functions."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fake_datasets import write_images
from mtkd_env import DataSpec, assemble
from mtkd_env.data import ImageData
from mtkd_env.data.dataset import AUGMENTATIONS, DRAWN
from mtkd_env.data.split import test_division as division
from mtkd_env.errors import ConfigError
from mtkd_env.seeding import all_seeded
from mtkd_env.types import UNKNOWN
from tiny import data, label, load_dataset
from users_objects import SIZE, Squares, squares


def no_dataset() -> int:
    return 3


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "PIL": Image.fromarray,
    "array": lambda image: image,
    "bytes": lambda image: torch.from_numpy(image).permute(2, 0, 1),
    "floats": lambda image: torch.from_numpy(image).permute(2, 0, 1) / 255,
}


@pytest.mark.parametrize("form", FORMS)
def test_images_are_the_same_in_every_form(form: str) -> None:
    found = load_dataset(Squares(make=FORMS[form]), test_fraction=0.5)
    assert isinstance(found, ImageData)
    assert found.image_shape == (3, SIZE, SIZE)
    assert found.class_names == Squares.classes
    assert len(found.x_train) == len(found.x_test) == 6
    assert found.x_test[:, 0, 0, 0].equal((100 * found.y_test).to(torch.uint8))
    assert found.digest == load_dataset(Squares(), test_fraction=0.5).digest


GREY = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREY.astype(np.uint8)),
        Image.fromarray((257 * GREY).astype(np.uint16)),
        GREY.astype(np.uint8),
        torch.from_numpy(GREY.astype(np.uint8)),
        torch.from_numpy(GREY).float() / 255,
    ],
    ids=["8 bits", "16 bits", "array", "bytes", "floats"],
)
def test_grey_images_have_one_channel(image: Any) -> None:
    pairs = [(image, 0), (image, 1)] * 2
    found = load_dataset(Pairs(pairs), test_fraction=0.5)
    assert found.image_shape == (1, SIZE, SIZE)
    assert found.x_train[0, 0].equal(torch.from_numpy(GREY.astype(np.uint8)))


class Pairs(Dataset[Any]):
    def __init__(self, pairs: list[Any]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> Any:
        return self.pairs[position]


@pytest.mark.parametrize(
    "dataset",
    [squares, "users_objects:squares", squares(12), Squares, "users_objects:Squares"],
    ids=label,
)
def test_a_dataset_is_an_object_or_what_makes_one(dataset: Any) -> None:
    alone = not isinstance(dataset, dict) and "Squares" in str(dataset)
    spec = DataSpec(dataset, test_fraction=0.25 if alone else 0.0)
    train, val, test = spec.load().parts
    assert (len(train), len(test)) == ((9, 3) if alone else (12, 6))
    assert (val is None) == alone
    if not isinstance(dataset, dict):
        more = replace(spec, arguments={"count": 24}).load().parts[0]
        assert len(more) == (18 if alone else 24)


def test_own_validation_images_are_what_is_chosen_by() -> None:
    splits = load_dataset(squares).split()
    assert splits.val is not None
    assert len(splits.val) == 3
    with pytest.raises(ConfigError, match="val_fraction: expected 0, because squares has images"):
        load_dataset(squares).split(0.5)


def test_settings_of_images_that_are_there_are_arguments() -> None:
    arguments = {"name": "mine", "flip": False, "crop_padding": 2, "num_classes": 5}
    found = load_dataset(Squares(), test_fraction=0.5, **arguments)
    assert {key: getattr(found, key) for key in arguments} == arguments


def test_labels_may_be_missing_in_training() -> None:
    image = np.zeros((SIZE, SIZE), dtype=np.uint8)
    pairs = [(image, 0), (image, None), (image, torch.tensor(1)), (image, -1)]
    found = load_dataset({"train": Pairs(pairs), "test": Pairs(pairs[::2])})
    assert found.y_train.tolist() == [0, UNKNOWN, 1, UNKNOWN]


def image_of(size: int) -> np.ndarray:
    return np.zeros((size, size), dtype=np.uint8)


X, Y = torch.zeros(4, 1, SIZE, SIZE), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (3, "dataset: expected a name or a map-style torch Dataset"),
        (iter(()), "dataset: expected a name or a map-style torch Dataset"),
        ({"tarin": Squares()}, "dataset: expected a name or a map-style torch Dataset"),
        ({"train": Squares(), "tset": Squares()}, "'tset'; did you mean 'test'"),
        ("os:listdir", "dataset: 'os:listdir' is not a map-style torch Dataset"),
        (no_dataset, "no_dataset' gives 3, expected a map-style torch Dataset"),
        (Pairs([{"image": 1}]), r"train\[0\]: expected \(image, label\), found dict with the"),
        (Pairs([("a.png", 0)]), r"train\[0\]: expected an image of PIL, .*, found str"),
        (TensorDataset(3 * X - 1, Y), "from -1 to -1; leave out Normalize"),
        (TensorDataset(X, Y.float()), r"train\[0\]: expected a whole number as label"),
        (Pairs([(image_of(8), 0), (image_of(9), 1)]), r"train\[1\]: expected shape \(1, 8, 8\)"),
        (Pairs([]), "train: expected at least one image, found none"),
        (TensorDataset(X, torch.tensor([0, 2, 0, 2])), "expected labels from 0 with none left out"),
    ],
)  # fmt: skip
def test_what_is_no_dataset_is_one_clear_line(dataset: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataSpec(dataset, test_fraction=0.5).load()


# Test images from the training images.


def test_a_share_of_every_class_is_to_test_the_same_ones_every_time() -> None:
    targets = torch.tensor([0] * 10 + [1] * 20 + [UNKNOWN] * 5)
    train, test = division(targets, 0.2)
    assert targets[test].bincount().tolist() == [2, 4]
    assert sorted([*train.tolist(), *test.tolist()]) == [*range(35)]
    assert division(targets, 0.2)[1].equal(test)
    assert test.tolist() != [0, 1, 10, 11, 12, 13]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 0.01, 0.99])
def test_a_share_has_to_leave_images_on_both_sides(fraction: float) -> None:
    with pytest.raises(ConfigError, match="test_fraction: expected a share"):
        division(torch.tensor([0, 1, 0, 1]), fraction)


def test_test_images_are_asked_for_or_there() -> None:
    with pytest.raises(ConfigError, match=r"Squares: holds no test images; --data\.test_fraction"):
        load_dataset(Squares())
    with pytest.raises(ConfigError, match="test_fraction: expected 0, because squares has test"):
        load_dataset(squares, test_fraction=0.5)


def test_a_folder_without_test_images_is_divided(tmp_path: Path) -> None:
    write_images(tmp_path, classes=("cat", "dog"), count=10)
    for part in ("val", "test"):
        for folder in sorted((tmp_path / part).glob("*")):
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        if (tmp_path / part).is_dir():
            (tmp_path / part).rmdir()
    found = load_dataset("folder", root=tmp_path, test_fraction=0.3)
    assert found.test.targets.tolist() == [0] * 3 + [1] * 3
    assert not set(found.test.names) & set(found.train.names)
    assert found.train.index.tolist() == [*range(14)]
    with pytest.raises(ConfigError, match="holds no test images"):
        load_dataset("folder", root=tmp_path)


# Augmentation.


def first_images(name: str, seed: int = 0) -> Tensor:
    images = data().augmented(name)
    stream = images.stream(images.split().train, batch_size=8, device="cpu", seed=seed)
    return torch.cat([batch.inputs for batch in islice(stream, 2)])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_depend_on_the_seed_alone(name: str) -> None:
    state = torch.get_rng_state()
    found = first_images(name)
    assert found.equal(first_images(name))
    assert torch.get_rng_state().equal(state)
    assert not found.equal(first_images(name, seed=1))


def test_each_augmentation_makes_other_images() -> None:
    found = [first_images(name) for name in AUGMENTATIONS]
    assert not any(a.equal(b) for i, a in enumerate(found) for b in found[:i])


def test_none_leaves_images_as_they_are() -> None:
    images = data().augmented("none")
    stream = images.stream(images.split().train, batch_size=8, device="cpu", seed=0)
    batch = next(stream)
    plain = next(iter(images.evaluation_batches(images.split().train, 64, device="cpu")))
    assert batch.inputs.equal(plain.inputs[batch.index])


@pytest.mark.parametrize("name", DRAWN)
def test_an_epoch_goes_on_in_its_middle_under_drawn_augmentation(name: str) -> None:
    images = data().augmented(name)
    first, second = (
        images.stream(images.split().train, batch_size=8, device="cpu", seed=seed)
        for seed in (0, 1)
    )
    next(first)
    second.load_state_dict(first.state_dict())
    assert next(first).inputs.equal(next(second).inputs)


def test_teachers_are_others_under_another_augmentation() -> None:
    digests = {data().augmented(name).digest for name in AUGMENTATIONS}
    assert len(digests) == len(AUGMENTATIONS)
    assert data().digest in digests


def test_augmentations_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown augmentation 'deit'"):
        load_dataset(squares, augmentation="deit")
    stacked = Pairs([(torch.zeros(2, SIZE, SIZE, dtype=torch.uint8), y) for y in (0, 1, 0, 1)])
    with pytest.raises(ConfigError, match="augmentation: expected images of 1 or 3 channels"):
        load_dataset(stacked, test_fraction=0.5, augmentation="randaugment")
    images, views = data().augmented("randaugment"), DataSpec(views=2).view_set
    train = images.split().train
    with pytest.raises(ConfigError, match="views: images that a transform is drawn for"):
        images.stream(train, batch_size=8, device="cpu", seed=0, view_set=views)


# Datasets that draw at random.


class Speckled(Squares):
    """Noise, by the generator of the given name, on a sixth of the pixels."""

    def __init__(self, count: int = 12, source: str = "torch") -> None:
        super().__init__(count)
        self.source = source

    def __getitem__(self, position: int) -> tuple[Any, int]:
        image, label = super().__getitem__(position)
        noise = {
            "torch": lambda: torch.rand(SIZE, SIZE).numpy(),
            "numpy": lambda: np.random.rand(SIZE, SIZE),  # noqa: NPY002 - as users do
            "python": lambda: np.array([[random.random() for _ in "a" * SIZE] for _ in "a" * SIZE]),
        }[self.source]()
        return np.where(noise[..., None] < 1 / 6, np.uint8(255), np.asarray(image)), label


def epochs(images: Any, count: int = 2, **options: Any) -> list[torch.Tensor]:
    """The training images of some epochs, in their order."""
    split = images.split().train
    stream = images.stream(split, batch_size=len(split), device="cpu", seed=0, **options)
    batches = islice(stream, count)
    return [batch.inputs[batch.index.argsort()] for batch in batches]


@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
def test_what_a_dataset_draws_is_new_in_every_epoch(source: str) -> None:
    images = load_dataset(Speckled(source=source), test_fraction=0.25)
    first, second = epochs(images)
    assert not first.equal(second)
    again = load_dataset(Speckled(source=source), test_fraction=0.25)
    assert first.equal(epochs(again)[0])
    assert images.digest == again.digest
    # Behind the noise is the image that the label is of.
    split = images.split().train
    brightness = images.mean[None, :, None, None] + images.std[None, :, None, None] * first
    assert brightness.flatten(1).median(1).values.allclose(split.targets * 100 / 255, atol=1e-3)


def test_what_draws_leaves_the_generators_as_they_were() -> None:
    def draws() -> list[Any]:
        return [torch.rand(2), torch.from_numpy(np.random.rand(2)), torch.tensor(random.random())]  # noqa: NPY002

    with all_seeded(5):
        expected = draws()
    with all_seeded(5):
        with all_seeded(6):
            assert not any(map(torch.equal, draws(), expected))
        assert all(map(torch.equal, draws(), expected))


def test_workers_draw_the_same() -> None:
    parts = {"train": Speckled(source="numpy"), "test": Squares()}
    assert epochs(load_dataset(parts))[1].equal(epochs(load_dataset(parts, workers=1))[1])


def test_numbered_views_of_what_is_drawn_come_again() -> None:
    images = load_dataset(Speckled(), test_fraction=0.25)
    first, second, third = epochs(images, 3, view_set=DataSpec(views=2).view_set)
    assert first.equal(third)
    assert not first.equal(second)


def test_nothing_is_done_to_what_is_drawn() -> None:
    images = load_dataset(Speckled(), test_fraction=0.25, augmentation="none")
    assert epochs(images)[0].equal(epochs(load_dataset(Speckled(), test_fraction=0.25))[0])
    with pytest.raises(ConfigError, match="expected none, because Speckled itself draws its im"):
        load_dataset(Speckled(), test_fraction=0.25, augmentation="randaugment")


def test_an_environment_is_made_of_a_dataset() -> None:
    teachers = [{"network": "resnet8", "width": 0.125, "kind": "random"}]
    fields = {"test_fraction": 0.25, "augmentation": "trivialaugment", "batch_size": 4}
    for given in ({"data": {"dataset": Squares(), **fields}}, {"dataset": Squares(), **fields}):
        env = assemble(teachers=teachers, width=0.125, device="cpu", **given).env
        env.reset(seed=0)
        env.step(env.action_space.sample())
        assert env.evaluate().accuracy <= 1
