"""Facts of teachers that are asked about several batches at once."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mtkd_env.computing import Computing
from mtkd_env.data import BatchStream, Mixing
from mtkd_env.errors import ConfigError
from mtkd_env.teachers.preparation import IMAGES_AT_ONCE, ask_together, batches_at_once
from mtkd_env.types import TeacherOutputs
from tiny import NUM_ENVS, make_tiny_env, teachers, training_set

STEPS = 5
COUNTS = [1, 2, 3, STEPS, STEPS + 2]

counts = pytest.mark.parametrize("count", COUNTS)


def make_stream(**arguments: Any) -> BatchStream:
    images = training_set(NUM_ENVS * STEPS + 1)
    return images.stream(NUM_ENVS, torch.device("cpu"), 0, **arguments)


def prefetching(count: int, **arguments: Any) -> BatchStream:
    stream = make_stream(**arguments)
    stream.teaching = partial(ask_together, teachers(), count)
    return stream


def tensors(outputs: TeacherOutputs) -> Iterator[Tensor]:
    yield outputs.logits
    yield from outputs.features
    yield from outputs.feature_maps


@counts
@pytest.mark.parametrize("mixing", [Mixing(), Mixing(mixup=0.5)])
def test_batches_bring_what_the_teachers_say_of_them(count: int, mixing: Mixing) -> None:
    stream, plain = prefetching(count, mixing=mixing), make_stream(mixing=mixing)
    for _ in range(2 * STEPS + 1):
        batch, expected = next(stream), next(plain)
        assert batch.inputs.equal(expected.inputs)
        assert batch.index.equal(expected.index)
        assert batch.teachers is not None
        pairs = zip(tensors(batch.teachers), tensors(teachers()(batch.inputs)), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other)


@counts
@pytest.mark.parametrize("done", range(STEPS + 1))
def test_a_stream_knows_where_it_is_whatever_has_been_prefetched(count: int, done: int) -> None:
    stream, plain, resumed = prefetching(count), make_stream(), prefetching(count)
    for _ in range(done):
        next(stream)
        next(plain)
    assert str(stream.state_dict()) == str(plain.state_dict())
    resumed.load_state_dict(stream.state_dict())
    for _ in range(STEPS):
        assert next(resumed).inputs.equal(next(plain).inputs)


@counts
def test_the_student_does_not_notice(count: int) -> None:
    envs = [
        make_tiny_env(batches=stream, output="torch")
        for stream in (prefetching(count), make_stream())
    ]
    for env in envs:
        env.reset()
        for _ in range(STEPS + 2):
            env.step(torch.zeros(*env.action_space.shape))
    students = [torch.cat([p.flatten() for p in env.distiller.module.parameters()]) for env in envs]
    torch.testing.assert_close(*students)


def test_a_reset_forgets_what_has_been_prefetched() -> None:
    env = make_tiny_env(batches=prefetching(3))
    first, _ = env.reset(seed=7)
    env.step(env.action_space.sample())
    again, _ = env.reset(seed=7)
    assert (first == again).all()


def test_on_a_cpu_nothing_is_prefetched_and_on_a_gpu_many_images() -> None:
    assert batches_at_once(None, 64, torch.device("cpu")) == 1
    assert batches_at_once(None, 64, torch.device("cuda")) == IMAGES_AT_ONCE // 64
    assert batches_at_once(None, 4096, torch.device("cuda")) == 1
    assert batches_at_once(3, 64, torch.device("cuda")) == 3


def test_a_number_below_one_is_refused() -> None:
    assert Computing().prefetch is None
    with pytest.raises(ConfigError, match="prefetch: expected at least 1, got 0"):
        Computing(prefetch=0)
