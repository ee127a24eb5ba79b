from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mtkd_env.distiller import Distiller
from mtkd_env.optimization import Recipe
from mtkd_env.teachers import TeacherEnsemble
from mtkd_env.terms import Distillation
from mtkd_env.types import DistillState, NetworkOutput, TeacherWeights
from tiny import (
    CLASSES,
    IMAGE_SHAPE,
    STEPS_PER_EPOCH,
    TinyNetwork,
    assert_same,
    batch,
    generator,
    make_tiny_distiller,
    perturb,
    random_weights,
    snapshot,
    teacher_networks,
    teachers,
    training_set,
)

M = 3


def train(distiller: Distiller, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        distiller.update(distiller.forward(batch(step)), random_weights(step))


def with_gradient(distiller: Distiller, term: Tensor) -> set[str]:
    """Names of the parameters that a term has a gradient other than zero for."""
    named = dict(distiller.module.named_parameters())
    gradients = torch.autograd.grad(
        term.sum(), list(named.values()), retain_graph=True, allow_unused=True
    )
    return {
        name
        for name, gradient in zip(named, gradients, strict=True)
        if gradient is not None and gradient.abs().sum() > 1e-5
    }


def assert_states_equal(first: DistillState, second: DistillState) -> None:
    for name in ("cross_entropy", "kd", "feature", "similarity", "divergence", "distance"):
        assert getattr(first, name).equal(getattr(second, name)), name
    assert first.student.logits.equal(second.student.logits)
    assert first.student.feature_map.equal(second.student.feature_map)


# The loss.


@pytest.mark.parametrize("term", ["cross_entropy", "kd"])
def test_logit_terms_reach_all_of_the_student_and_no_regressor(term: str) -> None:
    distiller = make_tiny_distiller()
    found = with_gradient(distiller, getattr(distiller.forward(batch()), term))
    names = {name for name, _ in distiller.module.named_parameters()}
    # The bias of a convolution before a batch norm has no effect; these networks have none.
    assert found == {name for name in names if name.startswith("student.")}


@pytest.mark.parametrize("m", range(M))
def test_each_feature_term_reaches_the_student_and_its_own_regressor(m: int) -> None:
    distiller = make_tiny_distiller()
    found = with_gradient(distiller, distiller.forward(batch()).feature[:, m])
    assert any(name.startswith("student.body") for name in found)
    assert not any(name.startswith("student.classifier") for name in found)
    parts = ("convolution.weight", "norm.weight", "norm.bias")
    assert {name for name in found if name.startswith("regressors")} == {
        f"regressors.{m}.{part}" for part in parts
    }


def test_state_without_graph_carries_none() -> None:
    state = make_tiny_distiller().forward(batch())
    for name in ("teacher_cross_entropy", "divergence", "distance", "similarity"):
        assert not getattr(state, name).requires_grad, name
    assert not state.teachers.logits.requires_grad
    for name in ("cross_entropy", "kd", "feature"):
        assert getattr(state, name).requires_grad, name


def test_smoothed_labels_are_the_students_alone() -> None:
    """What it is trained by, and rewarded for; not what teachers know, nor what is reported."""
    smooth, sharp = (
        make_tiny_distiller(recipe=Recipe(epochs=4, lr=0.1, label_smoothing=smoothing))
        for smoothing in (0.3, 0.0)
    )
    found, plain = smooth.forward(batch()), sharp.forward(batch())
    expected = functional.cross_entropy(
        plain.student.logits, batch().targets, reduction="none", label_smoothing=0.3
    )
    torch.testing.assert_close(found.cross_entropy, expected)
    torch.testing.assert_close(smooth.revisit(found).cross_entropy, expected)
    assert found.teacher_cross_entropy.equal(plain.teacher_cross_entropy)
    assert smooth.evaluate(evaluation()) == sharp.evaluate(evaluation())
    terms = smooth.update(found, random_weights())
    torch.testing.assert_close(terms.cross_entropy, expected)


def test_weights_with_a_graph_get_the_gradient_of_the_loss() -> None:
    distiller = make_tiny_distiller()
    logits = torch.randn(4, M, generator=generator(1)).requires_grad_()
    state = distiller.forward(batch())
    terms = distiller.update(state, TeacherWeights(logits.softmax(1), logits.softmax(1)))
    value = (
        distiller.distillation.alpha * terms.kd + distiller.distillation.beta * terms.feature
    ) / 4
    p = logits.detach().softmax(1)
    expected = p * (value - (p * value).sum(1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-6)


def test_gradients_do_not_add_up_over_updates() -> None:
    once, twice = make_tiny_distiller(), make_tiny_distiller()
    for distiller in (once, twice):
        state = distiller.forward(batch())
        if distiller is twice:
            distiller.module.student.classifier.weight.grad = torch.ones(CLASSES, 6)
        distiller.update(state, random_weights())
    assert_same(twice.module, snapshot(once.module))


# Teachers.


def test_teachers_stay_the_same_bit_for_bit() -> None:
    ensemble = TeacherEnsemble(teacher_networks(), ("a", "b", "c"))
    before = snapshot(ensemble)
    assert any("running_mean" in name for name in before)  # statistics that could move
    distiller = make_tiny_distiller(ensemble=ensemble)
    train(distiller, 2)
    distiller.teachers.train()
    train(distiller, 2)
    assert_same(ensemble, before)
    assert all(parameter.grad is None for parameter in ensemble.parameters())


def test_optimizer_holds_student_and_regressors_and_no_teacher() -> None:
    distiller = make_tiny_distiller()
    held = {id(p) for group in distiller.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in distiller.module.parameters()}
    assert not held & {id(p) for p in distiller.teachers.parameters()}


def test_regressors_fit_every_teachers_map_and_sign() -> None:
    narrow, wide, signed = make_tiny_distiller().forward(batch()).projected
    assert narrow.shape == (4, 4, 2, 2)
    assert wide.shape == (4, 8, 4, 4)
    assert signed.shape == (4, 5, 2, 2)
    assert narrow.ge(0).all()
    assert wide.ge(0).all()
    assert signed.lt(0).any()


# Revisit.


def test_revisit_leaves_parameters_and_buffers_untouched() -> None:
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    before = snapshot(distiller.module)
    revisited = distiller.revisit(state)
    assert_same(distiller.module, before)
    assert not revisited.cross_entropy.requires_grad
    assert distiller.module.training


def test_revisit_equals_forward_when_nothing_changed() -> None:
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    assert_states_equal(distiller.revisit(state), state)


def test_revisit_sees_the_student_after_the_update() -> None:
    distiller = make_tiny_distiller()
    state = distiller.forward(batch())
    distiller.update(state, random_weights())
    revisited = distiller.revisit(state)
    assert not revisited.kd.allclose(state.kd)
    assert revisited.teachers is state.teachers
    assert_states_equal(distiller.forward(batch()), revisited)


# Imagine.


def test_imagining_the_students_own_parameters_is_revisiting() -> None:
    distiller = make_tiny_distiller()
    train(distiller, 2)
    state = distiller.forward(batch())
    own = dict(distiller.module.named_parameters())
    for parameters in ({}, own, {name: own[name] for name in list(own)[:3]}):
        imagined = distiller.imagine(state.batch, state.teachers, parameters)
        assert_states_equal(imagined, distiller.revisit(state))
        assert imagined.teachers is state.teachers
        assert imagined.cross_entropy.requires_grad


def test_imagining_changes_nothing() -> None:
    distiller, other = make_tiny_distiller(), make_tiny_distiller(seed=1)
    train(distiller, 2)
    state = distiller.forward(batch())
    distiller.optimizer.zero_grad(set_to_none=True)
    before = snapshot(distiller.module)
    parameters = {name: p.detach() for name, p in other.module.named_parameters()}
    imagined = distiller.imagine(state.batch, state.teachers, parameters)
    assert not imagined.kd.allclose(state.kd)
    assert_same(distiller.module, before)
    assert all(p.grad is None and p.requires_grad for p in distiller.module.parameters())
    assert distiller.module.training


def test_what_is_imagined_is_what_a_student_with_those_parameters_sees() -> None:
    distiller, other = make_tiny_distiller(seed=0), make_tiny_distiller(seed=1)
    train(other, 2)
    expected = other.forward(batch())
    parameters = dict(other.module.named_parameters())
    assert_states_equal(distiller.imagine(batch(), expected.teachers, parameters), expected)


def test_imagined_losses_are_differentiable_in_the_given_parameters_alone() -> None:
    distiller = make_tiny_distiller()
    own = list(distiller.module.parameters())
    expected = torch.autograd.grad(
        distiller.teacher_loss(distiller.forward(batch()), random_weights()).mean(),
        own,
        allow_unused=True,
    )
    # A parameter of a parameter, as in a virtual step.
    scale = torch.ones((), requires_grad=True)
    given = {
        name: scale * parameter.detach() for name, parameter in distiller.module.named_parameters()
    }
    known = distiller.teachers(batch().inputs)
    loss = distiller.teacher_loss(distiller.imagine(batch(), known, given), random_weights()).mean()
    found = torch.autograd.grad(loss, [*given.values(), scale, *own], allow_unused=True)
    for gradient, other in zip(found, expected, strict=False):
        assert (gradient is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(gradient, other)
    pairs = zip(expected, own, strict=True)
    along = sum((g * p).sum() for g, p in pairs if g is not None)
    torch.testing.assert_close(found[len(own)], along.detach(), rtol=1e-4, atol=1e-5)
    assert all(gradient is None for gradient in found[len(own) + 1 :])


def test_distillation_is_what_the_teachers_add_to_the_loss() -> None:
    distiller = make_tiny_distiller(alpha=0.7, beta=1.3)
    state, weights = distiller.forward(batch()), random_weights()
    added = distiller.teacher_loss(state, weights)
    expected = sum(
        0.7 * weights.logit[:, m] * state.kd[:, m]
        + 1.3 * weights.feature[:, m] * state.feature[:, m]
        for m in range(M)
    )
    torch.testing.assert_close(added, expected)
    terms = distiller.update(state, weights)
    torch.testing.assert_close(terms.total, terms.cross_entropy + added.detach())
    assert terms.kd.equal(state.kd.detach())
    assert terms.feature.equal(state.feature.detach())
    parts = (terms.cross_entropy, terms.kd, terms.feature, terms.total)
    assert not any(part.requires_grad for part in parts)


def test_without_any_loss_of_the_teachers_the_student_learns_from_the_classes_alone() -> None:
    without = make_tiny_distiller(logit="none", feature="none")
    silent = make_tiny_distiller(alpha=0.0, beta=0.0)
    for distiller in (without, silent):
        train(distiller, 2)
    assert_same(without.student, snapshot(silent.student))


# Layout.


class Flattening(TinyNetwork):
    """Takes its map apart as only one layout allows, and has a part that is not to be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body.eval()

    def head(self, feature_map: Tensor) -> NetworkOutput:
        flat = feature_map.view(len(feature_map), self.feature_dim, -1).mean(2)
        flat = flat + 0 * feature_map.view(-1, 2)[: len(flat), :1]
        return replace(super().head(feature_map), feature=flat)


def is_channels_last(distiller: Distiller) -> bool:
    weights = [p for p in distiller.student.parameters() if p.ndim == 4 and min(p.shape) > 1]
    assert weights
    return all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_students_compute_channels_last_where_they_can() -> None:
    distiller = make_tiny_distiller()
    assert is_channels_last(distiller)
    state = distiller.forward(batch())
    for one in (state.student.feature_map, *state.projected):
        assert one.stride(1) == 1
    train(distiller, 2)
    assert is_channels_last(distiller)


def test_a_student_that_cannot_compute_channels_last_keeps_its_layout_and_mode() -> None:
    distiller = Distiller(
        Flattening,
        teachers(),
        image_shape=IMAGE_SHAPE,
        steps_per_epoch=2,
        distillation=Distillation(),
        recipe=Recipe(),
    )
    assert not is_channels_last(distiller)
    assert distiller.student.training
    assert not any(part.training for part in distiller.student.body.modules())
    train(distiller, 2)


def test_steps_do_not_depend_on_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        ensemble = TeacherEnsemble(teacher_networks(), ("a", "b", "c"))
        last = make_tiny_distiller(ensemble=ensemble)
        monkeypatch.setattr("mtkd_env.distiller._prefer_channels_last", lambda *_: None)
        first = make_tiny_distiller(ensemble=ensemble)
        for distiller in (last, first):
            train(distiller, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert is_channels_last(last)
    assert not is_channels_last(first)
    for name, tensor in first.module.state_dict().items():
        found = last.module.state_dict()[name]
        torch.testing.assert_close(found, tensor, rtol=1e-9, atol=1e-9, msg=name)


# Schedule.


def test_learning_rate_falls_at_the_milestones_and_not_before() -> None:
    recipe = Recipe(epochs=4, lr=0.1, milestones=(0.5, 0.75), decay=0.1)
    distiller = make_tiny_distiller(recipe=recipe)
    rates = []
    for step in range(4 * STEPS_PER_EPOCH):
        rates.append(distiller.optimizer.param_groups[0]["lr"])
        train(distiller, 1, first=step)
    epochs = [0.1] * 2 + [0.01] + [0.001]
    assert rates == pytest.approx([lr for lr in epochs for _ in range(STEPS_PER_EPOCH)])


# Beginning and going on.


def test_reinitialize_reproduces_a_student_from_its_seed() -> None:
    distiller = make_tiny_distiller(seed=5)
    first = snapshot(distiller.module)
    train(distiller, STEPS_PER_EPOCH * 3)
    distiller.reinitialize(5)
    assert_same(distiller.module, first)
    assert distiller.optimizer.param_groups[0]["lr"] == distiller.recipe.lr
    assert distiller.optimizer.state_dict()["state"] == {}
    distiller.reinitialize(6)
    weight = distiller.module.state_dict()["student.classifier.weight"]
    assert not weight.equal(first["student.classifier.weight"])


def test_a_reinitialized_student_trains_like_a_new_one() -> None:
    used, new = make_tiny_distiller(seed=1), make_tiny_distiller(seed=2)
    train(used, 4)
    used.reinitialize(2)
    for distiller in (used, new):
        train(distiller, 3)
    assert_same(used.module, snapshot(new.module))


def test_initialisation_ignores_and_leaves_the_global_generator() -> None:
    torch.manual_seed(0)
    first = make_tiny_distiller(seed=3)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1).equal(drawn)
    second = make_tiny_distiller(seed=3)
    assert_same(second.module, snapshot(first.module))


def test_resuming_equals_going_on_bit_for_bit() -> None:
    uninterrupted, resumed = make_tiny_distiller(seed=1), make_tiny_distiller(seed=2)
    # Across a milestone of the schedule, to see that its position is kept.
    before = round(uninterrupted.recipe.milestones[0] * 4) * STEPS_PER_EPOCH - 1
    train(uninterrupted, before)
    resumed.load_state_dict(deepcopy(uninterrupted.state_dict()))
    for distiller in (uninterrupted, resumed):
        train(distiller, 4, first=before)
    assert_same(resumed.module, snapshot(uninterrupted.module))
    rates = [d.optimizer.param_groups[0]["lr"] for d in (uninterrupted, resumed)]
    assert rates[0] == rates[1] < uninterrupted.recipe.lr


def nd_distiller(seed: int) -> Distiller:
    return make_tiny_distiller(feature="nd", seed=seed)


def test_projections_are_trained_kept_and_reinitialised_with_the_student() -> None:
    uninterrupted, resumed = nd_distiller(1), nd_distiller(2)
    first = snapshot(uninterrupted.module)
    train(uninterrupted, 2)
    name = "projections.1.1.weight"
    assert not uninterrupted.module.state_dict()[name].allclose(first[name])
    resumed.load_state_dict(deepcopy(uninterrupted.state_dict()))
    for distiller in (uninterrupted, resumed):
        train(distiller, 2, first=2)
    assert_same(resumed.module, snapshot(uninterrupted.module))
    resumed.reinitialize(1)
    assert_same(resumed.module, first)


def test_projections_leave_the_first_student_as_it_would_be_without_them() -> None:
    plain = snapshot(make_tiny_distiller(seed=1).module)
    found = nd_distiller(1).module.state_dict()
    assert all(found[name].equal(tensor) for name, tensor in plain.items())


# Evaluation.


def evaluation() -> Iterator[object]:
    return iter([batch(1, size=8), batch(2, size=3)])


def test_evaluation_leaves_mode_parameters_and_statistics_alone() -> None:
    distiller = make_tiny_distiller()
    before = snapshot(distiller.module)
    distiller.evaluate(evaluation())
    assert_same(distiller.module, before)
    assert all(module.training for module in distiller.module.modules())
    distiller.student.eval()
    distiller.evaluate(evaluation())
    assert not distiller.student.training


def test_evaluation_is_the_mean_over_all_images() -> None:
    distiller = make_tiny_distiller()
    perturb(distiller.student, 1)
    images, targets = (
        torch.cat([getattr(b, name) for b in evaluation()]) for name in ("inputs", "targets")
    )
    logits = distiller.student(images).logits
    result = distiller.evaluate(evaluation())
    assert result.accuracy == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    assert 0 < result.accuracy < 1
    expected = functional.cross_entropy(logits, targets).item()
    assert result.cross_entropy == pytest.approx(expected, rel=1e-5)


def test_updates_let_the_student_learn() -> None:
    """The loss of a batch that is seen again and again falls by half."""
    distiller = make_tiny_distiller(recipe=Recipe(lr=0.05))
    images = training_set(16).splits.train
    seen = replace(batch(size=16), inputs=(images.images / 255 - 0.5) * 3, targets=images.targets)
    losses = []
    for _ in range(30):
        state = distiller.forward(seen)
        losses.append(
            distiller.update(state, TeacherWeights.uniform(state.divergence)).cross_entropy
        )
    assert losses[-1].mean() < losses[0].mean() / 2
