from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mtkd_env.observation import (
    MADE_BLOCKS,
    OBSERVATIONS,
    OUTPUT_BLOCKS,
    UNSCALED,
    Observer,
    OutputObserver,
    RelativeObserver,
    RunningStandardizer,
    make_observer,
    upbringing,
)
from mtkd_env.reference import ReferenceImages
from mtkd_env.types import UNKNOWN_LOGIT, DistillState
from tiny import (
    CLASSES,
    chosen_teachers,
    generator,
    make_tiny_env,
    random_state,
    reorder_teachers,
    with_evidence,
)

NAMES = ("a", "b", "c")


def observer(observation: str, state: DistillState) -> Observer:
    teachers = chosen_teachers([0, 1, 2])
    teachers.names = NAMES
    teachers.feature_dims = tuple(feature.shape[1] for feature in state.teachers.features)
    return make_observer(observation, teachers, lambda: reference(state))


def reference(state: DistillState) -> ReferenceImages:
    """Images of which the teachers say what they say of the batch."""
    known = ReferenceImages(chosen_teachers([0, 1, 2]), labelled=list, student=list)
    said = state.teachers.logits.softmax(-1)
    known._opinions = said.mean(1), torch.einsum("mbc,nbc->mnc", said, said) / said.shape[1]
    return known


def relative(state: DistillState, block: str) -> Tensor:
    """One number of each teacher."""
    observe = observer("relative", state)
    return torch.cat([observe(state)[:, observe.layout[f"{name}/{block}"]] for name in NAMES], 1)


def rows(count: int, width: int = 3, seed: int = 0) -> Tensor:
    scales = torch.tensor([1.0, 100.0, 1e-3])[:width]
    return 5 * scales + scales * torch.randn(count, width, generator=generator(seed))


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_layout_covers_the_observation_without_gaps(observation: str) -> None:
    state = random_state()
    observe = observer(observation, state)
    stop = 0
    for part in observe.layout.values():
        assert part.start == stop
        assert part.stop > part.start
        stop = part.stop
    assert stop == observe.width == observe(state).shape[1]


def test_blocks_follow_the_order_of_equation_5_for_each_teacher() -> None:
    blocks = ("feature", "logits", "cross_entropy", "similarity", "divergence")
    observe = observer("all", random_state())
    assert list(observe.layout) == [f"{name}/{block}" for name in NAMES for block in blocks]


def test_the_parts_of_table_6b_together_are_the_whole() -> None:
    parts = OBSERVATIONS["performance"] + OBSERVATIONS["gaps"]
    assert parts == OBSERVATIONS["all"]
    assert set(OBSERVATIONS["all"]) == OUTPUT_BLOCKS.keys() | MADE_BLOCKS.keys()


@pytest.mark.parametrize("observation", UNSCALED)
def test_an_observation_without_labels_does_not_change_with_them(observation: str) -> None:
    state = random_state()
    observe = observer(observation, state)
    hidden = replace(
        state, batch=replace(state.batch, targets=-torch.ones_like(state.batch.targets))
    )
    other = with_evidence(hidden, teacher_cross_entropy=state.teacher_cross_entropy + 1)
    assert observe(other).equal(observe(state))


def test_an_observation_without_labels_looks_at_the_class_that_the_teachers_agree_on() -> None:
    state = random_state()
    found, layout = observer("label_free", state)(state), observer("label_free", state).layout
    probabilities = state.teachers.logits.softmax(-1)
    pseudo = probabilities.mean(0).argmax(1, keepdim=True)
    torch.testing.assert_close(found[:, layout["mean/probabilities"]], probabilities.mean(0))
    own = state.student.logits.softmax(1)
    torch.testing.assert_close(
        found[:, layout["student/pseudo_cross_entropy"]], -own.gather(1, pseudo).log()
    )
    for m, name in enumerate(NAMES):
        cross_entropy = -probabilities[m].gather(1, pseudo).log() / 4
        torch.testing.assert_close(found[:, layout[f"{name}/probabilities"]], probabilities[m])
        torch.testing.assert_close(found[:, layout[f"{name}/pseudo_cross_entropy"]], cross_entropy)


def test_reordering_teachers_reorders_the_blocks_of_an_observation_without_labels() -> None:
    state, order = random_state(), [2, 0, 1]
    observe = observer("label_free", state)
    found, other = observe(state), observe(reorder_teachers(state, order))
    width = observe.layout["b/probabilities"].start
    blocks, others = (x[:, : 3 * width].unflatten(1, (3, width)) for x in (found, other))
    torch.testing.assert_close(others, blocks[:, order])
    torch.testing.assert_close(other[:, 3 * width :], found[:, 3 * width :])


def changed(state: DistillState, logits: Tensor, student: Tensor) -> DistillState:
    teachers = replace(state.teachers, logits=logits)
    return replace(state, teachers=teachers, student=replace(state.student, logits=student))


def test_a_relative_observation_knows_no_order_of_classes_and_no_shift_of_logits() -> None:
    state, order = random_state(), [2, 0, 3, 1]
    logits, student = state.teachers.logits, state.student.logits
    shift = torch.randn(3, 5, 1, generator=generator(1))
    other = changed(state, logits[..., order] + shift, student[:, order] - 1)
    found = observer("relative", state)(state)
    torch.testing.assert_close(observer("relative", other)(other), found, rtol=0, atol=1e-5)


def test_reordering_teachers_reorders_the_rows_of_a_relative_observation() -> None:
    state, order = random_state(), [2, 0, 1]
    other = reorder_teachers(state, order)
    found, moved = (
        observer("relative", one)(one).unflatten(1, (3, RelativeObserver.features_per_teacher))
        for one in (state, other)
    )
    torch.testing.assert_close(moved, found[:, order])


def test_numbers_of_a_relative_observation_are_those_of_their_definitions() -> None:
    state = random_state()
    said, own = state.teachers.logits.softmax(-1), state.student.logits.softmax(1)
    mean, row = said.mean(0), torch.arange(5)
    for m in range(3):
        p, top = said[m], said[m].argmax(1)
        ranked = p.sort(1, descending=True).values
        centred = state.teachers.logits[m] - state.teachers.logits[m].mean(1, keepdim=True)
        covered = (p.mean(0) / said.mean((0, 1))).log()
        shares = said.mean(1) / said.mean(1).sum(0)
        seconded = (p * (shares.unsqueeze(1) * said).sum(0)).mean(0) / p.mean(0)
        expected = {
            "entropy": -(p * p.log()).sum(1) / np.log(CLASSES),
            "top_probability": ranked[:, 0],
            "margin": ranked[:, 0] - ranked[:, 1],
            "consent": p[row, mean.argmax(1)],
            "agreement": (said.argmax(2) == top).float().mean(0),
            "mean_probability": mean[row, top],
            "student_probability": own[row, top],
            "mean_divergence": (p * (p / mean).log()).sum(1) / 4,
            "student_divergence": (p * (p / own).log()).sum(1) / 4,
            "student_similarity": (p * own).sum(1) / (p.norm(dim=1) * own.norm(dim=1)),
            "evidence": centred.exp().mean(1).log() / 10,
            "top_logit": centred.amax(1) / 10,
            "mean_entropy": -(mean * mean.log()).sum(1) / np.log(CLASSES),
            "student_entropy": -(own * own.log()).sum(1) / np.log(CLASSES),
            "coverage": covered[top],
            "mean_coverage": mean @ covered,
            "student_coverage": own @ covered,
            "reliability": seconded[top],
            "mean_reliability": mean @ seconded,
            "there": torch.ones(5),
        }
        for block, values in expected.items():
            torch.testing.assert_close(relative(state, block)[:, m], values)


def test_teachers_that_are_right_agree_more_often_than_by_chance() -> None:
    """Two that are always right, one that guesses, and one that calls every class another name."""
    right = torch.eye(4).repeat(5, 1)
    said = torch.stack([right, right, torch.full_like(right, 0.25), right.roll(1, 1)])
    agreement = torch.einsum("mbc,nbc->mnc", said, said) / said.shape[1]
    raised = upbringing(said.mean(1), agreement)
    assert raised["coverage"].abs().max() < 1e-6
    torch.testing.assert_close(raised["breadth"], torch.ones(4))
    torch.testing.assert_close(
        raised["largest_lift"][:3], torch.tensor([1.0, 1.0, 0.0]), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(raised["reliability"][0], torch.full((4,), 0.5625))
    torch.testing.assert_close(raised["reliability"][3], torch.full((4,), 0.3125))
    assert raised["mean_lift"][3] < -1 < raised["mean_lift"][2]


def test_a_relative_observation_of_teachers_that_know_few_classes_is_finite() -> None:
    state = random_state()
    known = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    logits = state.teachers.logits.masked_fill(~known.unsqueeze(1), UNKNOWN_LOGIT)
    state = replace(state, teachers=replace(state.teachers, logits=logits, known=known))
    found = observer("relative", state)(state)
    assert found.isfinite().all()
    assert found.abs().max() < 10
    two = logits[0, :, :2] - logits[0, :, :2].mean(1, keepdim=True)
    expected = two.exp().mean(1).log() / 10
    torch.testing.assert_close(relative(state, "evidence")[:, 0], expected)


def test_what_teachers_were_raised_on_is_looked_at_once_a_run() -> None:
    env = make_tiny_env(observation="relative")
    looked: list[int] = []
    student = env.distiller.reference._student
    env.distiller.reference._student = lambda: looked.append(1) or student()
    env.reset(seed=0)
    for _ in range(3):
        env.distill(env.to_weights(torch.zeros(env.num_envs, 6)))
        assert env.observation.isfinite().all()
    assert looked == [1]
    assert env.normalizer is None


@pytest.mark.parametrize("observation", ["all", "performance", "gaps"])
def test_values_lie_at_their_slices_of_equation_5(observation: str) -> None:
    state = random_state()
    observe = observer(observation, state)
    found = observe(state)
    for m, name in enumerate(NAMES):
        expected = {
            "feature": state.teachers.features[m],
            "logits": state.teachers.logits[m],
            "cross_entropy": state.teacher_cross_entropy[:, m, None],
            "similarity": state.similarity[:, m, None],
            "divergence": state.divergence[:, m, None],
        }
        for block in OBSERVATIONS[observation]:
            assert found[:, observe.layout[f"{name}/{block}"]].equal(expected[block])


@pytest.mark.parametrize("observation", ["all", "performance"])
def test_a_short_observation_is_made_whole_again_by_the_outputs_of_the_teachers(
    observation: str,
) -> None:
    state = random_state()
    keys = torch.arange(len(state.divergence))
    observe = observer(observation, state)
    assert isinstance(observe, OutputObserver)
    short = observe.shorten(replace(state, batch=replace(state.batch, keys=keys)))
    assert short is not None
    assert short.keys is keys
    assert short.made.shape == (len(keys), len(NAMES), len(OBSERVATIONS[observation]) - 2)
    outputs = replace(state.teachers, feature_maps=())
    assert observe.restore(short, outputs).equal(observe(state))


def test_nothing_is_short_without_keys_or_without_outputs_in_it() -> None:
    state = random_state()
    keys = torch.arange(len(state.divergence))
    assert observer("all", state).shorten(state) is None
    stored = replace(state, batch=replace(state.batch, keys=keys))
    assert observer("gaps", state).shorten(stored) is None


def test_observations_are_detached_float32() -> None:
    state = random_state()
    state.divergence.requires_grad_()
    found = observer("all", state)(state)
    assert not found.requires_grad
    assert found.dtype == torch.float32


def test_standardizer_has_the_mean_and_variance_of_all_rows() -> None:
    batches = [rows(7), rows(1, seed=1), rows(12, seed=2)]
    standardizer = RunningStandardizer(3, torch.device("cpu"))
    for batch in batches:
        standardizer.update(batch)
    together = torch.cat(batches).double().numpy()
    assert standardizer.count == 20
    np.testing.assert_allclose(standardizer.mean.numpy(), together.mean(0), rtol=1e-12)
    variance = standardizer.squares.numpy() / standardizer.count
    np.testing.assert_allclose(variance, together.var(0), rtol=1e-10)


def test_standardized_rows_have_mean_zero_and_variance_one() -> None:
    standardizer = RunningStandardizer(3, torch.device("cpu"))
    batch = rows(50)
    standardizer.update(batch)
    scaled = standardizer(batch)
    assert scaled.dtype == batch.dtype
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled.var(0, correction=0), torch.ones(3), rtol=1e-4, atol=0)


def test_standardizer_changes_nothing_before_the_first_update() -> None:
    standardizer = RunningStandardizer(3, torch.device("cpu"))
    batch = rows(4)
    assert standardizer(batch).equal(batch)
    standardizer.update(batch)
    assert not standardizer(batch).equal(batch)


def test_standardizer_clips_outliers_and_bears_constant_columns() -> None:
    standardizer = RunningStandardizer(2, torch.device("cpu"), clip=4.0)
    standardizer.update(torch.tensor([[0.0, 7.0], [2.0, 7.0]]))
    scaled = standardizer(torch.tensor([[1e6, 7.0], [-1e6, 8.0]]))
    torch.testing.assert_close(scaled, torch.tensor([[4.0, 0.0], [-4.0, 4.0]]))


def test_standardizer_goes_on_from_its_state() -> None:
    original, copy = (RunningStandardizer(3, torch.device("cpu")) for _ in range(2))
    original.update(rows(6))
    state = original.state_dict()
    original.update(rows(6, seed=1))  # must not reach into the state that was given out
    copy.load_state_dict(state)
    assert copy.count == 6
    copy.update(rows(6, seed=1))
    assert copy(rows(4, seed=2)).equal(original(rows(4, seed=2)))
