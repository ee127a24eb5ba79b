"""Facts that hold for every method in `WEIGHTINGS`; those of single methods come below.

AEKD, AMTML-KD and MMKD have files of their own.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import cycle, product
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import WeightingAgent
from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError
from mtkd_env.teachers import TeacherEnsemble
from mtkd_env.types import DistillState, TeacherOutputs, TeacherWeights
from mtkd_env.weighting import WEIGHTINGS, Weighting
from mtkd_env.weighting.ebkd import entropy_weights, predictive_entropy
from tiny import (
    CLASSES,
    NUM_ENVS,
    TEACHERS,
    TinyNetwork,
    assert_same,
    batch,
    chosen_teachers,
    make_state,
    make_tiny_distiller,
    make_tiny_env,
    random_weights,
    reorder_teachers,
    seldom,
    snapshot,
    with_evidence,
)

ORDER = [2, 0, 1]
# So that a few batches are enough to learn something.
EAGER: dict[str, dict[str, Any]] = {
    "gate": {"hidden": [8], "folds": 2},
    "mmkd": {"meta_every": 1, "buffer_size": NUM_ENVS},
}


def made(name: str, distiller: Distiller, **arguments: Any) -> Weighting:
    return WEIGHTINGS[name](distiller, **(EAGER.get(name, {}) | arguments))


def learns(name: str) -> bool:
    return bool(made(name, make_tiny_distiller()).state_dict())


LEARNING = [name for name in WEIGHTINGS if learns(name)]
PARAMETER_FREE = [name for name in WEIGHTINGS if name not in LEARNING]

every_method = pytest.mark.parametrize("name", WEIGHTINGS)
every_learning_method = pytest.mark.parametrize("name", LEARNING)
every_parameter_free_method = pytest.mark.parametrize("name", PARAMETER_FREE)


def assert_close(found: TeacherWeights, logit: Tensor, feature: Tensor) -> None:
    torch.testing.assert_close(found.logit, logit)
    torch.testing.assert_close(found.feature, feature)


def assert_equal(found: TeacherWeights, expected: TeacherWeights) -> None:
    assert found.logit.equal(expected.logit)
    assert found.feature.equal(expected.feature)


def assert_on_the_simplex(found: TeacherWeights, count: int = len(TEACHERS)) -> None:
    for head in (found.logit, found.feature):
        assert head.shape == (NUM_ENVS, count)
        assert head.ge(0).all()
        torch.testing.assert_close(head.sum(1), torch.ones(NUM_ENVS))


def train(
    distiller: Distiller, weighting: Weighting, steps: int, first: int = 0
) -> list[TeacherWeights]:
    """The weights of some steps, after each of which the method learns."""
    weights: list[TeacherWeights] = []
    for step in range(first, first + steps):
        state = distiller.forward(batch(step))
        weights.append(weighting(state))
        distiller.update(state, weights[-1])
        weighting.after_update(state)
    return weights


# The weights.


@every_method
@pytest.mark.parametrize("count", [1, len(TEACHERS)])
def test_rows_lie_on_the_simplex_before_and_after_learning(name: str, count: int) -> None:
    distiller = make_tiny_distiller(count=count)
    for weights in train(distiller, made(name, distiller), 3):
        assert_on_the_simplex(weights, count)


@every_parameter_free_method
def test_reordering_teachers_reorders_the_weights(name: str) -> None:
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    weights = made(name, distiller)(state)
    other = make_tiny_distiller(ensemble=chosen_teachers(ORDER))
    reordered = made(name, other)(reorder_teachers(state, ORDER))
    assert_close(reordered, weights.logit[:, ORDER], weights.feature[:, ORDER])


@pytest.mark.parametrize(
    ("name", "m"),
    seldom(
        product(PARAMETER_FREE, range(len(TEACHERS))),
        {*zip(PARAMETER_FREE, cycle(range(len(TEACHERS))))},
    ),
)
def test_identical_teachers_have_equal_weights(name: str, m: int) -> None:
    state = make_tiny_distiller().forward(batch())
    thrice = make_tiny_distiller(ensemble=chosen_teachers([m, m, m]))
    uniform = torch.full((NUM_ENVS, 3), 1 / 3)
    assert_close(made(name, thrice)(reorder_teachers(state, [m, m, m])), uniform, uniform)


@every_method
def test_a_seed_reproduces_the_weights(name: str) -> None:
    runs = []
    for disturbance in range(2):
        torch.manual_seed(disturbance)
        distiller = make_tiny_distiller()
        runs.append(train(distiller, made(name, distiller, seed=3), 4))
    for first, second in zip(*runs, strict=True):
        assert_equal(first, second)


@every_learning_method
def test_another_seed_begins_with_other_weights(name: str) -> None:
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    first, second = (made(name, distiller, seed=seed)(state) for seed in (0, 1))
    assert not first.logit.allclose(second.logit)


@every_method
def test_a_method_leaves_the_global_generator_alone(name: str) -> None:
    distiller = make_tiny_distiller()
    before = torch.get_rng_state()
    train(distiller, made(name, distiller), 2)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("name", sorted({*LEARNING} - {"gate"}))  # It has learned before.
def test_learning_changes_the_weights(name: str) -> None:
    distiller = make_tiny_distiller()
    weighting = made(name, distiller, lr=0.1)
    state = distiller.forward(batch())
    before = weighting(state)
    distiller.update(state, before)
    weighting.after_update(state)
    assert not weighting(state).logit.allclose(before.logit, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "learned"), seldom(product(WEIGHTINGS, (1, 3)), {*zip(WEIGHTINGS, cycle((1, 3)))})
)
def test_resuming_equals_going_on(name: str, learned: int) -> None:
    distiller = make_tiny_distiller()
    uninterrupted, resumed = (made(name, distiller, seed=seed) for seed in (0, 1))
    train(distiller, uninterrupted, learned)
    train(distiller, resumed, 1)
    resumed.load_state_dict(deepcopy(uninterrupted.state_dict()))
    for step in range(learned, learned + 4):
        state = distiller.forward(batch(step))
        weights = uninterrupted(state)
        assert_equal(resumed(state), weights)
        distiller.update(state, weights)
        for weighting in (uninterrupted, resumed):
            weighting.after_update(state)


# Extremes.


def extreme_state(distiller: Distiller, dtype: torch.dtype = torch.float32) -> DistillState:
    """Logits of ±1e4; those and the teachers' outputs in the given precision."""
    images = batch()
    known = distiller.teachers(images.inputs)
    teachers = TeacherOutputs(
        logits=(1e4 * known.logits.sign()).to(dtype),
        features=tuple(feature.to(dtype) for feature in known.features),
        feature_maps=tuple(feature_map.to(dtype) for feature_map in known.feature_maps),
    )
    bias = 1e4 * torch.tensor([1.0, -1.0, -1.0, 1.0])
    state = distiller.imagine(images, teachers, {"student.classifier.bias": bias})
    student = replace(state.student, logits=state.student.logits.to(dtype))
    return replace(state, student=student)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_and_half_precise_logits_give_weights_on_the_simplex(
    name: str, dtype: torch.dtype
) -> None:
    distiller = make_tiny_distiller()
    weighting, state = made(name, distiller), extreme_state(distiller, dtype)
    assert state.teachers.logits.abs().min() > 9e3
    for _ in range(2):
        weights = weighting(state)
        assert_on_the_simplex(weights)
        assert weights.logit.dtype == weights.feature.dtype == torch.float32
        weighting.after_update(state)


@every_method
def test_half_precise_outputs_give_nearly_the_same_weights(name: str) -> None:
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    known = state.teachers
    halved = TeacherOutputs(
        known.logits.half(),
        tuple(feature.half() for feature in known.features),
        tuple(feature_map.half() for feature_map in known.feature_maps),
    )
    student = replace(state.student, logits=state.student.logits.half())
    weighting = made(name, distiller)
    expected, found = weighting(state), weighting(replace(state, teachers=halved, student=student))
    torch.testing.assert_close(found.logit, expected.logit, rtol=0, atol=5e-3)
    torch.testing.assert_close(found.feature, expected.feature, rtol=0, atol=5e-3)


# Gradients, and what a method must leave alone.


@every_method
def test_weights_carry_no_graph_and_ask_for_no_gradient(name: str) -> None:
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    weighting = made(name, distiller)
    weights = weighting(state)
    assert not weights.logit.requires_grad
    assert not weights.feature.requires_grad
    assert all(parameter.grad is None for parameter in distiller.module.parameters())
    distiller.update(state, weights)
    before = [parameter.grad.clone() for parameter in distiller.student.parameters()]
    weighting.after_update(state)
    for parameter, gradient in zip(distiller.student.parameters(), before, strict=True):
        assert parameter.grad.equal(gradient)
    assert all(parameter.grad is None for parameter in distiller.teachers.parameters())
    assert not state.teachers.logits.requires_grad


@every_method
def test_a_method_works_where_gradients_are_off(name: str) -> None:
    distiller, twin = make_tiny_distiller(), make_tiny_distiller()
    expected = train(twin, made(name, twin), 3)
    with torch.no_grad():
        found = train(distiller, made(name, distiller), 3)
    for first, second in zip(found, expected, strict=True):
        assert_equal(first, second)


@every_learning_method
def test_learning_leaves_student_optimizer_and_teachers_alone(name: str) -> None:
    ensemble = chosen_teachers([0, 1, 2])
    distiller = make_tiny_distiller(ensemble=ensemble)
    weighting = made(name, distiller)
    train(distiller, weighting, 2)
    state = distiller.forward(batch(7))
    distiller.update(state, weighting(state))
    before, taught = snapshot(distiller.module), snapshot(ensemble)
    optimizer = deepcopy(distiller.optimizer.state_dict())
    rate = distiller.schedule.get_last_lr()
    weighting.after_update(state)
    assert_same(distiller.module, before)
    assert_same(ensemble, taught)
    after = distiller.optimizer.state_dict()
    assert after["param_groups"] == optimizer["param_groups"]
    for key, buffers in optimizer["state"].items():
        assert after["state"][key]["momentum_buffer"].equal(buffers["momentum_buffer"])
    assert distiller.schedule.get_last_lr() == rate
    assert distiller.module.training


# Fairness: at equal weights, every method trains the student in the same way.


class Fixed(Weighting):
    """A method that is asked and learns as usual, but whose weights are not used."""

    def __init__(self, asked: Weighting) -> None:
        super().__init__(asked.distiller, seed=asked.seed)
        self.asked = asked
        self.steps = 0

    def __call__(self, state: DistillState) -> TeacherWeights:
        self.asked(state)
        self.steps += 1
        return random_weights(self.steps)

    def after_update(self, state: DistillState) -> None:
        self.asked.after_update(state)


def gradients(distiller: Distiller) -> dict[str, Tensor]:
    named = distiller.module.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_gradients(distiller: Distiller, expected: dict[str, Tensor]) -> None:
    found = gradients(distiller)
    assert list(found) == list(expected)
    assert [name for name in found if not found[name].equal(expected[name])] == []


@every_method
def test_equal_weights_give_the_same_gradients_and_the_same_student(name: str) -> None:
    distiller, bare = make_tiny_distiller(), make_tiny_distiller()
    weighting = Fixed(made(name, distiller))
    for step in range(6):
        state = distiller.forward(batch(step))
        distiller.update(state, weighting(state))
        bare.update(bare.forward(batch(step)), random_weights(step + 1))
        expected = gradients(bare)
        assert_gradients(distiller, expected)
        weighting.after_update(state)
        assert_gradients(distiller, expected)
        assert_same(distiller.module, snapshot(bare.module))


@every_method
def test_a_method_trains_a_student_in_the_environment(name: str) -> None:
    env = make_tiny_env()
    env.reset(seed=0)
    records: list[Any] = []
    env.subscribe(records.append)
    WeightingAgent(env, made(name, env.distiller)).learn(2, lambda: None)
    assert len(records) == 2 * env.steps_per_epoch
    for record in records:
        assert record.losses.total.isfinite().all()
        assert_on_the_simplex(record.weights)
        assert not record.weights.logit.requires_grad


# AVER.


def test_aver_is_one_over_m_in_both_heads() -> None:
    distiller = make_tiny_distiller()
    weights = WEIGHTINGS["aver"](distiller)(distiller.forward(batch()))
    assert weights.logit.eq(1 / 3).all()
    assert weights.feature.eq(1 / 3).all()


def test_averaged_features_teach_student_and_regressors() -> None:
    """Published codes detach the mean of the feature terms."""
    distiller = make_tiny_distiller(alpha=0.0, beta=1.0)
    state = distiller.forward(batch())
    loss = distiller.teacher_loss(state, WEIGHTINGS["aver"](distiller)(state)).mean()
    loss.backward()
    named = dict(distiller.module.named_parameters())
    for name in ("student.body.0.weight", *(f"regressors.{m}.norm.weight" for m in range(3))):
        assert named[name].grad.abs().sum() > 1e-6, name


# EB-KD.


def logits_of(*probabilities: tuple[float, ...]) -> Tensor:
    """Logits (M, 1, C) whose softmaxes are the given probabilities."""
    return torch.tensor(probabilities).unsqueeze(1).clamp(min=1e-30).log()


UNIFORM_OVER_4_2_1 = logits_of((0.25,) * 4, (0.5, 0.5, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0))


def state_of(logits: Tensor) -> DistillState:
    count, size = logits.shape[:2]
    state = make_state(
        teacher_cross_entropy=torch.zeros(size, count), divergence=torch.zeros(size, count)
    )
    return replace(state, teachers=replace(state.teachers, logits=logits))


def test_predictive_entropy_is_log_k_for_k_equal_classes() -> None:
    expected = torch.tensor([[log(4), log(2), 0.0]])
    torch.testing.assert_close(predictive_entropy(UNIFORM_OVER_4_2_1), expected)


def test_predictive_entropy_is_that_of_predictions_that_are_not_softened() -> None:
    expected = torch.tensor([[-0.7 * log(0.7) - 3 * 0.1 * log(0.1)]])
    torch.testing.assert_close(predictive_entropy(logits_of((0.7, 0.1, 0.1, 0.1))), expected)


def test_ebkd_by_hand() -> None:
    # Shares of the entropy: 2/3, 1/3, 0.
    expected = torch.tensor([[1 / 6, 1 / 3, 1 / 2]])
    weights = WEIGHTINGS["ebkd"](make_tiny_distiller())(state_of(UNIFORM_OVER_4_2_1))
    assert_close(weights, expected, expected)


def test_ebkd_ignores_temperature_targets_and_the_student() -> None:
    first, second = make_tiny_distiller(), make_tiny_distiller(temperature=1.0, seed=1)
    states = [first.forward(batch()), second.forward(replace(batch(), targets=batch(1).targets))]
    weights = [WEIGHTINGS["ebkd"](first)(state) for state in states]
    assert_equal(*weights)


def test_ebkd_is_uniform_where_no_teacher_has_any_doubt() -> None:
    sure = 1e4 * torch.eye(CLASSES)[:3].unsqueeze(1)
    torch.testing.assert_close(entropy_weights(sure), torch.full((1, 3), 1 / 3))


# CA-MKD.


def readable_teachers() -> TeacherEnsemble:
    """Two teachers whose logits are the pooled channels of their maps."""
    networks = [TinyNetwork(CLASSES), TinyNetwork(CLASSES)]
    for network in networks:
        network.classifier.weight.data = torch.eye(CLASSES)
        network.classifier.bias.data.zero_()
    return TeacherEnsemble([network.eval() for network in networks], ["a", "b"])


def map_of(*probabilities: float) -> Tensor:
    """A map (1, C, 1, 2) whose mean over the pixels has the given softmax."""
    mean = torch.tensor(probabilities).log().reshape(1, -1, 1, 1)
    return mean + torch.tensor([-3.0, 3.0])


def test_camkd_by_hand_in_both_heads() -> None:
    state = make_state(
        teacher_cross_entropy=torch.tensor([[log(6), log(2)]]), divergence=torch.zeros(1, 2)
    )
    state = with_evidence(
        replace(state, batch=replace(batch(size=1), targets=torch.tensor([1]))),
        projected=(map_of(0.1, 0.5, 0.2, 0.2), map_of(0.25, 0.25, 0.25, 0.25)),
    )
    weights = WEIGHTINGS["camkd"](make_tiny_distiller(ensemble=readable_teachers()))(state)
    # Cross-entropies log 6, log 2 and log 2, log 4: softmaxes 3/4, 1/4 and 1/3, 2/3.
    assert_close(weights, torch.tensor([[1 / 4, 3 / 4]]), torch.tensor([[2 / 3, 1 / 3]]))


def test_camkd_of_three_teachers_by_hand() -> None:
    state = make_state(
        teacher_cross_entropy=torch.tensor([[log(1), log(2), log(3)]] * NUM_ENVS),
        divergence=torch.zeros(NUM_ENVS, 3),
    )
    distiller = make_tiny_distiller()
    state = with_evidence(state, projected=distiller.forward(batch()).projected)
    expected = torch.tensor([[5 / 12, 4 / 12, 3 / 12]] * NUM_ENVS)
    torch.testing.assert_close(WEIGHTINGS["camkd"](distiller)(state).logit, expected)


def test_camkd_weights_features_like_logits_where_the_student_has_the_teachers_maps() -> None:
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    weights = WEIGHTINGS["camkd"](distiller)(
        with_evidence(state, projected=state.teachers.feature_maps)
    )
    torch.testing.assert_close(weights.feature, weights.logit)


# The norm of the weights.

OFFICIAL: dict[str, Callable[[int], float]] = {
    "camkd": lambda teachers: 1 / teachers,
    "ebkd": lambda teachers: (teachers - 1) / teachers,
}


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("count", range(1, len(TEACHERS) + 1))
def test_official_weights_are_those_on_the_simplex_times_a_factor(name: str, count: int) -> None:
    distiller = make_tiny_distiller(count=count)
    state = distiller.forward(batch())
    simplex, official = (
        WEIGHTINGS[name](distiller, weight_norm=norm)(state) for norm in ("simplex", "official")
    )
    factor = OFFICIAL[name](count)
    assert_close(official, factor * simplex.logit, factor * simplex.feature)


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_unknown_norm_is_named_with_the_nearest(name: str) -> None:
    with pytest.raises(
        ConfigError, match="unknown weight_norm 'officials'; did you mean 'official'"
    ):
        WEIGHTINGS[name](make_tiny_distiller(), weight_norm="officials")


# Evidence: the parts of Equ. 9-14.

EVIDENCE = make_state(
    teacher_cross_entropy=torch.tensor([[log(3), log(1)]]),
    divergence=torch.tensor([[log(4), log(1)]]),
    similarity=torch.tensor([[0.5, 0.5 + log(4)]]),
)
EVIDENCE_BY_HAND = {
    "confidence": ([[1 / 4, 3 / 4]], [[1 / 4, 3 / 4]]),
    "divergence": ([[4 / 5, 1 / 5]], [[1 / 5, 4 / 5]]),
    "evidence": ([[0.525, 0.475]], [[0.225, 0.775]]),
}


@pytest.mark.parametrize("name", EVIDENCE_BY_HAND)
def test_parts_of_the_evidence_by_hand(name: str) -> None:
    expected = [torch.tensor(rows) for rows in EVIDENCE_BY_HAND[name]]
    assert_close(WEIGHTINGS[name](make_tiny_distiller(count=2))(EVIDENCE), *expected)


def test_evidence_keeps_its_parts() -> None:
    weights = WEIGHTINGS["evidence"](make_tiny_distiller(count=2))(EVIDENCE)
    assert_close(weights.parts["generator"], *[torch.tensor([[0.5, 0.5]])] * 2)
    for name in ("confidence", "divergence"):
        logit, feature = (torch.tensor(rows) for rows in EVIDENCE_BY_HAND[name])
        assert_close(weights.parts[name], logit, feature)
