"""Worth of teachers for images that they were not asked about: formula, draws, state."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mtkd_env import losses
from mtkd_env.distiller import Distiller
from mtkd_env.reference import LabelledDraws
from mtkd_env.types import UNKNOWN, Batch, DistillState, NetworkOutput
from mtkd_env.worth import (
    CrossDirection,
    HeldOutDirection,
    RunningDeviation,
    output_layer_gradient,
    worth,
)
from tiny import CLASSES, batch, generator, make_tiny_distiller, make_tiny_env, random_state

T = 2.0


def linear_student(seed: int, width: int = 2) -> nn.Linear:
    layer = nn.Linear(width, CLASSES)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(seed)))
    return layer


def output_of(layer: nn.Linear, features: Tensor) -> NetworkOutput:
    return NetworkOutput(layer(features), features, features.view(*features.shape, 1, 1))


def labelled_batch(seed: int, size: int = 6) -> Batch:
    return batch(seed, size)


def test_the_direction_is_the_gradient_of_the_last_layer() -> None:
    layer, images = linear_student(0), labelled_batch(1)
    features = torch.randn(6, 2, generator=generator(2))
    loss = losses.cross_entropy(layer(features), images.targets).mean()
    weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias])
    found = output_layer_gradient(output_of(layer, features), images)
    torch.testing.assert_close(found, torch.cat([weight, bias.unsqueeze(1)], dim=1))


def test_worth_is_the_inner_product_of_two_gradients_of_the_last_layer() -> None:
    layer, state = linear_student(0), random_state(count=3)
    features = state.student.feature
    state = replace(state, student=output_of(layer, features))
    direction = torch.randn(CLASSES, 3, generator=generator(3))
    found = worth(state, direction, T)
    for sample in range(len(features)):
        for m in range(3):
            kd = losses.kd_divergence(
                layer(features[sample : sample + 1]),
                state.teachers.logits[:, sample : sample + 1],
                T,
            )[0, m]
            weight, bias = torch.autograd.grad(kd, [layer.weight, layer.bias])
            own = torch.cat([weight, bias.unsqueeze(1)], dim=1)
            torch.testing.assert_close(found[sample, m], (own * direction).sum())


def test_images_without_a_label_add_nothing_to_the_direction() -> None:
    layer, images = linear_student(0), labelled_batch(1)
    features = torch.randn(6, 2, generator=generator(2))
    hidden = replace(images, targets=torch.where(torch.arange(6) < 2, images.targets, UNKNOWN))
    found = output_layer_gradient(output_of(layer, features), hidden)
    few = Batch(images.inputs[:2], images.targets[:2], images.index[:2])
    expected = output_layer_gradient(output_of(layer, features[:2]), few) * 2 / 6
    torch.testing.assert_close(found, expected)


def test_worth_does_not_depend_on_the_samples_labels() -> None:
    env = make_tiny_env(reward="heldout")
    env.reset(seed=0)
    state = env.state
    other = replace(state, batch=replace(state.batch, targets=(state.batch.targets + 1) % CLASSES))
    assert env.reward.teacher_rewards(state).equal(env.reward.teacher_rewards(other))


def test_draws_are_different_images_and_all_of_them_where_there_are_few() -> None:
    reference = make_tiny_distiller().reference
    everything = len(reference.labelled.targets)
    drawn = LabelledDraws(reference).draw(5)
    assert len(drawn.index.unique()) == 5
    assert len(LabelledDraws(reference).draw(everything + 1).targets) == everything


def test_every_batch_has_other_draws_that_the_seed_decides() -> None:
    reference = make_tiny_distiller().reference
    first, same, other = (LabelledDraws(reference, seed) for seed in (0, 0, 1))
    drawn = [first.draw(5).index for _ in range(2)]
    assert not drawn[0].equal(drawn[1])
    assert same.draw(5).index.equal(drawn[0])
    assert not other.draw(5).index.equal(drawn[0])


def test_the_teachers_outputs_of_a_draw_are_those_of_its_images() -> None:
    distiller = make_tiny_distiller()
    drawn = LabelledDraws(distiller.reference).draw(5)
    assert drawn.teachers is not None
    found = distiller.teachers(drawn.inputs)
    torch.testing.assert_close(drawn.teachers.logits, found.logits)
    torch.testing.assert_close(drawn.teachers.features, found.features)


def test_examining_leaves_no_trace_in_the_student() -> None:
    distiller = make_tiny_distiller()
    before = {name: value.clone() for name, value in distiller.module.state_dict().items()}
    state = distiller.examine(LabelledDraws(distiller.reference).draw(5))
    assert not state.student.logits.requires_grad
    assert distiller.student.training
    assert all(value.equal(before[name]) for name, value in distiller.module.state_dict().items())


def test_the_cross_direction_is_a_running_mean_of_the_batches_own() -> None:
    states = [random_state(seed) for seed in range(2)]
    own = [output_layer_gradient(state.student, state.batch) for state in states]
    direction = CrossDirection()
    direction.decay = 0.75
    torch.testing.assert_close(direction(states[0]), own[0])
    torch.testing.assert_close(direction(states[1]), 0.75 * own[0] + 0.25 * own[1])


DIRECTIONS: dict[str, Callable[[Distiller], HeldOutDirection | CrossDirection]] = {
    "heldout": lambda d: HeldOutDirection(d, 5),
    "cross": lambda _: CrossDirection(),
}


def states_of(distiller: Distiller, count: int) -> list[DistillState]:
    return [distiller.forward(batch(seed)) for seed in range(count)]


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_direction_goes_on_from_its_state(name: str) -> None:
    distiller = make_tiny_distiller()
    first, *rest = states_of(distiller, 3)
    uninterrupted, resumed = (DIRECTIONS[name](distiller) for _ in range(2))
    uninterrupted(first)
    resumed.load_state_dict(uninterrupted.state_dict())
    for state in rest:
        assert resumed(state).equal(uninterrupted(state))


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_direction_starts_all_over_with_a_seed(name: str) -> None:
    distiller = make_tiny_distiller()
    states, direction = states_of(distiller, 2), DIRECTIONS[name](distiller)
    direction.reseed(3)
    first = [direction(state) for state in states]
    direction.reseed(3)
    assert all(direction(state).equal(g) for state, g in zip(states, first, strict=True))


def test_the_running_deviation_is_that_of_the_first_batch_then_moves_slowly() -> None:
    deviation = RunningDeviation()
    deviation.decay = 0.5
    numbers = torch.tensor([[1.0, -1.0], [3.0, -3.0]])
    assert deviation(numbers).equal(numbers)
    deviation.observe(numbers)
    torch.testing.assert_close(deviation(numbers), numbers / 5**0.5)
    deviation.observe(torch.zeros(2, 2))
    torch.testing.assert_close(deviation(numbers), numbers / (5**0.5 / 2))
