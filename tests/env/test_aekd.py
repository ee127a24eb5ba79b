"""AEKD: the quadratic program against KKT conditions and SciPy, the gradients against autograd."""

import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from mtkd_env import losses
from mtkd_env.errors import ConfigError
from mtkd_env.teachers import TeacherEnsemble
from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting.aekd import (
    AEKD,
    MOST_TEACHERS,
    feature_gradients,
    logit_gradients,
    min_norm_weights,
)
from tiny import (
    CLASSES,
    NUM_ENVS,
    TinyNetwork,
    batch,
    generator,
    make_state,
    make_tiny_distiller,
    with_evidence,
)

SIZES = (2, 3, 4, 5, 8)
KINDS = ("any", "few dimensions", "duplicate", "zero", "all zero", "one huge", "in one direction")
TIGHT = 1e-8


# The quadratic program.


def vectors(kind: str, size: int, draw: np.random.Generator) -> np.ndarray:
    """`size` vectors to be combined, one in every row."""
    dimensions = draw.integers(1, size) if kind == "few dimensions" else 2 * size
    rows = draw.normal(size=(size, dimensions)) + draw.normal(size=dimensions)
    if kind == "duplicate":
        rows[0] = rows[-1]
    if kind == "zero":
        rows[draw.integers(size)] = 0
    if kind == "all zero":
        rows[:] = 0
    if kind == "one huge":
        rows[draw.integers(size)] *= 1e4
    if kind == "in one direction":
        rows = np.outer(draw.uniform(0.5, 2, size), rows[0])
    return rows * 10.0 ** draw.uniform(-6, 3)


def problems() -> Iterator[tuple[Tensor, float]]:
    """1,015 Gram matrices: those of one size and one cap together."""
    draw = np.random.default_rng(0)
    for size in SIZES:
        for cap, repeats in ((0.6, 19), (1.0, 6), (1.2 / size, 4) if size < 8 else (0.3, 4)):
            rows = [vectors(kind, size, draw) for kind in KINDS for _ in range(repeats)]
            yield torch.from_numpy(np.stack([one @ one.T for one in rows])), cap


def values(gram: Tensor, weights: Tensor) -> Tensor:
    """The objective relative to the mean squared length of the vectors."""
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
    return torch.einsum("ni,nij,nj->n", weights, gram, weights) / scale


def kkt_residual(gram: Tensor, weights: Tensor, cap: float) -> Tensor:
    """How much faster the objective falls by moving weight between two coordinates, relative.

    At the optimum no coordinate that can grow has a smaller slope than one that can shrink.
    """
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
    slope = torch.einsum("nij,nj->ni", gram, weights) / scale.unsqueeze(1)
    lowest = torch.where(weights < cap - TIGHT, slope, torch.inf).amin(1)
    highest = torch.where(weights > TIGHT, slope, -torch.inf).amax(1)
    return (highest - lowest).clamp(min=0)


def by_scipy(gram: np.ndarray, cap: float) -> np.ndarray:
    """The same program by sequential least squares, from equal weights."""
    size = len(gram)
    gram = gram / max(np.trace(gram) / size, 1e-300)
    with warnings.catch_warnings():
        # It leaves the box by a rounding error now and then.
        warnings.filterwarnings("ignore", "Values in x were outside bounds", RuntimeWarning)
        found = minimize(
            lambda a: a @ gram @ a,
            np.full(size, 1 / size),
            jac=lambda a: 2 * gram @ a,
            method="SLSQP",
            bounds=[(0, cap)] * size,
            constraints={
                "type": "eq",
                "fun": lambda a: a.sum() - 1,
                "jac": lambda _: np.ones(size),
            },
            options={"ftol": 1e-15, "maxiter": 100},
        )
    return found.x


def test_a_thousand_quadratic_programs_are_solved() -> None:
    gaps = []
    for gram, cap in problems():
        found = min_norm_weights(gram, cap)
        assert found.ge(0).all()
        assert found.le(cap + 1e-9).all()
        torch.testing.assert_close(found.sum(1), torch.ones(len(gram), dtype=torch.float64))
        assert kkt_residual(gram, found, cap).max() < TIGHT
        reference = np.stack([by_scipy(one, cap) for one in gram.numpy()])
        gaps.append(values(gram, found) - values(gram, torch.from_numpy(reference)))
    difference = torch.cat(gaps)
    assert len(difference) == 1015
    assert difference.max() < TIGHT
    # SciPy has solved most of them as well, so that the comparison means something.
    assert difference.abs().lt(1e-7).float().mean() > 0.9


@pytest.mark.parametrize("size", SIZES)
def test_programs_solved_together_are_those_solved_one_by_one(size: int) -> None:
    draw = np.random.default_rng(size)
    rows = [vectors(kind, size, draw) for kind in KINDS]
    gram = torch.from_numpy(np.stack([one @ one.T for one in rows]))
    alone = [min_norm_weights(one.unsqueeze(0), 0.6) for one in gram]
    torch.testing.assert_close(min_norm_weights(gram, 0.6), torch.cat(alone))


@pytest.mark.parametrize("size", [1, *SIZES])
def test_a_cap_of_one_over_m_leaves_equal_weights_alone(size: int) -> None:
    rows = torch.randn(3, size, 4, generator=generator(size))
    found = min_norm_weights(rows @ rows.transpose(1, 2), 1 / size)
    torch.testing.assert_close(found, torch.full((3, size), 1 / size, dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [0.0, 1e-12, 1.0, 1e12])
def test_equal_gradients_have_equal_weights(size: int, length: float) -> None:
    gram = torch.full((1, size, size), length**2)
    found = min_norm_weights(gram, 0.6)
    torch.testing.assert_close(found, torch.full((1, size), 1 / size, dtype=torch.float64))


def test_a_program_of_any_scale_has_the_same_solution() -> None:
    rows = torch.randn(4, 3, 5, generator=generator(0)).double()
    gram = rows @ rows.transpose(1, 2)
    for scale in (1e-20, 1e20):
        torch.testing.assert_close(min_norm_weights(scale * gram, 0.6), min_norm_weights(gram, 0.6))


def test_the_nearest_point_of_a_segment_to_the_origin() -> None:
    """Of two gradients, a = g_2·(g_2 − g_1) / |g_1 − g_2|², within the box."""
    first, second = torch.randn(2, 200, 3, generator=generator(0)).double().unbind()
    second = second + 0.5
    gap = first - second
    share = (-(second * gap).sum(1) / gap.square().sum(1)).clamp(0.4, 0.6)
    rows = torch.stack([first, second], dim=1)
    found = min_norm_weights(rows @ rows.transpose(1, 2), 0.6)
    torch.testing.assert_close(found[:, 0], share, rtol=0, atol=1e-7)
    assert 0.1 < found[:, 0].gt(0.401).logical_and(found[:, 0].lt(0.599)).double().mean() < 0.9


# The logit head.


def state_without_features(student: Tensor, teachers: Tensor) -> DistillState:
    count, size = teachers.shape[:2]
    none = torch.zeros(size, count)
    state = make_state(teacher_cross_entropy=none, divergence=none)
    return replace(
        state,
        student=replace(state.student, logits=student),
        teachers=replace(state.teachers, logits=teachers),
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logit_gradients_are_those_of_autograd(temperature: float) -> None:
    student = torch.randn(5, CLASSES, generator=generator(0)).requires_grad_()
    teachers = 3 * torch.randn(3, 5, CLASSES, generator=generator(1))
    found = logit_gradients(student.detach(), teachers, temperature)
    divergence = losses.kd_divergence(student, teachers, temperature)
    for m in range(3):
        (gradient,) = torch.autograd.grad(divergence[:, m].sum(), student, retain_graph=True)
        torch.testing.assert_close(found[m], gradient.mean(0))


def logits_about_uniform(*shifts: tuple[float, ...]) -> Tensor:
    """Logits (M, 2, C) of two samples whose mean prediction is uniform but for the shifts."""
    wobble = 0.02 * torch.tensor([[1.0, 0.0, 0.0, -1.0], [-1.0, 0.0, 0.0, 1.0]])
    return (0.25 + torch.tensor(shifts).unsqueeze(1) + wobble).log()


@pytest.mark.parametrize(
    ("cap", "expected"), [(1.0, [1 / 5, 4 / 5]), (0.6, [0.4, 0.6]), (0.5, [0.5, 0.5])]
)
def test_aekd_by_hand_of_orthogonal_gradients(cap: float, expected: list[float]) -> None:
    # Lengths 2 and 1 in the ratio, so inverse squares 1 : 4; with cap 0.6 the second is at it.
    teachers = logits_about_uniform((0.2, -0.2, 0.0, 0.0), (0.0, 0.0, 0.1, -0.1))
    state = state_without_features(torch.zeros(2, CLASSES), teachers)
    weights = AEKD(make_tiny_distiller(count=2, temperature=1.0), cap=cap)(state)
    torch.testing.assert_close(weights.logit, torch.tensor([expected] * 2))
    assert weights.feature.eq(0.5).all()


def test_aekd_by_hand_of_opposite_gradients() -> None:
    # a_1 · 2 = a_2 · 1 makes the student stand still.
    teachers = logits_about_uniform((0.1, -0.1, 0.0, 0.0), (-0.05, 0.05, 0.0, 0.0))
    state = state_without_features(torch.zeros(2, CLASSES), teachers)
    weights = AEKD(make_tiny_distiller(count=2, temperature=1.0), cap=1.0)(state)
    torch.testing.assert_close(weights.logit, torch.tensor([[1 / 3, 2 / 3]] * 2))


def test_aekd_softens_by_the_distillers_temperature() -> None:
    student, teachers = torch.zeros(2, CLASSES), torch.randn(3, 2, CLASSES, generator=generator(0))
    warm = AEKD(make_tiny_distiller(temperature=4.0))
    cold = AEKD(make_tiny_distiller(temperature=1.0))
    found = warm(state_without_features(student, 4 * teachers))
    expected = cold(state_without_features(student, teachers))
    torch.testing.assert_close(found.logit, expected.logit)


def test_without_a_cap_that_binds_the_combined_gradient_improves_every_teacher() -> None:
    """g_m · g ≥ |g|² for all m, with equality where a teacher counts (Désidéri, 2012)."""
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    weights = AEKD(distiller, cap=1.0)(state).logit[0].double()
    gradients = logit_gradients(
        state.student.logits.detach(), state.teachers.logits, distiller.distillation.temperature
    ).double()
    combined = weights @ gradients
    gain = gradients @ combined - combined.square().sum()
    assert gain.min() > -1e-7
    assert gain[weights > 1e-4].abs().max() < 1e-7


# The feature head.


def test_feature_gradients_are_those_of_the_stacked_term() -> None:
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    found = feature_gradients(state)
    for m in range(len(distiller.teachers)):
        (gradient,) = torch.autograd.grad(
            state.feature[:, m].sum(), state.student.feature_map, retain_graph=True
        )
        torch.testing.assert_close(found[m], gradient.flatten())
    assert found.abs().amax(1).gt(1e-4).all()


def two_channels(first: float, second: float) -> DistillState:
    """A student whose two channels are one teacher each, so far above it, then below it."""
    feature_map = torch.zeros(2, 2, 1, 1, requires_grad=True)
    gaps = torch.tensor([[first, second], [-first, -second]]).reshape(2, 2, 1, 1)
    state = make_state(teacher_cross_entropy=torch.zeros(2, 2), divergence=torch.zeros(2, 2))
    return replace(
        with_evidence(state, projected=(feature_map[:, :1], feature_map[:, 1:])),
        student=replace(state.student, feature_map=feature_map),
        teachers=replace(state.teachers, feature_maps=(-gaps[:, :1], -gaps[:, 1:])),
    )


def test_aekd_features_by_hand() -> None:
    # Orthogonal gradients, the second three times as long. Of unit length they count the same, at
    # any cap; scaled back, they count 1 : 1/3. Their means over the batch would be zero.
    state = two_channels(1.0, 3.0)
    expected = torch.tensor([[2.0, 0.0, -2.0, 0.0], [0.0, 6.0, 0.0, -6.0]])
    torch.testing.assert_close(feature_gradients(state), expected)
    for cap in (0.5, 0.6, 1.0):
        weights = AEKD(make_tiny_distiller(count=2), cap=cap)(state)
        torch.testing.assert_close(weights.feature, torch.tensor([[3 / 4, 1 / 4]] * 2))


def test_a_teacher_whose_features_are_reached_takes_the_feature_head() -> None:
    weights = AEKD(make_tiny_distiller(count=2))(two_channels(0.0, 3.0))
    torch.testing.assert_close(weights.feature, torch.tensor([[1.0, 0.0]] * 2))
    both = AEKD(make_tiny_distiller(count=2))(two_channels(0.0, 0.0))
    torch.testing.assert_close(both.feature, torch.tensor([[0.5, 0.5]] * 2))


def test_feature_weights_are_equal_if_not_asked_for_or_without_a_graph() -> None:
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    solved = AEKD(distiller)(state)
    assert not solved.feature.allclose(torch.tensor(1 / 3), atol=1e-3)
    for weights in (
        AEKD(distiller, features=False)(state),
        AEKD(distiller)(distiller.revisit(state)),
    ):
        assert weights.feature.eq(1 / 3).all()
        torch.testing.assert_close(weights.logit, solved.logit)


# As a method.


def test_all_samples_of_a_batch_have_the_same_weights_below_the_cap() -> None:
    distiller = make_tiny_distiller()
    weights = AEKD(distiller, cap=0.45)(distiller.forward(batch()))
    assert weights.logit.shape == weights.feature.shape == (NUM_ENVS, 3)
    assert weights.logit.eq(weights.logit[0]).all()
    assert weights.feature.eq(weights.feature[0]).all()
    assert weights.logit.max() < 0.45 + 1e-6


def test_a_cap_below_one_over_m_is_aver_in_the_logits() -> None:
    distiller = make_tiny_distiller()
    weights = AEKD(distiller, cap=0.1)(distiller.forward(batch()))
    torch.testing.assert_close(weights.logit, TeacherWeights.uniform(weights.logit).logit)


@pytest.mark.parametrize("cap", [0.0, -0.5, 1.5, float("nan")])
def test_caps_outside_the_unit_interval_are_refused(cap: float) -> None:
    with pytest.raises(ConfigError, match=rf"cap: expected a number in \(0, 1\], got {cap}"):
        AEKD(make_tiny_distiller(), cap=cap)


def test_more_than_eight_teachers_are_refused() -> None:
    count = MOST_TEACHERS + 1
    networks = [TinyNetwork(2).eval() for _ in range(count)]
    ensemble = TeacherEnsemble(networks, [str(m) for m in range(count)])
    with pytest.raises(ConfigError, match="aekd: solves for up to 8 teachers, got 9"):
        AEKD(make_tiny_distiller(ensemble=ensemble))
    eight = TeacherEnsemble(networks[:-1], ensemble.names[:-1])
    distiller = make_tiny_distiller(ensemble=eight)
    weights = AEKD(distiller)(distiller.forward(batch()))
    torch.testing.assert_close(weights.logit.sum(1), torch.ones(NUM_ENVS))
