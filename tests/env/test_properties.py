"""Facts that hold for every input, tried on many: losses, weightings, fusion, configurations."""

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from experiments.config import ExperimentConfig, Layer, build_config, read_flags
from mtkd_env import losses
from mtkd_env.action import FUSIONS, WeightFusion
from mtkd_env.data import BatchStream
from mtkd_env.errors import ConfigError
from mtkd_env.optimization import OPTIMIZERS, SCHEDULES
from mtkd_env.types import DistillState
from mtkd_env.weighting import WEIGHTINGS

few = settings(max_examples=15, derandomize=True, database=None, deadline=None)
many = settings(max_examples=40, derandomize=True, database=None, deadline=None)

seeds = st.integers(0, 10**6)
scales = st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4])
temperatures = st.floats(0.5, 20)
counts = st.integers(1, 5)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=tiny.generator(seed))


# Losses.


@many
@given(seed=seeds, scale=scales, temperature=temperatures, teachers=counts, size=counts)
def test_losses_of_logits_are_finite_and_not_negative(
    seed: int, scale: float, temperature: float, teachers: int, size: int
) -> None:
    student, others = scale * draw(seed, size, 4), scale * draw(seed + 1, teachers, size, 4)
    for loss in (losses.kd_divergence, losses.dist_divergence):
        found = loss(student, others, temperature)
        assert found.shape == (size, teachers)
        assert found.isfinite().all()
        assert (found >= -1e-4 * temperature**2).all()
    targets = torch.arange(size) % 4
    assert (losses.cross_entropy(student, targets) >= 0).all()
    assert (losses.teacher_cross_entropy(others, targets) >= 0).all()


@many
@given(seed=seeds, shift=st.floats(-50, 50), temperature=temperatures)
def test_shifts_of_all_logits_change_no_loss(seed: int, shift: float, temperature: float) -> None:
    student, others = draw(seed, 3, 4).double(), draw(seed + 1, 2, 3, 4).double()
    targets = torch.tensor([0, 3, 1])
    for loss in (losses.kd_divergence, losses.dist_divergence):
        expected = loss(student, others, temperature)
        torch.testing.assert_close(loss(student + shift, others, temperature), expected)
        torch.testing.assert_close(loss(student, others + shift, temperature), expected)
    expected = losses.cross_entropy(student, targets)
    torch.testing.assert_close(losses.cross_entropy(student + shift, targets), expected)


@many
@given(seed=seeds, temperature=temperatures, scale=st.floats(0.1, 10))
def test_identical_sides_have_no_loss(seed: int, temperature: float, scale: float) -> None:
    logits = (scale * draw(seed, 3, 4)).double()
    others = logits.expand(2, -1, -1)
    none = torch.zeros(3, 2, dtype=torch.float64)
    torch.testing.assert_close(losses.kd_divergence(logits, others, temperature), none)
    maps = (draw(seed, 3, 4, 2, 2), draw(seed + 1, 3, 5, 1, 1))
    assert losses.feature_mse(maps, maps).count_nonzero() == 0
    torch.testing.assert_close(losses.feature_cosine(maps, maps), torch.ones(3, 2))


# Weightings and fusion.


def extreme(state: DistillState, scale: float) -> DistillState:
    """The same state with evidence that is many times larger or smaller."""
    teachers = replace(state.teachers, logits=scale * state.teachers.logits)
    return tiny.with_evidence(
        replace(state, teachers=teachers, divergence=scale * state.divergence),
        teacher_cross_entropy=scale * state.teacher_cross_entropy,
        distance=scale * state.distance,
    )


def weights_of(name: str, state: DistillState) -> tuple[Tensor, Tensor]:
    """Weights of a state whose maps are as wide as those of the tiny student and its teachers."""
    size, widths = len(state.divergence), tiny.teachers().map_channels
    student = replace(state.student, feature_map=draw(1, size, 6, 2, 2))
    projected = tuple(draw(m, size, width, 2, 2) for m, width in enumerate(widths))
    weighting = WEIGHTINGS[name](tiny.make_tiny_distiller())
    state = tiny.with_evidence(replace(state, student=student), projected=projected)
    weights = weighting(state)
    return weights.logit, weights.feature


def assert_on_simplex(rows: Tensor) -> None:
    assert rows.isfinite().all()
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
@settings(max_examples=8, derandomize=True, database=None, deadline=None)
@given(seed=seeds, scale=scales)
def test_weights_lie_on_the_simplex(name: str, seed: int, scale: float) -> None:
    for rows in weights_of(name, extreme(tiny.random_state(seed), scale)):
        assert_on_simplex(rows)


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
rows_of_actions = st.lists(st.lists(finite, min_size=6, max_size=6), min_size=5, max_size=5)


@many
@given(actions=rows_of_actions, fusion=st.sampled_from(sorted(FUSIONS)), seed=seeds, scale=scales)
def test_every_finite_action_gives_weights(
    actions: list[list[float]], fusion: str, seed: int, scale: float
) -> None:
    state = extreme(tiny.random_state(seed), scale)
    weights = WeightFusion(fusion)(torch.tensor(actions), state)
    assert_on_simplex(weights.logit.detach())
    assert_on_simplex(weights.feature.detach())


# Configurations.


def parse(values: Mapping[str, Any]) -> ExperimentConfig:
    teachers = {"teachers": [{"network": "resnet8", "width": 0.5}]}
    layers = [Layer("base", {"teachers": teachers}), Layer("given", values)]
    return build_config("aver", layers, read_flags([]))


positive = st.floats(1e-6, 1e6)
TEXT = "abc ./_-#'0:"
images_of_a_file = st.fixed_dictionaries(
    {
        "dataset": st.just("npz"),
        "arguments": st.fixed_dictionaries(
            {"path": st.text("abc ./_-", min_size=1, max_size=12).filter(str.strip)},
            optional={
                "name": st.text("abc", min_size=1, max_size=4),
                "flip": st.booleans(),
                "num_classes": st.none() | st.integers(1, 100),
            },
        ),
    }
)
valid = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**40),
        "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
        "threads": st.none() | st.integers(1, 64),
        "output": st.text(TEXT, min_size=1, max_size=12),
        "data": st.builds(
            operator.or_,
            st.sampled_from([{}, {"dataset": "digits"}]) | images_of_a_file,
            st.fixed_dictionaries(
                {},
                optional={
                    "batch_size": st.integers(1, 10**6),
                    "train_size": st.none() | st.integers(1, 10**6),
                    "val_fraction": st.floats(0, 0.99),
                    "mixup": positive,
                },
            ),
        ),
        "optimizer": st.fixed_dictionaries(
            {"epochs": st.integers(1, 10**4)},
            optional={
                "lr": positive,
                "momentum": st.floats(0, 1),
                "milestones": st.lists(st.floats(0.001, 1), max_size=4),
                "optimizer": st.sampled_from(sorted(OPTIMIZERS)),
                "schedule": st.sampled_from(sorted(SCHEDULES)),
                "clip_norm": st.none() | positive,
            },
        ),
        "distillation": st.fixed_dictionaries(
            {},
            optional={
                "alpha": positive,
                "temperature": positive,
                "logit": st.sampled_from(["kd", "dist", "none"])
                | st.fixed_dictionaries({"kd": positive, "dist": positive}),
            },
        ),
    },
)


@few
@given(values=valid)
def test_written_configurations_read_as_equal(values: dict[str, Any]) -> None:
    config = parse(values)
    again = parse(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert (again.to_yaml(), again.digest) == (config.to_yaml(), config.digest)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["kd", "fp16", "3", "1e5", "null", "{a", "[1]", ".nan", "no.yaml"])
)
garbage = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
SECTIONS = ("data", "student", "optimizer", "distillation", "env", "warmup", "checkpoint", "agent")
keys = st.sampled_from([*ExperimentConfig.__dataclass_fields__]) | st.text(max_size=6)
inner_keys = st.sampled_from(["dataset", "lr", "epochs", "alpha", "logit", "network", "name"])
mappings = st.dictionaries(keys, garbage, max_size=3) | st.dictionaries(
    st.sampled_from(SECTIONS), st.dictionaries(inner_keys, garbage, max_size=3), max_size=2
)


@settings(max_examples=25, derandomize=True, database=None, deadline=None)
@given(values=mappings)
def test_garbage_is_a_configuration_or_one_clear_error(values: dict[str, Any]) -> None:
    message = ""
    try:
        parse(values)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message


# Streams.


def stream(images: int, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1)) -> BatchStream:
    data = tiny.data(images)
    return data.stream(
        data.split().train, batch_size=batch_size, device="cpu", seed=seed, shard=shard
    )


sizes = st.integers(8, 30)


@few
@given(images=sizes, batch_size=st.integers(1, 8), seed=seeds)
def test_no_epoch_visits_an_image_twice(images: int, batch_size: int, seed: int) -> None:
    batches = stream(images, batch_size, seed)
    for _ in range(2):
        steps = range(batches.steps_per_epoch)
        visited = torch.cat([next(batches).index for _ in steps]).tolist()
        assert len(set(visited)) == len(visited) == images // batch_size * batch_size
        assert set(visited) <= set(range(images))


@few
@given(images=sizes, batch_size=st.integers(2, 8), seed=seeds, steps=st.integers(0, 12))
def test_a_stream_goes_on_exactly_from_any_step(
    images: int, batch_size: int, seed: int, steps: int
) -> None:
    first = stream(images, batch_size, seed)
    for _ in range(steps):
        next(first)
    second = stream(images, batch_size, seed + 1)
    second.load_state_dict(first.state_dict())
    for _ in range(6):
        expected, found = next(first), next(second)
        assert found.index.tolist() == expected.index.tolist()
        assert found.inputs.equal(expected.inputs)
    assert (second.epoch, second.step) == (first.epoch, first.step)


@few
@given(images=sizes, processes=st.integers(1, 4), seed=seeds)
def test_the_parts_of_all_processes_are_the_whole_batch(
    images: int, processes: int, seed: int
) -> None:
    whole = stream(images, 2 * processes, seed)
    parts = [stream(images, 2 * processes, seed, (rank, processes)) for rank in range(processes)]
    for _ in range(2 * whole.steps_per_epoch + 1):
        expected, found = next(whole), [next(part) for part in parts]
        assert torch.cat([part.index for part in found]).equal(expected.index)
        assert torch.cat([part.inputs for part in found]).equal(expected.inputs)
