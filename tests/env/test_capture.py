"""A step that was recorded and is replayed changes the student as a step taken as usual.

Graphs need a GPU. Their recorder is stood in for by one that keeps the operations of the work and
does them again on the same tensors, with all that did not come from a tensor as it was when they
were recorded: what holds of it holds of a graph.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import build_agent
from experiments.config import parse_arguments
from mtkd_env import capture, optimization
from mtkd_env.capture import USUAL_STEPS
from mtkd_env.distiller import Distiller
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.optimization import Recipe
from mtkd_env.registration import assemble
from mtkd_env.types import Batch, DistillState, LossTerms, TeacherWeights
from pretended_gpu import Recording
from tiny import (
    CLASSES,
    NUM_ENVS,
    RECIPES,
    STEPS_PER_EPOCH,
    batch,
    make_tiny_distiller,
    make_tiny_env,
    snapshot,
)

STEPS = USUAL_STEPS + 3


class Recorder:
    """Stands in for `GraphRecorder`."""

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with Recording() as recording:
            result = work()
        recording.undo()
        return result, recording.replay


@pytest.fixture(autouse=True)
def cpu_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(capture.RECORDERS, "cpu", Recorder)
    monkeypatch.setattr(optimization, "RATE_IN_MEMORY", optimization.RATE_IN_MEMORY | {"cpu"})


def weights(seed: int, like: Tensor) -> TeacherWeights:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.rand(2, *like.shape, generator=draw).softmax(-1)
    return TeacherWeights(logit=rows[0], feature=rows[1])


def steps(
    distiller: Distiller, count: int, make: Callable[[int], Batch] = batch
) -> Iterator[tuple[DistillState, LossTerms]]:
    for seed in range(count):
        state = distiller.forward(make(seed))
        yield state, distiller.update(state, weights(seed, state.divergence))


def trained(distiller: Distiller, make: Callable[[int], Batch] = batch) -> dict[str, Tensor]:
    for _ in steps(distiller, STEPS, make):
        pass
    return snapshot(distiller.module)


def mixed(seed: int) -> Batch:
    plain = batch(seed)
    shares = torch.rand(NUM_ENVS, CLASSES, generator=torch.Generator().manual_seed(seed))
    return Batch(plain.inputs, plain.targets, plain.index, mixture=shares.softmax(1))


@pytest.mark.parametrize("make", [batch, mixed])
@pytest.mark.parametrize("optimizer", RECIPES)
def test_a_captured_step_is_the_usual_one(optimizer: str, make: Callable[[int], Batch]) -> None:
    usual, captured = (
        trained(make_tiny_distiller(recipe=RECIPES[optimizer], capture=flag), make)
        for flag in (False, True)
    )
    for name, expected in usual.items():
        torch.testing.assert_close(captured[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_states_and_losses_are_the_usual_ones_and_stay() -> None:
    usual, captured = (
        list(steps(make_tiny_distiller(capture=flag), STEPS)) for flag in (False, True)
    )
    for (state, losses), (own_state, own_losses) in zip(usual, captured, strict=True):
        for name in capture.PER_SAMPLE:
            expected = getattr(state, name).detach()
            torch.testing.assert_close(getattr(own_state, name).detach(), expected, msg=name)
        for name in ("cross_entropy", "kd", "feature", "total"):
            torch.testing.assert_close(getattr(own_losses, name), getattr(losses, name), msg=name)


def test_the_waiting_state_shows_the_student_at_the_batch() -> None:
    usual, captured = make_tiny_distiller(), make_tiny_distiller(capture=True)
    for (state, _), (own, _) in zip(steps(usual, STEPS), steps(captured, STEPS), strict=True):
        torch.testing.assert_close(own.student.logits.detach(), state.student.logits.detach())
        for ours, expected in zip(own.projected, state.projected, strict=True):
            torch.testing.assert_close(ours.detach(), expected.detach())
        assert own.batch.inputs.equal(state.batch.inputs)


def test_the_first_steps_are_usual_and_the_others_have_no_graph() -> None:
    distiller = make_tiny_distiller(capture=True)
    graphs = [state.cross_entropy.requires_grad for state, _ in steps(distiller, STEPS)]
    assert graphs == [True] * USUAL_STEPS + [False] * (STEPS - USUAL_STEPS)


def test_a_replay_makes_no_graph_and_asks_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = make_tiny_distiller(capture=True)
    trained(distiller)
    ready = distiller.forward(batch(1))
    monkeypatch.setattr(distiller.module, "forward", None)
    monkeypatch.setattr(distiller.optimizer, "step", None)
    distiller.update(ready, weights(0, ready.divergence))
    distiller.forward(batch(2))


@pytest.mark.parametrize("method", ["aver", "camkd", "amtmlkd", "mmkd", "pg", "ddpg"])
def test_agents_train_the_same_student(method: str) -> None:
    def student(*, flag: bool) -> dict[str, Tensor]:
        # Learned at a batch's own pace, so that rounding is not made large.
        distiller = make_tiny_distiller(recipe=Recipe(epochs=4, lr=0.01), capture=flag)
        env = make_tiny_env(distiller=distiller, output="torch")
        env.reset(seed=0)
        build_agent(method, env, seed=0, arguments={}).learn(4, lambda: None)
        assert env.steps == 4 * STEPS_PER_EPOCH > USUAL_STEPS
        return snapshot(env.distiller.student)

    usual, captured = student(flag=False), student(flag=True)
    for name, expected in usual.items():
        torch.testing.assert_close(captured[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def env_after(count: int, state: dict[str, Any] | None = None) -> MTKDVectorEnv:
    env = make_tiny_env(distiller=make_tiny_distiller(capture=True), output="torch")
    env.reset(seed=0)
    if state is not None:
        env.load_state_dict(state)
        env.reset()
    for _ in range(count):
        env.distill(weights(env.steps, env.state.divergence))
    return env


def test_a_run_goes_on_from_a_checkpoint_amid_captured_steps() -> None:
    whole = env_after(STEPS + 4)
    part = env_after(STEPS)
    _ = part.observation  # A batch waits, which the student has seen.
    rest = env_after(4, part.state_dict())
    expected = snapshot(whole.distiller.module)
    for name, value in snapshot(rest.distiller.module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_new_student_is_recorded_anew() -> None:
    distiller = make_tiny_distiller(capture=True)
    trained(distiller)
    distiller.reinitialize(3)
    again, usual = trained(distiller), trained(make_tiny_distiller(seed=3))
    for name, expected in usual.items():
        torch.testing.assert_close(again[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_only_the_last_batch_can_be_learned_from() -> None:
    distiller = make_tiny_distiller(capture=True)
    trained(distiller)
    first, second = distiller.forward(batch(1)), distiller.forward(batch(2))
    with pytest.raises(RuntimeError, match="only from the batch it looked at last"):
        distiller.update(first, weights(0, first.divergence))
    distiller.update(second, weights(0, second.divergence))
    with pytest.raises(RuntimeError, match="only from the batch it looked at last"):
        distiller.update(second, weights(0, second.divergence))


def test_weights_with_a_graph_are_refused() -> None:
    distiller = make_tiny_distiller(capture=True)
    trained(distiller)
    state = distiller.forward(batch(1))
    with_graph = state.divergence.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient flows into the weights"):
        distiller.update(state, TeacherWeights(with_graph, with_graph))


def test_what_cannot_be_recorded_goes_on_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(make_tiny_distiller())
    distiller = make_tiny_distiller(capture=True)
    plain = distiller.student.features

    def waiting(inputs: Tensor) -> Tensor:
        float(inputs.sum())
        return plain(inputs)

    monkeypatch.setattr(distiller.student, "features", waiting)
    with pytest.warns(UserWarning, match="step is not captured: operation not permitted"):
        found = trained(distiller)
    for name, value in found.items():
        assert value.equal(expected[name]), name


def test_a_failure_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_work: Callable[[], Any]) -> Any:
        raise RuntimeError

    monkeypatch.setitem(capture.RECORDERS, "cpu", lambda: failing)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trained(make_tiny_distiller(capture=True))
    assert [str(one.message) for one in told] == [
        "the student's step is not captured: RuntimeError"
    ]


def test_an_optimizer_is_capturable_only_while_it_is_recorded() -> None:
    distiller = make_tiny_distiller(recipe=RECIPES["adamw"], capture=True)
    trained(distiller)
    assert [group["capturable"] for group in distiller.optimizer.param_groups] == [False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "meta"}, "capture: expected false on a device without graphs, 'meta'"),
        ({"precision": "fp16"}, "capture: expected false with precision fp16"),
    ],
)
def test_what_has_no_captured_step_is_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        capture.check_capture(**{"precision": "fp32", "device": "cpu", **arguments})


def test_skipping_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match="capture: expected false with on_nan skip"):
        make_tiny_env(distiller=make_tiny_distiller(capture=True), on_nan="skip")


def test_weights_that_need_a_graph_are_refused() -> None:
    env = make_tiny_env(distiller=make_tiny_distiller(capture=True), output="torch")
    with pytest.raises(ConfigError, match="capture: expected false with aekd"):
        build_agent("aekd", env, seed=0, arguments={})
    build_agent("aekd", env, seed=0, arguments={"features": False})


def test_a_cpu_has_no_captured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(capture.RECORDERS, "cpu")
    with pytest.raises(ConfigError, match="capture: expected false on a device without graphs"):
        assemble(capture=True)


def test_a_run_is_the_same_one_captured_or_not() -> None:
    (plain,), (captured,) = parse_arguments([]), parse_arguments(["--capture", "true"])
    assert captured.capture
    assert plain.digest == captured.digest


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", RECIPES)
def test_a_step_captured_on_a_gpu_is_the_usual_one(optimizer: str, precision: str) -> None:
    kwargs: dict[str, Any] = {"recipe": RECIPES[optimizer], "precision": precision}

    def to_gpu(seed: int) -> Batch:
        one = batch(seed)
        return Batch(one.inputs.cuda(), one.targets.cuda(), one.index.cuda())

    def student(*, flag: bool) -> dict[str, Tensor]:
        distiller = make_tiny_distiller(device="cuda", capture=flag, **kwargs)
        for seed in range(STEPS):
            state = distiller.forward(to_gpu(seed))
            uniform = TeacherWeights.uniform(state.divergence)
            distiller.update(state, uniform)
        assert flag is not state.cross_entropy.requires_grad
        return snapshot(distiller.module)

    usual, captured = student(flag=False), student(flag=True)
    for name, expected in usual.items():
        torch.testing.assert_close(captured[name], expected, rtol=1e-2, atol=1e-3, msg=name)
