from collections.abc import Callable
from math import log

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from mtkd_env.losses import (
    class_shares,
    cross_entropy,
    dist_divergence,
    feature_cosine,
    feature_mse,
    kd_divergence,
    norm_direction,
    teacher_cross_entropy,
)
from tiny import generator

B, C, M = 3, 5, 4
TARGETS = torch.tensor([0, 4, 2])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def log_of(*probabilities: float) -> Tensor:
    """Logits whose softmax are the given probabilities."""
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_cross_entropy_is_minus_the_log_probability_of_the_class() -> None:
    logits = torch.cat([log_of(0.25, 0.5, 0.25), log_of(0.1, 0.1, 0.8)])
    expected = torch.tensor([-log(0.5), -log(0.1)], dtype=torch.float64)
    torch.testing.assert_close(cross_entropy(logits, torch.tensor([1, 0])), expected)


def test_cross_entropy_with_shares_of_one_class_is_that_with_the_class() -> None:
    logits = torch.randn(B, C)
    shares = class_shares(TARGETS, C)
    torch.testing.assert_close(cross_entropy(logits, shares), cross_entropy(logits, TARGETS))
    teachers = torch.randn(M, B, C)
    torch.testing.assert_close(
        teacher_cross_entropy(teachers, shares), teacher_cross_entropy(teachers, TARGETS)
    )


def test_cross_entropy_with_a_mixture_is_the_mixture_of_cross_entropies() -> None:
    logits, teachers = torch.randn(B, C), torch.randn(M, B, C)
    others = (TARGETS + 1) % C
    mixture = 0.7 * class_shares(TARGETS, C) + 0.3 * class_shares(others, C)
    expected = 0.7 * cross_entropy(logits, TARGETS) + 0.3 * cross_entropy(logits, others)
    torch.testing.assert_close(cross_entropy(logits, mixture), expected)
    parts = [teacher_cross_entropy(teachers, labels) for labels in (TARGETS, others)]
    torch.testing.assert_close(
        teacher_cross_entropy(teachers, mixture), 0.7 * parts[0] + 0.3 * parts[1]
    )


def test_smoothing_spreads_a_part_of_the_label_over_all_classes() -> None:
    logits = torch.randn(B, C)
    smooth = 0.9 * class_shares(TARGETS, C) + 0.1 / C
    torch.testing.assert_close(
        cross_entropy(logits, TARGETS, smoothing=0.1), cross_entropy(logits, smooth)
    )


def test_teacher_cross_entropy_is_each_teachers_cross_entropy() -> None:
    teachers = randn(M, B, C)
    expected = torch.stack([cross_entropy(logits, TARGETS) for logits in teachers], dim=1)
    torch.testing.assert_close(teacher_cross_entropy(teachers, TARGETS), expected)


def test_kd_divergence_by_hand_at_temperature_one() -> None:
    student, teacher = log_of(0.25, 0.75), log_of(0.5, 0.5)
    # KL(teacher || student), not its reverse, which is log 2 - (1/4) log 4 - (3/4) log(4/3).
    expected = 0.5 * log(0.5 / 0.25) + 0.5 * log(0.5 / 0.75)
    assert kd_divergence(student, teacher[None], 1.0).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_kd_divergence_softens_by_t_and_scales_by_t_squared(temperature: float) -> None:
    student, teachers = randn(B, C, seed=1), randn(M, B, C, seed=2)
    softened = kd_divergence(student / temperature, teachers / temperature, 1.0)
    torch.testing.assert_close(
        kd_divergence(student, teachers, temperature), temperature**2 * softened
    )


def test_kd_gradient_keeps_its_scale_as_the_temperature_grows() -> None:
    """T² KL tends to the squared distance of the centred logits over 2C (Hinton et al., 2015)."""
    student, teachers = randn(B, C, seed=1).requires_grad_(), randn(1, B, C, seed=2)
    kd_divergence(student, teachers, 1e4).sum().backward()
    difference = student.detach() - teachers[0]
    expected = (difference - difference.mean(1, keepdim=True)) / C
    torch.testing.assert_close(student.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("divergence", [kd_divergence, dist_divergence])
def test_a_divergence_has_one_column_per_teacher(divergence: Callable[..., Tensor]) -> None:
    student, teachers = randn(B, C, seed=1), randn(M, B, C, seed=2)
    joint = divergence(student, teachers, 3.0)
    assert joint.shape == (B, M)
    for m in range(M):
        alone = divergence(student, teachers[m : m + 1], 3.0)
        torch.testing.assert_close(joint[:, m : m + 1], alone)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_of_the_weighted_sum_is_that_of_the_weighted_teacher(temperature: float) -> None:
    student, teachers = randn(B, C, seed=1).requires_grad_(), randn(M, B, C, seed=2)
    weights = randn(B, M, seed=3).softmax(1)
    summed = (weights * kd_divergence(student, teachers, temperature)).sum()
    mixture = torch.einsum("bm,mbc->bc", weights, (teachers / temperature).softmax(-1))
    mixed = kd_divergence(student, temperature * mixture.log()[None], temperature).sum()
    assert summed > mixed  # the values differ, by convexity; only the gradients agree
    (of_sum,) = torch.autograd.grad(summed, student)
    (of_mixture,) = torch.autograd.grad(mixed, student)
    torch.testing.assert_close(of_sum, of_mixture, rtol=1e-12, atol=1e-14)


def maps_like(teachers: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    return tuple(randn(*one.shape, seed=seed + m) for m, one in enumerate(teachers))


SHAPES = ((2, 3, 3), (4, 3, 3), (3, 1, 2))


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_feature_losses_are_those_of_each_teacher_alone(
    merged: bool, layout: torch.memory_format
) -> None:
    """Whatever the layout, and for maps that are parts of one tensor."""
    theirs = tuple(randn(B, *shape, seed=m) for m, shape in enumerate(SHAPES))
    ours = maps_like(theirs, seed=10)
    found = ours
    if merged:
        found = (*torch.cat(ours[:2], dim=1).split([2, 4], dim=1), ours[2])
    found, known = (
        tuple(one.contiguous(memory_format=layout) for one in maps) for maps in (found, theirs)
    )
    distances = [(a - b).square().flatten(1).mean(1) for a, b in zip(ours, theirs, strict=True)]
    torch.testing.assert_close(feature_mse(found, known), torch.stack(distances, dim=1))
    cosines = [
        functional.cosine_similarity(a.mean((2, 3)), b.mean((2, 3)))
        for a, b in zip(ours, theirs, strict=True)
    ]
    torch.testing.assert_close(feature_cosine(found, known), torch.stack(cosines, dim=1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_feature_mse_has_the_layout_of_the_maps(
    layout: torch.memory_format,
) -> None:
    theirs = tuple(
        randn(B, *shape, seed=m).contiguous(memory_format=layout) for m, shape in enumerate(SHAPES)
    )
    whole = randn(B, 6, 3, 3, seed=9).contiguous(memory_format=layout).requires_grad_()
    loss = feature_mse(whole.split([2, 4], dim=1), theirs[:2]).sum()
    (gradient,) = torch.autograd.grad(loss, whole)
    assert gradient.is_contiguous(memory_format=layout)


# DIST.


def pearson(first: Tensor, second: Tensor) -> float:
    """The correlation as the authors' code of DIST has it: 1e-8 beside the product of lengths."""
    x, y = (values.numpy() - values.numpy().mean() for values in (first, second))
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y) + 1e-8))


def scalar_dist(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """The loss of the paper for one teacher: means over samples and over classes."""
    q, p = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    between_classes = [1 - pearson(q[b], p[b]) for b in range(B)]
    between_samples = [1 - pearson(q[:, c], p[:, c]) for c in range(C)]
    return temperature**2 * float(np.mean(between_classes) + np.mean(between_samples))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_divergence_averages_to_the_loss_of_the_paper(temperature: float) -> None:
    student, teachers = randn(B, C, seed=1), randn(M, B, C, seed=2)
    found = dist_divergence(student, teachers, temperature)
    assert found.shape == (B, M)
    for m in range(M):
        expected = scalar_dist(student, teachers[m], temperature)
        assert found[:, m].mean().item() == pytest.approx(expected, rel=1e-9)


def test_samples_differ_in_dist_by_the_correlation_of_their_own_classes() -> None:
    student, teachers = randn(B, C, seed=1), randn(M, B, C, seed=2)
    found = dist_divergence(student, teachers, 2.0)
    q, p = (student / 2).softmax(1), (teachers / 2).softmax(2)
    own = torch.tensor([[4 * (1 - pearson(q[b], p[m, b])) for m in range(M)] for b in range(B)])
    torch.testing.assert_close((found - found[:1]).float(), own - own[:1])


def test_dist_divergence_by_hand() -> None:
    # One sample alone does not vary between samples, which counts 1.
    student, teacher = log_of(0.5, 0.3, 0.1, 0.1), log_of(0.1, 0.3, 0.5, 0.1)
    q, p = torch.tensor([0.25, 0.05, -0.15, -0.15]), torch.tensor([-0.15, 0.05, 0.25, -0.15])
    correlation = (q @ p / (q @ q)).item()
    assert correlation == pytest.approx(-5 / 11)
    found = dist_divergence(student, teacher[None], 1.0).item()
    assert found == pytest.approx(1 - correlation + 1)


def test_what_hardly_varies_counts_as_uncorrelated_in_dist() -> None:
    # A class that nobody believes in, in no sample.
    student = randn(B, C)
    student[:, 0] = -12 + 1e-2 * student[:, 0]
    q = student.softmax(1)
    assert pearson(q[:, 0], q[:, 0]) < 0.1
    found = dist_divergence(student, student.unsqueeze(0), 1.0).mean().item()
    assert found == pytest.approx(scalar_dist(student, student, 1.0), rel=1e-9)
    assert found > 0.9 / C


def test_dist_divergence_of_a_student_without_opinion_has_second_derivatives() -> None:
    student = torch.zeros(1, C, requires_grad=True)
    divergence = dist_divergence(student, randn(M, 1, C, dtype=torch.float32), 1.0)
    (gradient,) = torch.autograd.grad(divergence.sum(), student, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), student)
    assert second.isfinite().all()


def test_a_student_without_opinion_has_a_finite_gradient_in_dist() -> None:
    student = torch.zeros(B, C, requires_grad=True)
    divergence = dist_divergence(student, randn(M, B, C, dtype=torch.float32), 1.0)
    torch.testing.assert_close(divergence, torch.full((B, M), 2.0))
    divergence.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


# ND.

DIRECTIONS = (
    torch.tensor([[2.0, 0.0], [0.0, 0.5], [3.0, 4.0], [1.0, 0.0], [-1.0, 0.0]]),
    torch.randn(C, 3, generator=generator(7)),
)


def nd(ours: Tensor, theirs: Tensor, targets: Tensor, directions: Tensor = DIRECTIONS[0]) -> Tensor:
    return norm_direction((ours,), (theirs,), (directions,), targets).squeeze(1)


def test_norm_direction_equals_a_loop_over_samples_and_teachers() -> None:
    ours, theirs = (tuple(randn(B, w, seed=s + w) for w in (2, 3)) for s in (0, 10))
    found = norm_direction(ours, theirs, DIRECTIONS, TARGETS)
    assert found.shape == (B, 2)
    for m in range(2):
        for b in range(B):
            s, t = ours[m][b].numpy(), theirs[m][b].numpy()
            e = DIRECTIONS[m][TARGETS[b]].double().numpy()
            length = max(np.linalg.norm(s), np.linalg.norm(t))
            expected = 1 - s @ (e / np.linalg.norm(e)) / length
            assert found[b, m].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("length", [0.0, 1.0])
def test_norm_direction_has_a_finite_gradient_at_zero_features(length: float) -> None:
    ours = torch.zeros(B, 2, requires_grad=True)
    loss = nd(ours, torch.full((B, 2), length), TARGETS)
    assert loss.eq(1).all()
    loss.sum().backward()
    assert ours.grad is not None
    assert ours.grad.isfinite().all()
    assert (ours.grad * DIRECTIONS[0][TARGETS]).sum(1).lt(0).all()  # towards the class's mean


def test_a_class_without_a_mean_teaches_no_direction() -> None:
    ours = randn(B, 2, dtype=torch.float32).requires_grad_()
    loss = nd(ours, torch.ones(B, 2), TARGETS, torch.zeros(C, 2))
    assert loss.eq(1).all()
    loss.sum().backward()
    assert ours.grad is not None
    assert ours.grad.eq(0).all()


def test_numbers_of_features_and_directions_must_agree() -> None:
    features = (torch.ones(B, 2),) * 2
    with pytest.raises(ValueError, match="argument"):
        norm_direction(features, features, DIRECTIONS[:1], TARGETS)


# All losses.


def maps_of(values: Tensor) -> tuple[Tensor, ...]:
    return (values.reshape(B, 2, 1, 2), values.reshape(B, 1, 2, 2))


LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "cross_entropy": (lambda x: cross_entropy(x, TARGETS), (B, C)),
    "teacher_cross_entropy": (lambda x: teacher_cross_entropy(x, TARGETS), (M, B, C)),
    "kd_divergence": (lambda x: kd_divergence(x, randn(M, B, C, seed=9), 4.0), (B, C)),
    "dist_divergence": (lambda x: dist_divergence(x, randn(M, B, C, seed=9), 4.0), (B, C)),
    "norm_direction": (lambda x: nd(x, randn(B, 2, seed=9), TARGETS), (B, 2)),
    "feature_mse": (lambda x: feature_mse(maps_of(x), maps_of(randn(B, 4, seed=9))), (B, 4)),
    "feature_cosine": (lambda x: feature_cosine(maps_of(x), maps_of(randn(B, 4, seed=9))), (B, 4)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    loss, shape = LOSSES[name]
    assert gradcheck(loss, randn(*shape, seed=5).requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_are_float32_at_least(name: str, dtype: torch.dtype) -> None:
    loss, shape = LOSSES[name]
    values = randn(*shape, seed=5).to(dtype)
    result = loss(values)
    assert result.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(result.double(), loss(values.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_losses_and_gradients_of_logits_are_finite_at_extremes(
    dtype: torch.dtype, temperature: float
) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0]], dtype=dtype)
    student.requires_grad_()
    targets = torch.tensor([1, 0, 2])
    # The last teacher agrees, the first one is as far away as can be.
    teachers = torch.stack([-student.detach(), student.detach()])
    terms = [
        cross_entropy(student, targets),
        teacher_cross_entropy(teachers, targets),
        kd_divergence(student, teachers, temperature),
        dist_divergence(student, teachers, temperature),
        dist_divergence(student[:1], teachers[:, :1], temperature),
    ]
    assert all(term.isfinite().all() for term in terms)
    torch.stack([term.sum() for term in terms]).sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_differences_of_half_precision_features_do_not_overflow() -> None:
    ours, theirs = torch.full((1, 1, 2, 2), 300.0), torch.full((1, 1, 2, 2), -300.0)
    distance = feature_mse((ours.half(),), (theirs.half(),))  # 360,000; the largest half is 65,504
    torch.testing.assert_close(distance, torch.tensor([[360_000.0]]))


def test_feature_cosine_of_a_dead_map_is_zero() -> None:
    dead = torch.zeros(1, 2, 2, 2)
    assert feature_cosine((dead,), (torch.ones(1, 2, 2, 2),)).item() == 0


def test_numbers_of_maps_must_agree() -> None:
    maps = (torch.zeros(1, 1, 1, 1),)
    with pytest.raises(ValueError, match="argument"):
        feature_mse(maps, maps * 2)
