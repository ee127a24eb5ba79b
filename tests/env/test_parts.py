"""Which images are each teacher's own: disjoint, as many and as skewed as asked for."""

import pytest
import torch

from mtkd_env.errors import ConfigError
from mtkd_env.teachers.parts import Part, class_positions, divide_among_teachers
from mtkd_env.types import UNKNOWN

CLASSES = 5
TARGETS = torch.arange(1000) % CLASSES
NAMES = ("cat", "dog", "car", "ship", "frog")


def shares(positions: torch.Tensor) -> torch.Tensor:
    return TARGETS[positions].bincount(minlength=CLASSES) / len(positions)


def test_parts_are_disjoint_and_of_the_sizes_asked_for() -> None:
    parts = {"a": Part(300.0, 0.3), "b": Part(0.25), "c": Part(100.0, 0.1)}
    found = divide_among_teachers(TARGETS, parts, CLASSES, seed=0)
    assert [len(own) for own in found.values()] == [300, 250, 100]
    assert len(torch.cat(list(found.values())).unique()) == 650


def test_the_seed_decides() -> None:
    parts = {"a": Part(300.0, 0.3)}
    first, same, other = (
        divide_among_teachers(TARGETS, parts, CLASSES, seed=seed)["a"] for seed in (0, 0, 1)
    )
    assert first.equal(same)
    assert not first.equal(other)


def test_a_small_concentration_is_skewed_and_a_large_one_even() -> None:
    def largest(skew: float) -> float:
        found = [
            divide_among_teachers(TARGETS, {"a": Part(100.0, skew)}, CLASSES, seed)["a"]
            for seed in range(20)
        ]
        return float(torch.stack([shares(own).max() for own in found]).mean())

    assert largest(0.1) > 0.6 > largest(1.0) > largest(1000.0)
    assert largest(1000.0) < 0.25


def test_what_a_class_has_not_left_comes_from_the_others() -> None:
    parts = {name: Part(200.0, 0.05) for name in "abcde"}
    found = divide_among_teachers(TARGETS, parts, CLASSES, seed=0)
    assert torch.cat(list(found.values())).sort().values.equal(torch.arange(1000))


def test_a_part_is_of_the_classes_asked_for() -> None:
    found = divide_among_teachers(TARGETS, {"a": Part(150.0, classes=(1, 3))}, CLASSES, seed=0)
    assert set(TARGETS[found["a"]].tolist()) == {1, 3}


def test_images_without_a_label_are_nobodys() -> None:
    targets = torch.where(TARGETS == 2, UNKNOWN, TARGETS)
    found = divide_among_teachers(targets, {"a": Part(700.0)}, CLASSES, seed=0)["a"]
    assert targets[found].ne(UNKNOWN).all()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"a": Part(600.0), "b": Part(500.0)}, ("teachers.b.images", "400", "of 1000", "got 500")),
        ({"a": Part(300.0, classes=(0,))}, ("teachers.a.images", "classes [0]", "200", "got 300")),
    ],
)
def test_more_images_than_there_are_are_refused(
    parts: dict[str, Part], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as error:
        divide_among_teachers(TARGETS, parts, CLASSES, seed=0)
    assert all(word in str(error.value) for word in words)


def test_classes_are_known_by_name_and_by_number() -> None:
    assert class_positions(["car", 0, "frog"], NAMES, CLASSES, "x") == (2, 0, 4)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cat", "caar"], ("x: expected one of cat, dog", "'caar'; did you mean 'car'?")),
        ([5], ("0 to 4", "got 5")),
        (["cat", 0], ("given twice",)),
    ],
)
def test_a_class_that_is_not_there_or_comes_twice_is_named(
    names: list[str | int], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as error:
        class_positions(names, NAMES, CLASSES, "x")
    assert all(word in str(error.value) for word in words)
