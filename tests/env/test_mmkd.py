"""MMKD: what the meta-networks read, the gradient through the virtual steps, the buffer."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError
from mtkd_env.optimization import Recipe
from mtkd_env.seeding import seeded
from mtkd_env.teachers import TeacherEnsemble
from mtkd_env.teachers.training import TeacherTraining
from mtkd_env.types import Batch, DistillState, TeacherWeights
from mtkd_env.weighting.mmkd import MMKD, HardBuffer, MetaWeights, gram_rows
from tiny import (
    CLASSES,
    IMAGE_SHAPE,
    NUM_ENVS,
    TinyNetwork,
    assert_same,
    batch,
    chosen_teachers,
    generator,
    make_tiny_distiller,
    snapshot,
    training_set,
)

M = 3


# What the networks read.


def test_rows_of_the_gram_matrix_run_over_channels_and_pixels_and_ignore_the_scale() -> None:
    feature_map = torch.randn(5, 3, 2, 4, generator=generator(0))
    rows = gram_rows(feature_map)
    products = torch.einsum("bkhw,ckhw->bc", feature_map, feature_map)
    torch.testing.assert_close(rows, products / products.norm(dim=1, keepdim=True))
    torch.testing.assert_close(gram_rows(1e-3 * feature_map), rows)
    assert gram_rows(torch.zeros(5, 3, 2, 4)).eq(0).all()


def test_the_networks_read_all_teachers_and_then_the_student() -> None:
    state = make_tiny_distiller().forward(batch())
    meta = MetaWeights(NUM_ENVS, M, CLASSES)
    teachers, student = state.teachers, state.student
    logits = torch.cat([*teachers.logits, student.logits], dim=1)
    maps = [*teachers.feature_maps, student.feature_map]
    rows = torch.cat([gram_rows(one) for one in maps], dim=1)
    weights = meta(state)
    assert weights.logit.equal(meta.logit(logits).softmax(1))
    assert weights.feature.equal(meta.feature(rows).softmax(1))
    assert [layer.out_features for layer in (meta.logit[0], meta.feature[0])] == [8, 8]
    reached = torch.autograd.grad(
        (weights.logit[:, 0] + weights.feature[:, 0]).sum(),
        [student.logits, student.feature_map, *meta.parameters()],
        allow_unused=True,
    )
    assert [gradient is None for gradient in reached] == [True, True] + [False] * 8


# The meta-objective.


def teacher_of(distiller: Distiller, images: Batch) -> DistillState:
    return distiller.imagine(images, distiller.teachers(images.inputs), {})


def meta_of(weighting: MMKD, size: int = NUM_ENVS) -> MetaWeights:
    return weighting._build(size)[0]


def objective_by_hand(distiller: Distiller, meta: MetaWeights, steps: int) -> Tensor:
    """Virtual steps taken by torch's own optimiser on a copy of the student."""
    images = batch(1)
    copy = make_tiny_distiller(alpha=0.7, beta=1.3, temperature=2.0, recipe=distiller.recipe)
    copy.load_state_dict(deepcopy(distiller.state_dict()))
    optimizer = copy.optimizer
    if not isinstance(optimizer, torch.optim.SGD):
        lr = optimizer.param_groups[0]["lr"]
        optimizer = torch.optim.SGD(copy.module.parameters(), lr=lr)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(steps):
        state = copy.forward(images)
        weights = meta(state)
        kd = (weights.logit.detach() * state.kd).sum(1)
        feature = (weights.feature.detach() * state.feature).sum(1)
        step((0.7 * kd + 1.3 * feature).mean())
    step(copy.forward(images).cross_entropy.mean())
    return copy.forward(images).cross_entropy.mean().detach()


RECIPE = Recipe(epochs=2, lr=0.2, weight_decay=1e-2, milestones=(0.5,))
RECIPES = {
    "nesterov": RECIPE,
    "momentum": replace(RECIPE, nesterov=False),
    "plain": replace(RECIPE, momentum=0.0),
    "no decay of norms": replace(RECIPE, decay_norm_and_bias=False),
    "adamw": replace(RECIPE, optimizer="adamw", lr=0.02),
}


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_objective_is_the_cross_entropy_after_the_virtual_steps(
    recipe: str, steps: int
) -> None:
    distiller = make_tiny_distiller(alpha=0.7, beta=1.3, temperature=2.0, recipe=RECIPES[recipe])
    for step in range(3):  # so that there is momentum, and the learning rate has fallen
        state = distiller.forward(batch(step))
        distiller.update(state, TeacherWeights.uniform(state.divergence))
    for group in distiller.optimizer.param_groups:
        group["lr"] *= 5
    weighting = MMKD(distiller, virtual_steps=steps)
    found = weighting.objective(batch(1), distiller.teachers(batch(1).inputs))
    expected = objective_by_hand(distiller, meta_of(weighting), steps)
    torch.testing.assert_close(found.detach(), expected)
    here = teacher_of(distiller, batch(1)).cross_entropy.mean()
    assert (found - here).abs() > 1e-3


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("head", ["logit", "feature"])
def test_the_gradient_of_the_objective_is_that_of_finite_differences(
    head: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # differences need all in float64
    distiller = make_tiny_distiller(
        ensemble=chosen_teachers([0, 1, 2]), recipe=Recipe(lr=0.1), temperature=2.0
    )
    weighting = MMKD(distiller, virtual_steps=steps)
    for module in (distiller.module, distiller.teachers, meta_of(weighting)):
        module.double()
    images = replace(batch(), inputs=batch().inputs.double())
    teachers = distiller.teachers(images.inputs)
    # The gradient leaves out that the first virtual step changes what the second one reads.
    for net, width in ((meta_of(weighting).logit, CLASSES), (meta_of(weighting).feature, NUM_ENVS)):
        net[0].weight.data[:, M * width :] = 0
    parameters = list(getattr(meta_of(weighting), head).parameters())
    gradients = torch.autograd.grad(weighting.objective(images, teachers), parameters)

    def shifted(step: float) -> float:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data += step * gradient
        objective = weighting.objective(images, teachers).item()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data -= step * gradient
        return objective

    squared = sum(gradient.square().sum().item() for gradient in gradients)
    assert squared > 1e-6
    assert (shifted(1e-4) - shifted(-1e-4)) / 2e-4 == pytest.approx(squared, rel=1e-4)


def test_the_objective_falls_over_meta_updates_on_one_batch() -> None:
    distiller = make_tiny_distiller(recipe=Recipe(lr=0.1))
    weighting = MMKD(distiller, meta_every=1, buffer_size=NUM_ENVS, lr=3e-2)
    state = distiller.forward(batch())
    before = snapshot(meta_of(weighting))
    objectives = []
    for _ in range(8):
        objectives.append(weighting.objective(state.batch, state.teachers).item())
        # The buffer holds this batch alone, in any order.
        weighting.buffer = HardBuffer(NUM_ENVS, seed=0)
        weighting.after_update(state)
    assert objectives[-1] < objectives[0] - 1e-3
    after = meta_of(weighting).state_dict()
    assert not any(tensor.allclose(before[name]) for name, tensor in after.items())


@pytest.mark.parametrize(
    "losses", [{"logit": "none", "feature": "none"}, {"beta": 0.0}, {"alpha": 0.0, "beta": 0.0}]
)
def test_meta_updates_do_without_the_terms_that_are_switched_off(losses: dict[str, object]) -> None:
    distiller = make_tiny_distiller(**losses)
    weighting = MMKD(distiller, meta_every=1, buffer_size=NUM_ENVS)
    state = distiller.forward(batch())
    weighting.after_update(state)
    weights = weighting(state)
    assert weights.logit.isfinite().all()
    assert weights.feature.isfinite().all()


# Meta-updates.


@pytest.mark.parametrize("every", [2, 3])
def test_meta_updates_come_every_few_batches_and_leave_the_student_alone(every: int) -> None:
    distiller = make_tiny_distiller()
    weighting = MMKD(distiller, meta_every=every, buffer_size=NUM_ENVS)
    moved = []
    for step in range(1, 7):
        state = distiller.forward(batch(step))
        distiller.update(state, weighting(state))
        before, student = snapshot(meta_of(weighting)), snapshot(distiller.module)
        weighting.after_update(state)
        assert_same(distiller.module, student)
        after = meta_of(weighting).state_dict()
        moved.append(not all(tensor.equal(before[name]) for name, tensor in after.items()))
    assert moved == [step % every == 0 for step in range(1, 7)]


def test_the_buffer_gets_what_the_student_got_wrong() -> None:
    distiller = make_tiny_distiller()
    weighting = MMKD(distiller, meta_every=100, buffer_size=NUM_ENVS)
    weighting.after_update(distiller.forward(batch()))
    state = distiller.forward(replace(batch(1), index=torch.arange(10, 10 + NUM_ENVS)))
    guesses = state.student.logits.argmax(1)
    targets = torch.where(torch.arange(NUM_ENVS) % 2 == 0, guesses, (guesses + 1) % CLASSES)
    weighting.after_update(replace(state, batch=replace(state.batch, targets=targets)))
    index = weighting.buffer.samples["index"]
    assert sorted(index[index >= 10].tolist()) == [11, 13]


@cache
def good_and_harmful_teacher() -> tuple[TinyNetwork, TinyNetwork]:
    """A trained teacher, and its copy with permuted classes."""
    with seeded(0):
        good = TinyNetwork(8)
    recipe = Recipe(epochs=8, lr=0.1, nesterov=False)
    batches = training_set(96).stream(16, torch.device("cpu"), 0)
    TeacherTraining(good, batches, recipe).train(lambda: None)
    harmful = deepcopy(good)
    for parameter in harmful.classifier.parameters():
        parameter.data = parameter.data.roll(1, dims=0)
    return good, harmful


@pytest.mark.parametrize("place", range(2))
def test_a_harmful_teacher_loses_its_weight(place: int) -> None:
    good, harmful = good_and_harmful_teacher()
    ensemble = TeacherEnsemble([good, harmful] if place == 1 else [harmful, good], ["a", "b"])
    distiller = make_tiny_distiller(ensemble=ensemble, beta=0.0, recipe=Recipe(epochs=100, lr=0.05))
    weighting = MMKD(distiller, meta_every=1, buffer_size=32, lr=3e-2)
    harm, right = [], []
    batches = training_set(96).stream(16, torch.device("cpu"), 1)
    for _, images in zip(range(15), batches, strict=False):
        state = distiller.forward(images)
        right.append((state.teachers.logits.argmax(2) == images.targets).float().mean(1))
        weights = weighting(state)
        harm.append(weights.logit[:, place].mean().item())
        distiller.update(state, weights)
        weighting.after_update(state)
    accuracy = torch.stack(right).mean(0)
    assert accuracy[1 - place] > 0.9
    assert accuracy[place] < 0.1
    assert sum(harm[-5:]) / 5 < min(0.2, harm[0] - 0.2)


# Arguments, and going on.


@pytest.mark.parametrize("name", ["meta_every", "virtual_steps", "buffer_size"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected at least 1, got 0"):
        MMKD(make_tiny_distiller(), **{name: 0})


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("weight_decay", float("nan"))])
def test_negative_numbers_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected a finite number >= 0, got {value}"):
        MMKD(make_tiny_distiller(), **{name: value})


def test_a_buffer_that_cannot_hold_a_batch_is_refused() -> None:
    distiller = make_tiny_distiller()
    weighting = MMKD(distiller, buffer_size=NUM_ENVS - 1)
    with pytest.raises(ConfigError, match=r"buffer_size: expected at least 4, .*, got 3"):
        weighting(distiller.forward(batch()))


def test_a_method_that_has_seen_nothing_can_be_saved() -> None:
    distiller = make_tiny_distiller()
    first, second = MMKD(distiller, seed=1), MMKD(distiller, seed=1)
    second(distiller.forward(batch()))
    second.load_state_dict(first.state_dict())
    state = distiller.forward(batch())
    assert second(state).logit.equal(first(state).logit)


def test_the_count_of_batches_goes_on() -> None:
    distiller = make_tiny_distiller()
    uninterrupted, resumed = (
        MMKD(distiller, seed=1, meta_every=3, buffer_size=NUM_ENVS) for _ in range(2)
    )
    state = distiller.forward(batch())
    uninterrupted(state)
    for _ in range(2):
        uninterrupted.after_update(state)
    resumed.load_state_dict(deepcopy(uninterrupted.state_dict()))
    before = snapshot(meta_of(resumed))
    for weighting in (uninterrupted, resumed):
        weighting.after_update(state)
    assert_same(meta_of(resumed), snapshot(meta_of(uninterrupted)))
    assert not meta_of(resumed).logit[0].weight.equal(before["logit.0.weight"])


# The buffer.


def numbered(first: int, size: int = 4) -> Batch:
    """Samples that can be told apart, in inputs, targets and index alike."""
    index = torch.arange(first, first + size)
    inputs = index.float().reshape(-1, 1, 1, 1).expand(-1, *IMAGE_SHAPE)
    return Batch(inputs=inputs, targets=index % CLASSES, index=index)


def wrong(*samples: int) -> Tensor:
    return torch.tensor(samples, dtype=torch.bool)


def held(buffer: HardBuffer) -> list[int]:
    """Numbers of the samples, after a look at whether they are whole."""
    found = Batch(**buffer.samples)
    assert found.inputs[:, 0, 0, 0].equal(found.index.float())
    assert found.targets.equal(found.index % CLASSES)
    return found.index.tolist()


def filled(size: int = 6, seed: int = 0) -> HardBuffer:
    buffer = HardBuffer(size, seed)
    while len(buffer) < size:
        buffer.add(numbered(len(buffer)), wrong(0, 0, 0, 0))
    return buffer


def test_the_buffer_fills_with_the_first_batches_right_or_wrong() -> None:
    buffer = HardBuffer(6, seed=0)
    assert len(buffer) == 0
    buffer.add(numbered(0), wrong(0, 1, 0, 0))
    assert held(buffer) == [0, 1, 2, 3]
    buffer.add(numbered(4), wrong(0, 0, 0, 0))
    assert held(buffer) == [0, 1, 2, 3, 4, 5]


def test_once_full_only_wrong_samples_enter_each_in_a_slot_of_its_own() -> None:
    slots = set()
    for seed in range(20):
        buffer = filled(seed=seed)
        buffer.add(numbered(10), wrong(0, 1, 1, 0))
        now = held(buffer)
        assert len(buffer) == len(now) == 6
        assert {sample for sample in now if sample >= 10} == {11, 12}
        kept = [sample for sample in now if sample < 10]
        assert all(now[sample] == sample for sample in kept)
        slots |= {now.index(11), now.index(12)}
    assert slots == set(range(6))


def test_right_samples_leave_a_full_buffer_alone_and_wrong_ones_replace_all_in_time() -> None:
    buffer = filled()
    buffer.add(numbered(10), wrong(0, 0, 0, 0))
    assert held(buffer) == [0, 1, 2, 3, 4, 5]
    for step in range(20):
        buffer.add(numbered(20 + 4 * step), wrong(1, 1, 1, 1))
    assert min(held(buffer)) >= 20


@pytest.mark.parametrize("size", [1, 3])
def test_a_buffer_may_be_smaller_than_a_batch(size: int) -> None:
    buffer = filled(size)
    assert held(buffer) == list(range(size))
    buffer.add(numbered(10), wrong(1, 1, 1, 1))
    assert sorted(held(buffer)) == [10, 11, 12][:size]


def test_changing_a_batch_later_does_not_change_the_buffer() -> None:
    buffer = HardBuffer(4, seed=0)
    images = replace(numbered(0), inputs=numbered(0).inputs.clone())
    buffer.add(images, wrong(0, 0, 0, 0))
    images.inputs.zero_()
    assert held(buffer) == [0, 1, 2, 3]


def test_samples_are_drawn_without_replacement_and_all_have_a_turn() -> None:
    buffer, seen = filled(), set()
    orders = set()
    for _ in range(20):
        index = buffer.sample(4).index.tolist()
        assert len(set(index)) == 4
        seen |= set(index)
        orders.add(tuple(index))
    assert seen == set(range(6))
    assert len(orders) > 10
    assert sorted(buffer.sample(6).index.tolist()) == list(range(6))


def state_of(buffer: HardBuffer) -> Mapping[str, object]:
    return deepcopy(buffer.state_dict())


@pytest.mark.parametrize("empty", [True, False])
def test_a_buffer_goes_on_from_its_state(empty: bool) -> None:
    original = HardBuffer(6, seed=0) if empty else filled()
    copy = filled(seed=9)
    copy.load_state_dict(state_of(original))
    assert len(copy) == len(original)
    for step in range(4):
        for buffer in (original, copy):
            buffer.add(numbered(10 + 4 * step), wrong(1, 0, 1, 1))
        assert held(copy) == held(original)
    assert copy.sample(3).index.equal(original.sample(3).index)
