"""AMTML-KD: what the latent factors give, what they minimise, and that they reach it."""

from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from mtkd_env.errors import ConfigError
from mtkd_env.losses import kd_divergence
from mtkd_env.types import DistillState
from mtkd_env.weighting.amtmlkd import AMTMLKD, LatentFactors, mixture_divergence
from tiny import CLASSES, NUM_ENVS, batch, generator, make_tiny_distiller

B, M = 5, 3


def logits() -> tuple[Tensor, Tensor, Tensor]:
    """Weights (B, M), logits of a student and of teachers."""
    draw = generator(0)
    weights = torch.randn(B, M, generator=draw).softmax(1)
    student = torch.randn(B, CLASSES, generator=draw).requires_grad_()
    return weights, student, 3 * torch.randn(M, B, CLASSES, generator=draw)


# The divergence from the integrated soft target.


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_student_gets_the_gradient_of_the_weighted_sum(temperature: float) -> None:
    weights, student, teachers = logits()
    summed = (weights * kd_divergence(student, teachers, temperature)).sum(1)
    mixed = mixture_divergence(weights, student, teachers, temperature)
    assert (summed > mixed).all()  # the values differ, by convexity
    (of_sum,) = torch.autograd.grad(summed.sum(), student)
    (of_mixture,) = torch.autograd.grad(mixed.sum(), student)
    torch.testing.assert_close(of_sum, of_mixture)
    assert of_sum.abs().max() > 0.1


@pytest.mark.parametrize("m", range(M))
def test_of_one_teacher_the_mixture_is_its_kd_divergence(m: int) -> None:
    _, student, teachers = logits()
    onehot = torch.eye(M)[m].expand(B, -1)
    expected = kd_divergence(student, teachers, 2.0)[:, m]
    torch.testing.assert_close(mixture_divergence(onehot, student, teachers, 2.0), expected)


def test_the_weights_get_the_gradient_of_the_mixture() -> None:
    """d/dw_m = T² Σ_c p_m (log mixture − log q + 1)."""
    weights, student, teachers = logits()
    weights.requires_grad_()
    mixture_divergence(weights, student, teachers, 2.0).sum().backward()
    p, q = (teachers / 2).softmax(-1), (student / 2).softmax(-1)
    mixture = torch.einsum("bm,mbc->bc", weights, p)
    expected = 4 * torch.einsum("mbc,bc->bm", p, (mixture / q).log() + 1)
    torch.testing.assert_close(weights.grad, expected.detach())


def test_classes_that_no_teacher_believes_in_leave_the_gradient_finite() -> None:
    weights = torch.full((1, 2), 0.5, requires_grad=True)
    sure = torch.tensor([[[1e4, 0.0, 0.0, 0.0]], [[0.0, 1e4, 0.0, 0.0]]])
    divergence = mixture_divergence(weights, torch.zeros(1, CLASSES), sure, 1.0)
    torch.testing.assert_close(divergence, torch.tensor([log(CLASSES) - log(2)]))
    (gradient,) = torch.autograd.grad(divergence.sum(), weights)
    torch.testing.assert_close(gradient, torch.full((1, 2), log(CLASSES) - log(2) + 1))


# The weights.


def test_latent_factors_by_hand() -> None:
    factors = LatentFactors(2, 2)
    factors.theta.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    factors.v.data = torch.tensor([1.0, 0.5])
    # Maxima (log 2, log 6) of the channels, so scores log 2 · 1 and log 6 · 2 · 0.5.
    feature_map = torch.tensor([[log(2), -5.0], [-9.0, log(6)]]).reshape(1, 2, 1, 2)
    torch.testing.assert_close(factors(feature_map), torch.tensor([[1 / 4, 3 / 4]]))
    assert factors.penalty().item() == pytest.approx(1 + 4 + 1 + 0.25)


def test_latent_factors_of_averages_by_hand() -> None:
    factors = LatentFactors(2, 1, "mean")
    factors.theta.data, factors.v.data = torch.tensor([[0.0], [2.0]]), torch.ones(1)
    feature_map = torch.tensor([log(3), 0.0]).reshape(
        1, 1, 1, 2
    )  # Mean ½ log 3, so scores 0, log 3.
    torch.testing.assert_close(factors(feature_map), torch.tensor([[1 / 4, 3 / 4]]))


def test_the_start_scales_what_is_drawn() -> None:
    small, large = (AMTMLKD(make_tiny_distiller(), start=start).factors for start in (0.1, 1.0))
    torch.testing.assert_close(10 * small.theta, large.theta)
    torch.testing.assert_close(10 * small.v, large.v)


def test_only_the_logit_head_is_learned() -> None:
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    weighting = AMTMLKD(distiller)
    weights = weighting(state)
    torch.testing.assert_close(weights.logit, weighting.factors(state.student.feature_map))
    assert weights.logit.std(0).gt(0).all()  # each sample has weights of its own
    assert weights.feature.eq(1 / 3).all()


# Learning.


def test_the_objective_is_the_mean_divergence_and_the_penalty() -> None:
    distiller = make_tiny_distiller(temperature=2.0)
    state = distiller.forward(batch())
    weighting = AMTMLKD(distiller, penalty=0.3)
    weights, student = weighting(state).logit, state.student.logits.detach()
    divergence = mixture_divergence(weights, student, state.teachers.logits, 2.0)
    expected = divergence.sum() / NUM_ENVS + 0.3 * weighting.factors.penalty()
    torch.testing.assert_close(weighting.objective(state), expected)


def test_the_objective_reaches_the_factors_and_not_the_student() -> None:
    distiller = make_tiny_distiller()
    weighting = AMTMLKD(distiller)
    objective = weighting.objective(distiller.forward(batch()))
    factors = list(weighting.factors.parameters())
    named = [*factors, *distiller.module.parameters()]
    found = torch.autograd.grad(objective, named, allow_unused=True)
    assert all(gradient.abs().sum() > 0 for gradient in found[: len(factors)])
    assert all(gradient is None for gradient in found[len(factors) :])


def test_the_objective_falls_and_the_factors_move() -> None:
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    weighting = AMTMLKD(distiller)
    before = [parameter.clone() for parameter in weighting.factors.parameters()]
    objectives = []
    for _ in range(50):
        objectives.append(weighting.objective(state).item())
        weighting.after_update(state)
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] < objectives[0] - 1e-3
    for parameter, old in zip(weighting.factors.parameters(), before, strict=True):
        assert (parameter - old).abs().min() > 1e-4


def agreeing_with(state: DistillState, m: int) -> DistillState:
    """The state of a student that has the logits of teacher m."""
    return replace(state, student=replace(state.student, logits=state.teachers.logits[m]))


@pytest.mark.parametrize("m", range(M))
def test_left_alone_the_factors_favour_the_teacher_nearest_to_the_student(m: int) -> None:
    distiller = make_tiny_distiller()
    state = agreeing_with(distiller.forward(batch()), m)
    weighting = AMTMLKD(distiller, lr=0.1, penalty=0.0)
    for _ in range(50):
        weighting.after_update(state)
    assert weighting(state).logit[:, m].mean() > 0.9


def test_the_penalty_alone_draws_the_weights_to_one_over_m() -> None:
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    weighting = AMTMLKD(distiller, lr=0.01, penalty=1e4)
    weighting.factors.theta.data.mul_(10)
    assert not weighting(state).logit.allclose(torch.tensor(1 / 3), atol=1e-2)
    for _ in range(400):
        weighting.after_update(state)
    torch.testing.assert_close(weighting(state).logit, torch.full((NUM_ENVS, M), 1 / 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr: expected a finite number >= 0, got -1.0"),
        ({"penalty": float("inf")}, "penalty: expected a finite number >= 0, got inf"),
        ({"pooling": "maxx"}, "pooling: unknown name 'maxx'; did you mean 'max'"),
        ({"start": 0.0}, "start: expected a finite number > 0, got 0.0"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AMTMLKD(make_tiny_distiller(), **arguments)
