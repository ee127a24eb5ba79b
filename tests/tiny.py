"""A problem so small that a step takes milliseconds: images, untrained teachers, environments."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from copy import deepcopy
from dataclasses import fields, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtkd_env.computing import Computing
from mtkd_env.data import BatchStream, DataSpec, ImageData
from mtkd_env.distiller import Distiller
from mtkd_env.env import EnvSpec, MTKDVectorEnv
from mtkd_env.networks.base import Network
from mtkd_env.optimization import Recipe
from mtkd_env.options import field_names
from mtkd_env.reference import ReferenceImages
from mtkd_env.registration import prior_of
from mtkd_env.seeding import seeded
from mtkd_env.teachers import TeacherEnsemble, TrainingSet
from mtkd_env.terms import Distillation
from mtkd_env.types import (
    Batch,
    BatchEvidence,
    DistillState,
    NetworkOutput,
    TeacherOutputs,
    TeacherWeights,
)

CLASSES = 4
IMAGE_SHAPE = (1, 8, 8)
NUM_ENVS = 4
STEPS_PER_EPOCH = 2


def label(value: Any) -> str:
    """A parameter's name in the list of tests, without its address: processes must agree on it."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


# With all that a step may have: momentum, clipped gradients, a rate that changes.
RECIPES = {
    optimizer: Recipe(
        epochs=8, lr=0.01, optimizer=optimizer, schedule="cosine", clip_norm=1.0, warmup_epochs=1.0
    )
    for optimizer in ("sgd", "adamw")
}

# What makes an algorithm of Stable-Baselines3 or sb3-contrib learn within a few steps.
AT_ONCE = {"learning_starts": 16, "batch_size": 16}
SB3_ARGUMENTS: dict[str, dict[str, Any]] = {
    "ppo": {"n_steps": 2, "n_epochs": 2, "n_minibatches": 2},
    "trpo": {"n_steps": 2, "n_minibatches": 2},
    "ars": {"n_delta": 2},
    **dict.fromkeys(("ddpg", "td3", "sac", "tqc", "crossq"), AT_ONCE),
}
CONTRIB = ("ars", "crossq", "tqc", "trpo")

# The configuration of a run of the whole program that takes a second.
SMALL_RUN = """
teachers:
  teachers:
    - {network: resnet8, width: 0.125}
    - {network: wrn_16_1, width: 0.125}
  recipe: {epochs: 1}
data: {train_size: 64, batch_size: 16}
student: {network: resnet8, width: 0.125}
optimizer: {epochs: 3}
device: cpu
checkpoint: {share: 1.0}
"""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def data(train: int = NUM_ENVS * STEPS_PER_EPOCH + 1, test: int = 40) -> ImageData:
    """Noise with a bright quadrant, a different one for each class: learnable in a second."""

    def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
        targets = torch.arange(count) % CLASSES
        noise = torch.randint(100, (count, *IMAGE_SHAPE), generator=generator(seed))
        for image, target in zip(noise, targets.tolist(), strict=True):
            row, column = divmod(target, 2)
            image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 150
        return noise.to(torch.uint8), targets

    x_train, y_train = images(train, seed=1)
    x_test, y_test = images(test, seed=2)
    return ImageData(
        name="tiny",
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        num_classes=CLASSES,
        flip=False,
        crop_padding=1,
    )


def load_dataset(
    name: Any, /, *, test_fraction: float = 0.0, augmentation: str | None = None, **arguments: Any
) -> Any:
    return DataSpec(name, arguments, test_fraction=test_fraction, augmentation=augmentation).load()


def training_set(train: int = NUM_ENVS * STEPS_PER_EPOCH + 1) -> TrainingSet:
    return TrainingSet(data(train), data(train).split())


def seldom(values: Iterable[Any], often: Collection[Any]) -> list[Any]:
    """Parameters of a test that is long: all but some are slow ones."""
    return [
        one
        if one in often
        else pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.slow)
        for one in values
    ]


class TinyNetwork(Network):
    """Two convolutions, each with a batch norm and a ReLU.

    A signed one has a batch norm of the images instead, which cannot be folded into a convolution.

    Args:
        channels: Of both convolutions; the width of the feature.
        side: Height and width of the last map: 2, 4 or 8.
        signed: Whether the last map takes negative values.
    """

    def __init__(self, channels: int = 6, side: int = 2, *, signed: bool = False) -> None:
        super().__init__()
        self.num_classes = CLASSES
        self.feature_dim = self.map_channels = channels
        self.signed_map = signed

        def convolution(before: int, *, stride: int) -> nn.Conv2d:
            return nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)

        first = convolution(1, stride=1 if side == 8 else 2)
        second = convolution(channels, stride=2 if side == 2 else 1)
        if signed:
            self.body = nn.Sequential(nn.BatchNorm2d(1), first, nn.ReLU(), second)
        else:
            norms = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
            self.body = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU())
        self.classifier = nn.Linear(channels, CLASSES)

    def features(self, inputs: Tensor) -> Tensor:
        return self.body(inputs)


# Widths, maps and signs differ, so that a mix-up of teachers shows.
TEACHERS: dict[str, Callable[[], TinyNetwork]] = {
    "narrow": partial(TinyNetwork, 4),
    "wide": partial(TinyNetwork, 8, side=4),
    "signed": partial(TinyNetwork, 5, signed=True),
}


def perturb(module: Network, seed: int) -> Network:
    """The network in evaluation mode, its batch norms no identities, its logits far apart."""
    draw = generator(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value in (layer.weight.data, layer.running_var):
                value.copy_(0.5 + torch.rand(value.shape, generator=draw))
            for value in (layer.bias.data, layer.running_mean):
                value.copy_(0.2 * torch.randn(value.shape, generator=draw))
        if isinstance(layer, nn.Linear):
            layer.weight.data *= 4
    return module.eval()


def teacher_networks(count: int = len(TEACHERS)) -> list[Network]:
    makers = list(TEACHERS.values())[:count]
    with seeded(0):
        return [perturb(make(), seed) for seed, make in enumerate(makers)]


@cache
def teachers(count: int = len(TEACHERS)) -> TeacherEnsemble:
    """Untrained teachers; shared by all tests, which is safe because they never change."""
    return TeacherEnsemble(teacher_networks(count), list(TEACHERS)[:count])


def chosen_teachers(order: list[int]) -> TeacherEnsemble:
    """The teachers in another order; one may occur more than once."""
    networks = teacher_networks()
    return TeacherEnsemble([networks[m] for m in order], [str(m) for m in range(len(order))])


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def states_equal(first: nn.Module, second: nn.Module) -> bool:
    expected = second.state_dict()
    return all(tensor.equal(expected[name]) for name, tensor in first.state_dict().items())


def assert_same(module: nn.Module, expected: dict[str, Tensor]) -> None:
    found = module.state_dict()
    assert list(found) == list(expected)
    assert [name for name, tensor in found.items() if not tensor.equal(expected[name])] == []


def batch(seed: int = 0, size: int = NUM_ENVS) -> Batch:
    draw = generator(seed)
    return Batch(
        inputs=torch.randn(size, *IMAGE_SHAPE, generator=draw),
        targets=torch.randint(CLASSES, (size,), generator=draw),
        index=torch.arange(size),
    )


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return [next(batches) for _ in range(count)]


def assert_same_batches(left: list[Batch], right: list[Batch]) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.inputs.equal(other.inputs)
        assert one.targets.equal(other.targets)
        assert one.index.equal(other.index)
        assert (one.mixture is None) == (other.mixture is None)
        if one.mixture is not None:
            assert one.mixture.equal(other.mixture)


def stream(num_envs: int = NUM_ENVS, seed: int = 0) -> BatchStream:
    return training_set().stream(num_envs, torch.device("cpu"), seed)


def make_tiny_distiller(
    *,
    count: int = len(TEACHERS),
    ensemble: TeacherEnsemble | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    student: Callable[[], Network] = TinyNetwork,
    **kwargs: Any,
) -> Distiller:
    """A distiller with `count` untrained teachers, or with the given ones.

    `kwargs` are fields of `Distillation` and `Computing`, and further arguments of `Distiller`.
    """
    ensemble = teachers(count) if ensemble is None else ensemble
    device = next(ensemble.parameters()).device
    images = partial(_evaluated, "train", device)
    kwargs.setdefault("reference", ReferenceImages(ensemble, labelled=images, student=images))
    loss, computing = (
        {name: kwargs.pop(name) for name in field_names(kind) if name in kwargs}
        for kind in (Distillation, Computing)
    )
    distiller = Distiller(
        student,
        ensemble,
        image_shape=IMAGE_SHAPE,
        steps_per_epoch=STEPS_PER_EPOCH,
        distillation=Distillation(**loss),
        recipe=recipe or Recipe(epochs=4, lr=0.1),
        computing=Computing(**computing),
        **kwargs,
    )
    distiller.reinitialize(seed)
    return distiller


def make_tiny_env(
    *,
    batches: BatchStream | None = None,
    distiller: Distiller | None = None,
    **kwargs: Any,
) -> MTKDVectorEnv:
    """An environment of `NUM_ENVS` samples and `STEPS_PER_EPOCH` steps an epoch, not yet reset.

    Fields of `EnvSpec` are those of the environment; all others are arguments of
    `make_tiny_distiller`, unless a distiller is given.
    """
    options = {name: kwargs.pop(name) for name in field_names(EnvSpec) if name in kwargs}
    if distiller is None:
        distiller = make_tiny_distiller(**kwargs)
    splits = {
        "train": partial(_evaluated, "train"),
        "test": partial(_evaluated, "test"),
    }
    spec = EnvSpec(**options)
    prior = prior_of(distiller, spec.prior)
    return MTKDVectorEnv(distiller, batches or stream(), splits, spec, prior)


def make_tiny_env_on(
    device: str, *, recipe: Recipe | None = None, precision: str = "fp32", **kwargs: Any
) -> MTKDVectorEnv:
    """A tiny environment on a device, reset. `kwargs` are fields of `EnvSpec`."""
    # Not the teachers that tests share, which would move there.
    ensemble = deepcopy(teachers()).to(device)
    distiller = make_tiny_distiller(ensemble=ensemble, recipe=recipe, precision=precision)
    batches = training_set().stream(NUM_ENVS, torch.device(device), 0)
    env = make_tiny_env(distiller=distiller, batches=batches, **kwargs)
    env.reset(seed=0)
    return env


class Told:
    """Progress that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def teacher(self, name: str, epoch: int, epochs: int, loss: float) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


def _evaluated(part: str, device: torch.device | str = "cpu") -> Any:
    images = training_set()
    split = images.splits.train if part == "train" else images.splits.test
    return images.data.evaluation_batches(split, 16, device=device)


def make_state(
    *,
    teacher_cross_entropy: Tensor,
    divergence: Tensor,
    similarity: Tensor | None = None,
    distance: Tensor | None = None,
    cross_entropy: Tensor | None = None,
    **changes: Any,
) -> DistillState:
    """A state whose evidence is given by hand; the rest is zeros of fitting shapes."""
    size, count = divergence.shape
    output = NetworkOutput(
        logits=torch.zeros(size, CLASSES),
        feature=torch.zeros(size, 2),
        feature_map=torch.zeros(size, 2, 1, 1),
    )
    none = TeacherOutputs(
        logits=torch.zeros(count, size, CLASSES),
        features=(output.feature,) * count,
        feature_maps=(output.feature_map,) * count,
    )
    none_far = torch.zeros(size, count)
    fields = {
        "batch": batch(size=size),
        "student": output,
        "teachers": none,
        "cross_entropy": torch.zeros(size) if cross_entropy is None else cross_entropy,
        "kd": divergence,
        "feature": none_far if distance is None else distance,
        "divergence": divergence,
    }
    evidence = BatchEvidence(
        projected=changes.pop("projected", none.feature_maps),
        teacher_cross_entropy=teacher_cross_entropy,
        distance=none_far if distance is None else distance,
        similarity=none_far if similarity is None else similarity,
    )
    return DistillState(**(fields | changes), evidence=evidence)


def with_evidence(state: DistillState, **changes: Any) -> DistillState:
    """A state with some of its evidence replaced."""
    known = {entry.name: getattr(state.evidence, entry.name) for entry in fields(BatchEvidence)}
    return replace(state, evidence=BatchEvidence(**(known | changes)))


def random_weights(seed: int = 0, size: int = NUM_ENVS, count: int = 3) -> TeacherWeights:
    draw = generator(seed)
    return TeacherWeights(*(torch.randn(size, count, generator=draw).softmax(1) for _ in range(2)))


def random_state(seed: int = 0, size: int = 5, count: int = 3) -> DistillState:
    """A state with random evidence and logits, of no network in particular."""
    draw = generator(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw)

    logits = 4 * rand(count, size, CLASSES)
    features = tuple(rand(size, 2 + m) for m in range(count))
    maps = tuple(rand(size, 2 + m, 2, 2) for m in range(count))
    student = NetworkOutput(
        logits=4 * rand(size, CLASSES), feature=rand(size, 2), feature_map=rand(size, 2, 2, 2)
    )
    return make_state(
        teacher_cross_entropy=3 * rand(size, count),
        divergence=3 * rand(size, count),
        similarity=2 * rand(size, count) - 1,
        distance=rand(size, count),
        cross_entropy=2 * rand(size),
        student=student,
        teachers=TeacherOutputs(logits, features, maps),
        projected=maps,
        direction=rand(CLASSES, 3) - 0.5,
    )


def reorder_teachers(state: DistillState, order: list[int]) -> DistillState:
    """The same state with its teachers in another order."""

    def columns(tensor: Tensor) -> Tensor:
        return tensor[:, order]

    known = state.teachers
    return replace(
        with_evidence(
            state,
            projected=tuple(state.projected[m] for m in order),
            distance=columns(state.distance),
            teacher_cross_entropy=columns(state.teacher_cross_entropy),
            similarity=columns(state.similarity),
        ),
        teachers=TeacherOutputs(
            known.logits[order],
            tuple(known.features[m] for m in order),
            tuple(known.feature_maps[m] for m in order),
        ),
        kd=columns(state.kd),
        feature=columns(state.feature),
        divergence=columns(state.divergence),
    )
