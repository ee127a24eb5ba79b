"""Facts that hold for every input, tried on many: losses, weightings, fusion."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from mtkd_env import losses
from mtkd_env.action import FUSIONS, WeightFusion
from mtkd_env.types import DistillState
from mtkd_env.weighting import WEIGHTINGS

few = settings(max_examples=15, derandomize=True, database=None, deadline=None)
many = settings(max_examples=40, derandomize=True, database=None, deadline=None)

seeds = st.integers(0, 10**6)
scales = st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4])
temperatures = st.floats(0.5, 20)
counts = st.integers(1, 5)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=tiny.generator(seed))


# Losses.


@many
@given(seed=seeds, scale=scales, temperature=temperatures, teachers=counts, size=counts)
def test_losses_of_logits_are_finite_and_not_negative(
    seed: int, scale: float, temperature: float, teachers: int, size: int
) -> None:
    student, others = scale * draw(seed, size, 4), scale * draw(seed + 1, teachers, size, 4)
    for loss in (losses.kd_divergence, losses.dist_divergence):
        found = loss(student, others, temperature)
        assert found.shape == (size, teachers)
        assert found.isfinite().all()
        assert (found >= -1e-4 * temperature**2).all()
    targets = torch.arange(size) % 4
    assert (losses.cross_entropy(student, targets) >= 0).all()
    assert (losses.teacher_cross_entropy(others, targets) >= 0).all()


@many
@given(seed=seeds, shift=st.floats(-50, 50), temperature=temperatures)
def test_shifts_of_all_logits_change_no_loss(seed: int, shift: float, temperature: float) -> None:
    student, others = draw(seed, 3, 4).double(), draw(seed + 1, 2, 3, 4).double()
    targets = torch.tensor([0, 3, 1])
    for loss in (losses.kd_divergence, losses.dist_divergence):
        expected = loss(student, others, temperature)
        torch.testing.assert_close(loss(student + shift, others, temperature), expected)
        torch.testing.assert_close(loss(student, others + shift, temperature), expected)
    expected = losses.cross_entropy(student, targets)
    torch.testing.assert_close(losses.cross_entropy(student + shift, targets), expected)


@many
@given(seed=seeds, temperature=temperatures, scale=st.floats(0.1, 10))
def test_identical_sides_have_no_loss(seed: int, temperature: float, scale: float) -> None:
    logits = (scale * draw(seed, 3, 4)).double()
    others = logits.expand(2, -1, -1)
    none = torch.zeros(3, 2, dtype=torch.float64)
    torch.testing.assert_close(losses.kd_divergence(logits, others, temperature), none)
    maps = (draw(seed, 3, 4, 2, 2), draw(seed + 1, 3, 5, 1, 1))
    assert losses.feature_mse(maps, maps).count_nonzero() == 0
    torch.testing.assert_close(losses.feature_cosine(maps, maps), torch.ones(3, 2))


# Weightings and fusion.


def extreme(state: DistillState, scale: float) -> DistillState:
    """The same state with evidence that is many times larger or smaller."""
    teachers = replace(state.teachers, logits=scale * state.teachers.logits)
    return tiny.with_evidence(
        replace(state, teachers=teachers, divergence=scale * state.divergence),
        teacher_cross_entropy=scale * state.teacher_cross_entropy,
        distance=scale * state.distance,
    )


def weights_of(name: str, state: DistillState) -> tuple[Tensor, Tensor]:
    """Weights of a state whose maps are as wide as those of the tiny student and its teachers."""
    size, widths = len(state.divergence), tiny.teachers().map_channels
    student = replace(state.student, feature_map=draw(1, size, 6, 2, 2))
    projected = tuple(draw(m, size, width, 2, 2) for m, width in enumerate(widths))
    weighting = WEIGHTINGS[name](tiny.make_tiny_distiller())
    state = tiny.with_evidence(replace(state, student=student), projected=projected)
    weights = weighting(state)
    return weights.logit, weights.feature


def assert_on_simplex(rows: Tensor) -> None:
    assert rows.isfinite().all()
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
@settings(max_examples=8, derandomize=True, database=None, deadline=None)
@given(seed=seeds, scale=scales)
def test_weights_lie_on_the_simplex(name: str, seed: int, scale: float) -> None:
    for rows in weights_of(name, extreme(tiny.random_state(seed), scale)):
        assert_on_simplex(rows)


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
rows_of_actions = st.lists(st.lists(finite, min_size=6, max_size=6), min_size=5, max_size=5)


@many
@given(actions=rows_of_actions, fusion=st.sampled_from(sorted(FUSIONS)), seed=seeds, scale=scales)
def test_every_finite_action_gives_weights(
    actions: list[list[float]], fusion: str, seed: int, scale: float
) -> None:
    state = extreme(tiny.random_state(seed), scale)
    weights = WeightFusion(fusion)(torch.tensor(actions), state)
    assert_on_simplex(weights.logit.detach())
    assert_on_simplex(weights.feature.detach())
