from math import exp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtkd_env.action import (
    FUSIONS,
    PARTS,
    WeightFusion,
    confidence_weights,
    divergence_weights,
    fuse,
    generated_weights,
)
from mtkd_env.errors import ConfigError
from mtkd_env.types import TeacherWeights
from tiny import generator, make_state, random_state, reorder_teachers

ORDER = [2, 0, 1]


def actions(size: int = 5, count: int = 3, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(size, 2 * count, generator=generator(1))


def assert_simplex(weights: TeacherWeights) -> None:
    for head in (weights.logit, weights.feature):
        assert head.ge(0).all()
        torch.testing.assert_close(head.sum(1), torch.ones(len(head)))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("scale", [0.0, 3.0, 1e4])
def test_rows_of_every_fusion_lie_on_the_simplex(fusion: str, count: int, scale: float) -> None:
    weights = WeightFusion(fusion)(actions(5, count, scale), random_state(1, 5, count))
    assert weights.logit.shape == weights.feature.shape == (5, count)
    assert_simplex(weights)
    for part in weights.parts.values():
        assert_simplex(part)


@settings(max_examples=30)
@given(
    st.integers(1, 6).flatmap(
        lambda m: st.lists(st.floats(-1e6, 1e6, width=32), min_size=3 * m, max_size=3 * m)
    )
)
def test_evidence_lies_on_the_simplex_for_any_numbers(numbers: list[float]) -> None:
    cross_entropy, divergence, similarity = torch.tensor(numbers).reshape(3, 1, -1)
    assert_simplex(confidence_weights(cross_entropy))
    assert_simplex(divergence_weights(divergence, similarity))


def test_generated_weights_are_softmaxes_of_the_two_halves() -> None:
    weights = generated_weights(torch.tensor([[0.0, 1.0, 5.0, 5.0]]))
    first = 1 / (1 + exp(1))
    torch.testing.assert_close(weights.logit, torch.tensor([[first, 1 - first]]))
    torch.testing.assert_close(weights.feature, torch.tensor([[0.5, 0.5]]))


def test_confidence_weights_are_equation_9() -> None:
    cross_entropy = torch.tensor([[0.0, 1.0, 2.0]])
    total = 1 + exp(1) + exp(2)
    expected = torch.tensor([[1 - 1 / total, 1 - exp(1) / total, 1 - exp(2) / total]]) / 2
    weights = confidence_weights(cross_entropy)
    torch.testing.assert_close(weights.logit, expected)
    assert weights.feature.equal(weights.logit)


def test_divergence_weights_are_equations_10_to_12() -> None:
    divergence, similarity = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, -1.0]])
    weights = divergence_weights(divergence, similarity)
    low, high = 1 / (1 + exp(2)), exp(2) / (1 + exp(2))
    torch.testing.assert_close(weights.logit, torch.tensor([[low, high]]))
    torch.testing.assert_close(weights.feature, torch.tensor([[high, low]]))


@pytest.mark.parametrize("fusion", ["paper", "learnable"])
def test_paper_fusion_is_the_mean_of_the_three_parts(fusion: str) -> None:
    state, action = random_state(), actions()
    parts = [
        generated_weights(action),
        confidence_weights(state.teacher_cross_entropy),
        divergence_weights(state.divergence, state.similarity),
    ]
    weights = WeightFusion(fusion)(action, state)
    torch.testing.assert_close(weights.logit, sum(part.logit for part in parts) / 3)
    torch.testing.assert_close(weights.feature, sum(part.feature for part in parts) / 3)


@pytest.mark.parametrize("name", [*PARTS, *sorted(name for name in FUSIONS if "+" in name)])
def test_a_fusion_named_by_its_parts_is_their_mean(name: str) -> None:
    weights = WeightFusion(name)(actions(), random_state())
    parts = [weights.parts[part] for part in name.split("+")]
    torch.testing.assert_close(weights.logit, sum(part.logit for part in parts) / len(parts))
    torch.testing.assert_close(weights.feature, sum(part.feature for part in parts) / len(parts))


def test_fuse_takes_other_coefficients_for_each_head() -> None:
    pairs = [([1.0, 0.0], [0.0, 1.0]), ([0.0, 1.0], [0.5, 0.5]), ([0.5, 0.5], [1.0, 0.0])]
    parts = {
        name: TeacherWeights(torch.tensor([logit]), torch.tensor([feature]))
        for name, (logit, feature) in zip(PARTS, pairs, strict=True)
    }
    weights = fuse(torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]]), parts)
    torch.testing.assert_close(weights.logit, torch.tensor([[0.45, 0.55]]))
    torch.testing.assert_close(weights.feature, torch.tensor([[0.2, 0.8]]))
    assert weights.parts == parts


def test_coefficients_can_be_given_as_numbers() -> None:
    fusion = WeightFusion([0.2, 0.3, 0.5])
    expected = torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5]])
    torch.testing.assert_close(fusion.coefficients, expected)
    assert list(fusion.parameters()) == []


@pytest.mark.parametrize(
    "coefficients",
    [
        (0.5, 0.5),
        (0.25, 0.25, 0.25, 0.25),
        (0.5, 0.5, 0.5),
        (1.5, -0.5, 0.0),
        (float("nan"), 0.5, 0.5),
        (),
    ],
)
def test_coefficients_off_the_simplex_are_refused(coefficients: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^fusion: expected 3 coefficients >= 0 with sum 1"):
        WeightFusion(coefficients)


def test_an_unknown_fusion_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="unknown fusion 'papr'; did you mean 'paper'"):
        WeightFusion("papr")


def test_reordering_teachers_reorders_the_weights() -> None:
    state, action = random_state(), actions()
    halves = torch.cat([half[:, ORDER] for half in action.chunk(2, dim=1)], dim=1)
    weights = WeightFusion("paper")(action, state)
    reordered = WeightFusion("paper")(halves, reorder_teachers(state, ORDER))
    torch.testing.assert_close(reordered.logit, weights.logit[:, ORDER])
    torch.testing.assert_close(reordered.feature, weights.feature[:, ORDER])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_identical_teachers_and_equal_logits_get_uniform_weights(fusion: str) -> None:
    column = torch.rand(5, 1, generator=generator(3)).expand(5, 3)
    state = make_state(teacher_cross_entropy=column, divergence=2 * column, similarity=-column)
    weights = WeightFusion(fusion)(torch.zeros(5, 6), state)
    torch.testing.assert_close(weights.logit, torch.full((5, 3), 1 / 3))
    torch.testing.assert_close(weights.feature, torch.full((5, 3), 1 / 3))


def test_fixed_coefficients_are_saved_but_not_trained() -> None:
    fusion = WeightFusion("paper")
    assert list(fusion.parameters()) == []
    other = WeightFusion("generator")
    other.load_state_dict(fusion.state_dict())
    torch.testing.assert_close(other.coefficients, torch.full((2, 3), 1 / 3))


def test_learnable_coefficients_of_both_heads_get_gradients_and_stay_on_the_simplex() -> None:
    fusion = WeightFusion("learnable")
    weights = fusion(actions(), random_state())
    (weights.logit[:, 0].sum() + weights.feature[:, 0].sum()).backward()
    (parameter,) = fusion.parameters()
    assert parameter.grad is not None
    assert parameter.grad.abs().sum(1).gt(0).all()
    torch.optim.SGD([parameter], lr=10.0).step()
    assert_simplex(TeacherWeights(fusion.coefficients[:1], fusion.coefficients[1:]))
    assert not fusion.coefficients[0].allclose(fusion.coefficients[1])


def test_actions_get_gradients_through_the_fusion() -> None:
    action = actions().requires_grad_()
    weights = WeightFusion("paper")(action, random_state())
    (weights.logit[:, 0] + weights.feature[:, 1]).sum().backward()
    assert action.grad is not None
    assert action.grad.abs().sum(1).gt(0).all()


def test_uniform_weights_carry_no_graph() -> None:
    like = torch.zeros(2, 4, requires_grad=True)
    weights = TeacherWeights.uniform(like)
    assert not weights.logit.requires_grad
    assert weights.logit.eq(0.25).all()
    assert weights.feature.eq(0.25).all()


def test_a_prior_is_added_to_an_action_in_logits() -> None:
    prior, action = generated_weights(actions()), actions(scale=1.0).flip(0)
    found = WeightFusion("prior", lambda _: prior)(action, random_state())
    for head, drawn in zip(("logit", "feature"), action.chunk(2, dim=1), strict=True):
        before = getattr(prior, head).clamp(min=1e-4).log()
        torch.testing.assert_close(getattr(found, head), (before + drawn).softmax(1))


def test_an_action_brings_back_a_teacher_that_the_prior_leaves_out() -> None:
    nothing = TeacherWeights(*[torch.tensor([[1.0, 0.0, 0.0]] * 5)] * 2)
    action = torch.tensor([[-20.0, 0.0, 20.0] * 2] * 5)
    found = WeightFusion("prior", lambda _: nothing)(action, random_state())
    assert found.logit[:, 2].gt(0.99).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prior",), "fusion: 'prior' needs weights"),
        (("generator", lambda _: None), "prior: only the fusion 'prior' has one"),
    ],
)
def test_a_prior_and_its_fusion_come_together(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        WeightFusion(*arguments)
