from collections.abc import Callable
from copy import deepcopy
from functools import cache
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtkd_env import assemble
from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError
from mtkd_env.files import load_checkpoint, save_checkpoint
from mtkd_env.optimization import Recipe
from mtkd_env.precision import PRECISIONS, check_precision
from mtkd_env.reward import REWARDS
from mtkd_env.teachers import TeacherEnsemble
from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting import WEIGHTINGS, Weighting
from mtkd_env.weighting.mmkd import MMKD
from tiny import (
    NUM_ENVS,
    TEACHERS,
    assert_same,
    batch,
    make_tiny_distiller,
    make_tiny_env,
    seldom,
    snapshot,
    teacher_networks,
)

HALVES = ("bf16", "fp16")
LOW = {name: PRECISIONS[name] for name in HALVES}

TIMED = [*product(("before", "after"), HALVES)]
halves = pytest.mark.parametrize("precision", HALVES)


@cache
def ensemble(precision: str) -> TeacherEnsemble:
    return TeacherEnsemble(teacher_networks(), list(TEACHERS), precision)


def distiller(precision: str, **kwargs: object) -> Distiller:
    return make_tiny_distiller(ensemble=ensemble(precision), precision=precision, **kwargs)


def train(one: Distiller, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        state = one.forward(batch(step))
        one.update(state, TeacherWeights.uniform(state.divergence))


def weighting(name: str, one: Distiller) -> Weighting:
    make: Callable[..., Weighting] = WEIGHTINGS[name]
    return make(one, **({"meta_every": 1, "buffer_size": 8} if make is MMKD else {}))


def tensors(state: DistillState) -> dict[str, Tensor]:
    names = ("cross_entropy", "kd", "feature", "teacher_cross_entropy", "divergence")
    found = {name: getattr(state, name) for name in (*names, "distance", "similarity")}
    return found | {
        "student logits": state.student.logits,
        "student feature": state.student.feature,
        "teachers' logits": state.teachers.logits,
        **{f"feature of {m}": one for m, one in enumerate(state.teachers.features)},
    }


# What is computed in which format.


@halves
def test_only_maps_stay_in_the_low_precision(precision: str) -> None:
    state = distiller(precision).forward(batch())
    for name, tensor in tensors(state).items():
        assert tensor.dtype == torch.float32, name
    maps = (state.student.feature_map, *state.teachers.feature_maps, *state.projected)
    assert {one.dtype for one in maps} == {LOW[precision]}


@halves
def test_what_learns_stays_in_float32(precision: str) -> None:
    one = distiller(precision)
    train(one, 2)
    for tensor in one.module.state_dict().values():
        assert tensor.dtype in (torch.float32, torch.int64)


@halves
def test_low_precision_is_near_full_precision(precision: str) -> None:
    low, full = distiller(precision).forward(batch()), distiller("fp32").forward(batch())
    for name, tensor in tensors(low).items():
        expected = tensors(full)[name]
        torch.testing.assert_close(tensor, expected, rtol=0.05, atol=0.05, msg=name)
        if name != "similarity":
            assert not tensor.equal(expected), name


def test_full_precision_is_the_default() -> None:
    plain, full = make_tiny_distiller(), distiller("fp32")
    train(plain, 3)
    train(full, 3)
    assert_same(full.module, snapshot(plain.module))


@halves
def test_a_second_look_sees_what_the_first_saw(precision: str) -> None:
    one = distiller(precision)
    state = one.forward(batch())
    own = {name: p.detach() for name, p in one.module.named_parameters()}
    again = (
        one.revisit(state),
        one.forward(batch(), again=True),
        one.imagine(state.batch, state.teachers, own),
    )
    for other in again:
        for name, tensor in tensors(other).items():
            assert tensor.equal(tensors(state)[name]), name
        for ours, theirs in zip(other.projected, state.projected, strict=True):
            assert ours.equal(theirs)


@halves
def test_networks_are_measured_in_their_precision(precision: str) -> None:
    low, full = distiller(precision), distiller("fp32")
    batches = [batch(1), batch(2)]
    found, expected = low.evaluate(iter(batches)), full.evaluate(iter(batches))
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=0.05)
    assert found.cross_entropy != expected.cross_entropy


@halves
@pytest.mark.parametrize("student", ["fp32", "bf16"])
def test_student_and_teachers_may_differ(precision: str, student: str) -> None:
    one = make_tiny_distiller(ensemble=ensemble(precision), precision=student)
    state = one.forward(batch())
    logits = one.teachers.classify(state.projected)
    assert logits.dtype == torch.float32
    assert state.student.feature_map.dtype == PRECISIONS[student]
    assert state.teachers.feature_maps[0].dtype == PRECISIONS[precision]
    one.update(state, TeacherWeights.uniform(state.divergence))


def test_teachers_classify_maps_of_another_precision() -> None:
    maps = distiller("bf16").forward(batch()).projected
    found = ensemble("fp32").classify(maps)
    torch.testing.assert_close(found, ensemble("bf16").classify(maps), rtol=0.05, atol=0.1)


# Everything that reads a state.


@pytest.mark.parametrize(
    ("name", "precision"),
    seldom(product(WEIGHTINGS, HALVES), {*zip(WEIGHTINGS, cycle(HALVES))}),
)
def test_weightings_stay_on_the_simplex_and_learn(name: str, precision: str) -> None:
    one = distiller(precision)
    weigh = weighting(name, one)
    for step in range(3):
        state = one.forward(batch(step))
        weights = weigh(state)
        for head in (weights.logit, weights.feature):
            assert head.dtype == torch.float32
            assert head.ge(0).all()
            torch.testing.assert_close(head.sum(1), torch.ones(NUM_ENVS))
        terms = one.update(state, weights)
        weigh.after_update(state)
        assert terms.total.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in one.module.state_dict().values())


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_near_those_in_full_precision(name: str) -> None:
    low, full = distiller("bf16"), distiller("fp32")
    found, expected = (weighting(name, one)(one.forward(batch())) for one in (low, full))
    torch.testing.assert_close(found.logit, expected.logit, rtol=0.05, atol=0.05)
    torch.testing.assert_close(found.feature, expected.feature, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("reward", "timing", "precision"),
    seldom(
        ((reward, *kind) for reward, kind in product(REWARDS, TIMED)),
        {(reward, *kind) for reward, kind in zip(REWARDS, cycle(TIMED))},
    ),
)
def test_environments_give_float32_and_finite_rewards(
    reward: str, timing: str, precision: str
) -> None:
    env = make_tiny_env(
        distiller=distiller(precision), reward=reward, reward_timing=timing, output="torch"
    )
    observation, _ = env.reset(seed=0)
    for _ in range(3):
        assert observation.dtype == torch.float32
        assert observation.isfinite().all()
        observation, rewards, _, _, info = env.step(env.action_space.sample())
        for tensor in (rewards, info["teacher_rewards"], info["advantages"]):
            assert tensor.dtype == torch.float32
            assert tensor.isfinite().all()
    assert 0 <= env.evaluate("test").accuracy <= 1


@halves
@pytest.mark.parametrize("terms", [("dist", "nd"), ({"kd": 1.0, "dist": 1.0}, "none")])
def test_all_losses_take_low_precision(terms: tuple[str, str], precision: str) -> None:
    logit, feature = terms
    one = distiller(precision, logit=logit, feature=feature)
    train(one, 2)
    state = one.forward(batch())
    assert state.kd.isfinite().all()
    assert state.feature.isfinite().all()


# Scaled gradients.


@halves
def test_students_learn(precision: str) -> None:
    one = distiller(precision, recipe=Recipe(lr=0.05))
    losses = []
    for _ in range(20):
        state = one.forward(batch())
        terms = one.update(state, TeacherWeights.uniform(state.divergence))
        losses.append(terms.total.mean())
    assert losses[-1] < 0.8 * losses[0]


def test_only_fp16_scales_its_gradients() -> None:
    assert distiller("fp16").scaler.is_enabled()
    for precision in ("bf16", "fp32"):
        assert not distiller(precision).scaler.is_enabled()


def test_a_step_that_overflows_is_left_out_but_counts_in_the_schedule() -> None:
    recipe = Recipe(epochs=2, lr=0.1, schedule="cosine")
    one = distiller("fp16", recipe=recipe)
    state = one.scaler.state_dict()
    one.scaler.load_state_dict(state | {"scale": 1e38})
    before = {name: p.detach().clone() for name, p in one.module.named_parameters()}
    train(one, 1)
    assert all(p.equal(before[name]) for name, p in one.module.named_parameters())
    assert one.scaler.get_scale() == pytest.approx(0.5e38)
    rates = [0.1 * (1 + torch.tensor(step * torch.pi / 4).cos().item()) / 2 for step in range(3)]
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(rates[1])
    one.scaler.load_state_dict(state | {"scale": 8.0})
    train(one, 1)
    assert any(not p.equal(before[name]) for name, p in one.module.named_parameters())
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(rates[2])


def test_clipping_sees_gradients_without_their_scale() -> None:
    """The same limit, whatever the scale: a limit that no gradient reaches changes nothing."""
    plain = distiller("fp16")
    norm = 1e3
    limited = distiller("fp16", recipe=Recipe(epochs=4, lr=0.1, clip_norm=norm))
    for one in (plain, limited):
        one.scaler.load_state_dict(one.scaler.state_dict() | {"scale": 1024.0})
        train(one, 2)
    assert_same(limited.module, snapshot(plain.module))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_saved_states_go_on_bit_for_bit(precision: str, tmp_path: Path) -> None:
    uninterrupted, resumed = distiller(precision, seed=1), distiller(precision, seed=2)
    train(uninterrupted, 3)
    save_checkpoint(tmp_path / "x.pt", deepcopy(uninterrupted.state_dict()))
    resumed.load_state_dict(load_checkpoint(tmp_path / "x.pt"))
    for one in (uninterrupted, resumed):
        train(one, 3, first=3)
    assert_same(resumed.module, snapshot(uninterrupted.module))
    assert resumed.scaler.state_dict() == uninterrupted.scaler.state_dict()


def test_a_new_student_starts_with_a_new_scale() -> None:
    one = distiller("fp16")
    one.scaler.load_state_dict(one.scaler.state_dict() | {"scale": 4.0})
    one.reinitialize(0)
    assert one.scaler.get_scale() == 2.0**16


# From names to a run.


def test_assembled_environments_compute_in_the_precision_they_are_told() -> None:
    assembly = assemble(
        teachers=[{"network": "resnet8", "width": 0.25, "kind": "random"}],
        student={"width": 0.125},
        data={"train_size": 32, "batch_size": 16},
        computing={"precision": "bf16"},
        env={"output": "torch"},
    )
    env = assembly.env
    env.reset(seed=0)
    assert env.distiller.precision == env.distiller.teachers.precision == "bf16"
    assert env.state.student.feature_map.dtype == torch.bfloat16
    env.step(env.action_space.sample())


def test_unknown_precisions_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown precision 'bf15'; did you mean 'bf16'\?"):
        check_precision("bf15", "cpu")
    with pytest.raises(ConfigError, match="unknown precision 'half'"):
        make_tiny_distiller(precision="half")


def test_precisions_that_a_device_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"precision: 'meta' has no bf16: "):
        check_precision("bf16", "meta")
    check_precision("fp32", "meta")


def test_a_format_that_is_silently_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_: torch.no_grad())
    with pytest.raises(ConfigError, match=r"'cpu' has no fp16, it computes in torch\.float32"):
        check_precision("fp16", "cpu")
