"""A problem so small that a step takes milliseconds: images, untrained teachers, environments."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from mtkd_env.data import BatchStream, ImageData, evaluation_batches
from mtkd_env.distiller import Distiller
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.networks import Network, build_network
from mtkd_env.optimization import SGDRecipe
from mtkd_env.teachers import TeacherEnsemble, TrainingSet
from mtkd_env.types import Batch, DistillState, NetworkOutput, TeacherOutputs

CLASSES = 4
IMAGE_SHAPE = (1, 8, 8)
# Widths of the features, and so of the observation's blocks, differ between teachers.
TEACHERS = {"narrow": ("resnet8", 0.25), "wide": ("resnet8", 0.5), "wrn": ("wrn_16_1", 0.25)}
NUM_ENVS = 4
STEPS_PER_EPOCH = 3


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def data(train: int = NUM_ENVS * STEPS_PER_EPOCH + 1, test: int = 8) -> ImageData:
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


def training_set(train: int = NUM_ENVS * STEPS_PER_EPOCH + 1) -> TrainingSet:
    splits = data(train).split()
    return TrainingSet(data(train), splits.train, splits.test)


def network(name: str = "resnet8", width: float = 0.25, seed: int = 0) -> Network:
    return build_network(
        name, num_classes=CLASSES, in_channels=IMAGE_SHAPE[0], width=width, seed=seed
    )


def perturb(module: Network, seed: int) -> Network:
    """The network with batch norms that are no identities and logits that are not all alike."""
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
    specs = list(TEACHERS.values())[:count]
    return [perturb(network(name, width, seed), seed) for seed, (name, width) in enumerate(specs)]


@cache
def teachers(count: int = len(TEACHERS)) -> TeacherEnsemble:
    """Untrained teachers; shared by all tests, which is safe because they never change."""
    return TeacherEnsemble(teacher_networks(count), list(TEACHERS)[:count])


def batch(seed: int = 0, size: int = NUM_ENVS) -> Batch:
    draw = generator(seed)
    return Batch(
        inputs=torch.randn(size, *IMAGE_SHAPE, generator=draw),
        targets=torch.randint(CLASSES, (size,), generator=draw),
        index=torch.arange(size),
    )


def stream(num_envs: int = NUM_ENVS, seed: int = 0) -> BatchStream:
    return training_set().stream(num_envs, torch.device("cpu"), seed)


def student_maker(name: str = "resnet8", width: float = 0.125) -> Callable[[], Network]:
    return partial(
        build_network, name, num_classes=CLASSES, in_channels=IMAGE_SHAPE[0], width=width
    )


def make_tiny_distiller(
    *,
    count: int = len(TEACHERS),
    ensemble: TeacherEnsemble | None = None,
    recipe: SGDRecipe | None = None,
    **kwargs: Any,
) -> Distiller:
    """A distiller with `count` untrained teachers, or with the given ones.

    `kwargs` are arguments of `Distiller`.
    """
    return Distiller(
        student_maker(),
        teachers(count) if ensemble is None else ensemble,
        image_shape=IMAGE_SHAPE,
        steps_per_epoch=STEPS_PER_EPOCH,
        recipe=recipe or SGDRecipe(epochs=4, lr=0.1),
        **kwargs,
    )


def make_tiny_env(
    *,
    batches: BatchStream | None = None,
    distiller: Distiller | None = None,
    **kwargs: Any,
) -> MTKDVectorEnv:
    """An environment of `NUM_ENVS` samples and `STEPS_PER_EPOCH` steps an epoch, not yet reset.

    Arguments of `Distiller` and of `make_tiny_distiller` build the distiller unless one is given;
    all others are arguments of `MTKDVectorEnv`.
    """
    if distiller is None:
        names = ("count", "ensemble", "recipe", "alpha", "beta", "temperature", "seed")
        distiller = make_tiny_distiller(**{n: kwargs.pop(n) for n in names if n in kwargs})
    splits = {
        "train": partial(_evaluated, "train"),
        "test": partial(_evaluated, "test"),
    }
    return MTKDVectorEnv(distiller, batches or stream(), splits, **kwargs)


def _evaluated(part: str) -> Any:
    images = training_set()
    split = images.train if part == "train" else images.test
    mean, std = images.data.mean, images.data.std
    return evaluation_batches(split, 16, mean=mean, std=std, device="cpu")


def make_state(
    *,
    teacher_cross_entropy: Tensor,
    divergence: Tensor,
    similarity: Tensor | None = None,
    feature_distance: Tensor | None = None,
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
    fields = {
        "batch": batch(size=size),
        "student": output,
        "teachers": none,
        "projected": none.feature_maps,
        "cross_entropy": torch.zeros(size) if cross_entropy is None else cross_entropy,
        "kd": divergence,
        "feature_distance": (
            torch.zeros(size, count) if feature_distance is None else feature_distance
        ),
        "teacher_cross_entropy": teacher_cross_entropy,
        "divergence": divergence,
        "similarity": torch.zeros(size, count) if similarity is None else similarity,
    }
    return DistillState(**(fields | changes))


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
        feature_distance=rand(size, count),
        cross_entropy=2 * rand(size),
        student=student,
        teachers=TeacherOutputs(logits, features, maps),
        projected=maps,
    )


def reorder_teachers(state: DistillState, order: list[int]) -> DistillState:
    """The same state with its teachers in another order."""
    from dataclasses import replace

    def columns(tensor: Tensor) -> Tensor:
        return tensor[:, order]

    known = state.teachers
    return replace(
        state,
        teachers=TeacherOutputs(
            known.logits[order],
            tuple(known.features[m] for m in order),
            tuple(known.feature_maps[m] for m in order),
        ),
        projected=tuple(state.projected[m] for m in order),
        kd=columns(state.kd),
        feature_distance=columns(state.feature_distance),
        teacher_cross_entropy=columns(state.teacher_cross_entropy),
        divergence=columns(state.divergence),
        similarity=columns(state.similarity),
    )
