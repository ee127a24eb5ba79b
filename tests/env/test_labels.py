"""Labels that are missing, wrong or set apart: who sees which, and that hidden ones are gone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mtkd_env import losses
from mtkd_env.data.split import ALL_LABELS, LabelSpec, divide, train_targets, with_noise
from mtkd_env.errors import ConfigError
from mtkd_env.types import UNKNOWN
from tiny import CLASSES, data, generator

COUNT = 60
TARGETS = torch.arange(COUNT) % CLASSES
SOME = LabelSpec(labelled=20)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def seen(targets: Tensor, labels: LabelSpec, val_fraction: float = 0.0) -> Tensor:
    division = divide(targets, val_fraction, 0, None, labels)
    return train_targets(targets, division, labels, CLASSES)


def test_so_many_images_keep_their_label() -> None:
    found = seen(TARGETS, SOME)
    assert int((found != UNKNOWN).sum()) == 20
    assert found[found != UNKNOWN].equal(TARGETS[found != UNKNOWN])


def test_every_class_is_among_the_labelled_images() -> None:
    found = seen(TARGETS, SOME)
    assert set(found[found != UNKNOWN].tolist()) == set(range(CLASSES))


def test_the_labels_that_are_kept_do_not_depend_on_those_that_are_hidden() -> None:
    known = divide(TARGETS, 0.0, 0, 40, SOME).labelled
    hidden = torch.full_like(TARGETS, 1)
    hidden[known] = TARGETS[known]
    again = divide(hidden, 0.0, 0, 40, SOME)
    assert again.labelled.equal(known)
    assert train_targets(hidden, again, SOME, CLASSES).equal(
        train_targets(TARGETS, divide(TARGETS, 0.0, 0, 40, SOME), SOME, CLASSES)
    )


def test_another_seed_labels_other_images() -> None:
    first, other = (
        divide(TARGETS, 0.0, 0, None, replace(SOME, labelled_seed=seed)).labelled for seed in (0, 1)
    )
    assert not first.equal(other)


def test_validation_and_held_out_images_come_out_of_the_labelled_ones() -> None:
    labels = replace(SOME, heldout=5)
    division = divide(TARGETS, 0.25, 0, None, labels)
    apart = torch.cat([division.val, division.heldout])
    everything = divide(TARGETS, 0.0, 0, None, SOME).labelled
    assert (len(division.val), len(division.heldout), len(division.labelled)) == (5, 5, 10)
    assert not torch.isin(division.train, apart).any()
    assert torch.cat([apart, division.labelled]).sort().values.equal(everything)


def test_held_out_images_are_set_apart_where_every_label_is_there() -> None:
    division = divide(TARGETS, 0.1, 0, None, LabelSpec(heldout=7))
    assert (len(division.val), len(division.heldout), len(division.train)) == (6, 7, 47)
    assert division.labelled.equal(division.train)


def test_reserved_images_are_nobodys_else() -> None:
    reserved = torch.arange(0, COUNT, 3)
    division = divide(TARGETS, 0.1, 0, None, LabelSpec(heldout=4), reserved)
    own = torch.cat([division.train, division.val, division.heldout])
    assert not torch.isin(own, reserved).any()
    assert len(own) == COUNT - len(reserved)


def test_images_that_never_had_a_label_are_learned_from() -> None:
    targets = torch.where(torch.arange(COUNT) < 45, TARGETS, UNKNOWN)
    division = divide(targets, 0.2, 0, None)
    assert (len(division.val), len(division.labelled), len(division.train)) == (9, 36, 51)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (LabelSpec(labelled=61), ("data.labelled", "to 60", "found 61")),
        (LabelSpec(labelled=CLASSES - 1), ("data.labelled", "one for each class", "found 3")),
        (LabelSpec(labelled=10, heldout=10), ("data.heldout", "fewer than 10", "found 10")),
        (LabelSpec(heldout=60), ("data.heldout", "fewer than 60", "found 60")),
    ],
)
def test_numbers_that_there_are_not_are_named(labels: LabelSpec, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        divide(TARGETS, 0.0, 0, None, labels)
    assert all(word in str(error.value) for word in words)


def test_the_same_images_are_learned_from_without_any_label() -> None:
    none = divide(TARGETS, 0.0, 0, 40, LabelSpec(labelled=0))
    assert len(none.labelled) == 0
    assert none.train.equal(divide(TARGETS, 0.0, 0, 40, SOME).train)


def test_a_class_without_a_label_is_named() -> None:
    targets = torch.zeros(COUNT, dtype=torch.int64)
    targets[:3] = torch.tensor([1, 2, 3])
    with pytest.raises(ConfigError, match=r"data.labelled: of 4 images .* none is of class"):
        divide(targets, 0.0, 0, None, LabelSpec(labelled=4))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_labels_is_drawn_anew(share: float) -> None:
    targets = torch.zeros(4000, dtype=torch.int64)
    noisy = with_noise(targets, share, CLASSES, seed=0)
    # One in C of those that are drawn is right by chance.
    expected = share * (1 - 1 / CLASSES)
    assert float((noisy != targets).float().mean()) == pytest.approx(expected, abs=0.03)


def test_labels_of_held_out_and_validation_images_are_never_wrong() -> None:
    labels = LabelSpec(heldout=10, label_noise=1.0)
    splits = data(60).split(0.2, labels=labels)
    whole = data(60).y_train
    assert splits.val is not None
    for part in (splits.val, splits.labelled):
        assert part.targets.equal(whole[part.index])
    assert not splits.train.targets.equal(whole[splits.train.index])


def test_rewards_and_gates_see_the_images_that_the_student_learns_from_unless_some_are_apart() -> (
    None
):
    splits = data(60).split(labels=SOME)
    labelled = splits.train.targets != UNKNOWN
    assert splits.labelled.index.equal(splits.train.index[labelled])
    assert splits.labelled.targets.equal(splits.train.targets[labelled])


def test_an_image_without_a_label_has_no_cross_entropy() -> None:
    logits = draw(3, CLASSES).requires_grad_()
    targets = torch.tensor([1, UNKNOWN, 2])
    found = losses.cross_entropy(logits, targets)
    assert found[1] == 0
    found.mean().backward()
    assert logits.grad is not None
    assert logits.grad[1].eq(0).all()
    # Divided by the number of all images, as the study does.
    known = losses.cross_entropy(logits[[0, 2]], targets[[0, 2]])
    torch.testing.assert_close(found.mean(), known.sum() / 3)


def test_nor_have_teachers_one_of_it() -> None:
    found = losses.teacher_cross_entropy(draw(2, 3, CLASSES), torch.tensor([1, UNKNOWN, 2]))
    assert found[1].eq(0).all()
    assert found[[0, 2]].gt(0).all()


def test_an_image_without_a_label_has_no_share_of_any_class() -> None:
    shares = losses.class_shares(torch.tensor([0, UNKNOWN]), CLASSES)
    assert shares.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_all_labels_are_there_by_default() -> None:
    assert seen(TARGETS, ALL_LABELS).equal(TARGETS)
