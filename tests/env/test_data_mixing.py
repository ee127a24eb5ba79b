from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtkd_env import Recipe, assemble
from mtkd_env.data import DataSpec, Mixing
from mtkd_env.data.augment import Mixer
from mtkd_env.errors import ConfigError
from mtkd_env.types import Batch
from tiny import CLASSES, training_set

SIZE = 6


def batch(seed: int = 0, size: int = SIZE) -> Batch:
    """Images that say where each of their pixels is from."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(1.0, size + 1)[:, None, None, None]
    return Batch(
        inputs=rows.expand(size, 1, 8, 8).clone(),
        targets=torch.randint(CLASSES, (size,), generator=generator),
        index=torch.arange(size),
    )


def mixed(mixing: Mixing, seed: int, whole: Batch) -> Batch:
    return Mixer(mixing, CLASSES)(whole, seed)


def one_hot(targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(targets, CLASSES).float()


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**63 - 1),
    mixup=st.sampled_from([0.0, 0.1, 0.8, 4.0]),
    cutmix=st.sampled_from([0.0, 0.1, 1.0, 4.0]),
    size=st.integers(1, 9),
)
def test_mixtures_are_shares_whose_largest_is_the_target(
    seed: int, mixup: float, cutmix: float, size: int
) -> None:
    if not Mixing(mixup, cutmix):
        return
    found = mixed(Mixing(mixup, cutmix), seed, batch(size=size))
    assert found.mixture.shape == (size, CLASSES)
    assert (found.mixture >= 0).all()
    torch.testing.assert_close(found.mixture.sum(1), torch.ones(size))
    largest = found.mixture.gather(1, found.targets[:, None]).squeeze(1)
    assert torch.equal(largest, found.mixture.max(1).values)
    assert torch.equal(found.index, torch.arange(size))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**63 - 1))
def test_mixup_blends_images_and_classes_in_the_same_proportion(seed: int) -> None:
    whole = batch()
    found = mixed(Mixing(mixup=0.8), seed, whole)
    before = whole.inputs.roll(1, 0)
    # The same share for the whole batch, read off the first pixel.
    share = ((found.inputs - before) / (whole.inputs - before))[0, 0, 0, 0]
    assert 0 <= share <= 1
    torch.testing.assert_close(found.inputs, share * whole.inputs + (1 - share) * before)
    classes = one_hot(whole.targets)
    torch.testing.assert_close(found.mixture, share * classes + (1 - share) * classes.roll(1, 0))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**63 - 1))
def test_cutmix_takes_a_box_whose_area_is_the_share_of_its_class(seed: int) -> None:
    whole = batch()
    found = mixed(Mixing(cutmix=1.0), seed, whole)
    own, before = found.inputs == whole.inputs, found.inputs == whole.inputs.roll(1, 0)
    assert (own | before).all()
    assert (own == own[:1]).all()
    share = own[0].float().mean()
    rows, columns = before[0, 0].any(1).sum(), before[0, 0].any(0).sum()
    assert rows * columns == before[0, 0].sum()
    classes = one_hot(whole.targets)
    torch.testing.assert_close(found.mixture, share * classes + (1 - share) * classes.roll(1, 0))


def test_of_two_ways_both_occur_about_equally_often() -> None:
    whole, both = batch(), Mixing(mixup=1.0, cutmix=1.0)
    blended = 0
    for seed in range(200):
        inputs = mixed(both, seed, whole).inputs
        blended += not ((inputs == whole.inputs) | (inputs == whole.inputs.roll(1, 0))).all()
    assert 75 <= blended <= 125


def test_same_seed_mixes_alike_and_leaves_the_batch_and_the_global_generator_alone() -> None:
    whole, both = batch(), Mixing(mixup=1.0, cutmix=1.0)
    copy, before = whole.inputs.clone(), torch.get_rng_state()
    first, same, other = (mixed(both, seed, whole) for seed in (1, 1, 2))
    assert torch.equal(first.inputs, same.inputs)
    assert torch.equal(first.mixture, same.mixture)
    assert not torch.equal(first.mixture, other.mixture)
    assert torch.equal(whole.inputs, copy)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("alpha", [-0.1, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_strength_that_is_none_is_named(name: str, alpha: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected a finite number >= 0, got {alpha}"):
        Mixing(**{name: alpha})


# Streams.


def take(mixing: Mixing, count: int = 5) -> list[Batch]:
    stream = training_set(60).stream(16, torch.device("cpu"), 0, mixing=mixing)
    return [next(stream) for _ in range(count)]


def test_mixing_changes_neither_the_order_nor_the_views() -> None:
    plain = take(Mixing())
    for whole, found in zip(plain, take(Mixing(mixup=1.0)), strict=True):
        assert torch.equal(found.index, whole.index)
        share = found.mixture[0, whole.targets[0]]
        if whole.targets[0] != whole.targets[-1]:
            expected = share * whole.inputs + (1 - share) * whole.inputs.roll(1, 0)
            torch.testing.assert_close(found.inputs, expected)


def test_every_step_mixes_in_another_proportion() -> None:
    mixtures = [found.mixture for found in take(Mixing(mixup=4.0), 8)]
    shares = {round(float(mixture[mixture > 0].min()), 4) for mixture in mixtures}
    assert len(shares) == 8


# Environments.

TEACHERS = [{"network": "resnet8", "kind": "random", "width": 0.25}] * 2
NAMED = [{**teacher, "name": str(m)} for m, teacher in enumerate(TEACHERS)]


def environment(**changes: Any) -> Any:
    return assemble(
        data=DataSpec(train_size=200, **changes),
        teachers=NAMED,
        student={"width": 0.125},
        optimizer=Recipe(epochs=1),
        env={"output": "torch"},
    ).env


def test_student_learns_from_mixed_images_and_is_measured_on_whole_ones() -> None:
    env = environment(mixup=0.8, cutmix=1.0)
    env.reset(seed=0)
    batches = []
    for _ in range(3):
        batches.append(env.state.batch)
        observation, *_ = env.step(torch.zeros(64, 4))
        assert observation.isfinite().all()
    assert all(found.mixture is not None for found in batches)
    assert all(found.mixture is None for found in env.splits["test"]())
    assert env.evaluate("test").cross_entropy > 0


def test_images_are_whole_by_default() -> None:
    env = environment()
    env.reset(seed=0)
    assert env.state.batch.mixture is None


def test_strength_is_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"mixup: expected a finite number >= 0, got -1\.0"):
        DataSpec("imagenet", {"root": "nowhere"}, mixup=-1.0)
