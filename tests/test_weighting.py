"""Facts that hold for every method in `WEIGHTINGS`; each method's own example comes below."""

import pytest
import torch
from torch import Tensor

from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting import WEIGHTINGS, Weighting
from tiny import NUM_ENVS, TEACHERS, batch, make_tiny_distiller, make_tiny_env, reorder_teachers

ORDER = [2, 0, 1]


@pytest.fixture(params=WEIGHTINGS)
def weighting(request: pytest.FixtureRequest) -> Weighting:
    return WEIGHTINGS[request.param]()


@pytest.fixture
def parameter_free(weighting: Weighting) -> Weighting:
    if hasattr(weighting, "parameters"):
        pytest.skip("has parameters of its own, one set per teacher")
    return weighting


def state(count: int = len(TEACHERS)) -> DistillState:
    """A state of a real student, with the graph that a method may differentiate."""
    return make_tiny_distiller(count=count).forward(batch())


def assert_close(found: TeacherWeights, logit: Tensor, feature: Tensor) -> None:
    torch.testing.assert_close(found.logit, logit)
    torch.testing.assert_close(found.feature, feature)


@pytest.mark.parametrize("count", range(1, len(TEACHERS) + 1))
def test_rows_lie_on_the_simplex(weighting: Weighting, count: int) -> None:
    weights = weighting(state(count))
    for head in (weights.logit, weights.feature):
        assert head.shape == (NUM_ENVS, count)
        assert head.ge(0).all()
        torch.testing.assert_close(head.sum(1), torch.ones(NUM_ENVS))


def test_a_single_teacher_has_weight_one(weighting: Weighting) -> None:
    ones = torch.ones(NUM_ENVS, 1)
    assert_close(weighting(state(1)), ones, ones)


def test_reordering_teachers_reorders_the_weights(parameter_free: Weighting) -> None:
    known = state()
    weights, reordered = parameter_free(known), parameter_free(reorder_teachers(known, ORDER))
    assert_close(reordered, weights.logit[:, ORDER], weights.feature[:, ORDER])


def test_identical_teachers_have_equal_weights(parameter_free: Weighting) -> None:
    uniform = torch.full((NUM_ENVS, 3), 1 / 3)
    assert_close(parameter_free(reorder_teachers(state(), [0, 0, 0])), uniform, uniform)


def test_a_method_leaves_the_state_usable_and_asks_for_no_gradient_of_teachers(
    weighting: Weighting,
) -> None:
    distiller = make_tiny_distiller()
    known = distiller.forward(batch())
    weights = weighting(known)
    distiller.update(known, weights)
    assert all(parameter.grad is None for parameter in distiller.teachers.parameters())
    assert all(p.grad is not None for p in distiller.student.parameters())


def test_a_method_trains_a_student_in_the_environment(weighting: Weighting) -> None:
    env = make_tiny_env()
    env.reset(seed=0)
    for _ in range(2):
        record = env.distill(weighting(env.state))
        assert record.losses.total.isfinite().all()
        assert not record.weights.logit.requires_grad


def test_aver_is_one_over_m_in_both_heads() -> None:
    weights = WEIGHTINGS["aver"]()(state())
    assert weights.logit.eq(1 / 3).all()
    assert weights.feature.eq(1 / 3).all()
    assert not weights.logit.requires_grad
