"""Assembles an environment from plain keyword arguments; what `gymnasium.make_vec` calls."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import torch

from mtkd_env.action import check_logit_bound, fusion_coefficients
from mtkd_env.compilation import NONE, check_compile
from mtkd_env.data import load_dataset
from mtkd_env.data.dataset import ImageSet
from mtkd_env.data.mixing import Mixing
from mtkd_env.data.stream import BatchStream
from mtkd_env.data.views import ViewSet
from mtkd_env.distiller import Distiller
from mtkd_env.env import MTKDVectorEnv, Splits, check_choices
from mtkd_env.errors import ConfigError, check_arguments, check_types
from mtkd_env.files import cache_folder
from mtkd_env.inference import as_under_no_grad
from mtkd_env.networks import build_network, check_network, check_network_arguments
from mtkd_env.networks.base import Network
from mtkd_env.optimization import Recipe, make_recipe
from mtkd_env.precision import FULL, check_precision
from mtkd_env.seeding import derive_seed
from mtkd_env.teachers import (
    Fidelity,
    Note,
    PoolSpec,
    StoreSpec,
    TeacherEnsemble,
    TeacherPool,
    TeacherSpec,
    TrainingSet,
    check_prefetch,
    check_teacher_precision,
    class_means,
    load_pool_spec,
    prepare_teachers,
)
from mtkd_env.teachers.pool import PoolProgress, teacher_recipe
from mtkd_env.teachers.store import check_store
from mtkd_env.terms import (
    FEATURE_TERMS,
    LOGIT_TERMS,
    Terms,
    check_scales,
    needs_directions,
    parse_terms,
)

# Small networks that the digits need seconds each to train.
DEFAULT_TEACHERS = ("resnet8", "resnet14", "resnet20", "wrn_16_1")
DEFAULT_TEACHER_EPOCHS = 12

logger = logging.getLogger(__name__)

# Datasets by the names of their environments.
ENV_NAMES = {
    "Digits": "digits",
    "Npz": "npz",
    "Cifar10": "cifar10",
    "Cifar100": "cifar100",
    "FashionMnist": "fashion_mnist",
    "ImageNet": "imagenet",
    "Folder": "folder",
}

Teachers = str | Path | PoolSpec | Sequence[str | dict[str, Any]]


def pool_spec(teachers: Teachers, epochs: int | None = None) -> PoolSpec:
    """A pool from any of its short forms.

    Args:
        teachers: A YAML file, a `PoolSpec`, or a sequence of networks' names and of keyword
            arguments of `TeacherSpec`.
        epochs: Epochs to train each for; not for a YAML file or a `PoolSpec`, which say it.

    Raises:
        ConfigError: A file, a name or a key that is not there, or `epochs` said twice.
    """
    if isinstance(teachers, PoolSpec | str | Path):
        if epochs is not None:
            raise ConfigError("teacher_epochs: the pool's own recipe says how long to train")
        return teachers if isinstance(teachers, PoolSpec) else load_pool_spec(teachers)
    specs = tuple(
        TeacherSpec(network=teacher) if isinstance(teacher, str) else _teacher_spec(teacher, i)
        for i, teacher in enumerate(teachers)
    )
    return PoolSpec(specs, teacher_recipe(epochs or DEFAULT_TEACHER_EPOCHS))


def _teacher_spec(arguments: dict[str, Any], position: int) -> TeacherSpec:
    check_arguments(TeacherSpec, arguments, f"teachers.{position}")
    if "network" not in arguments:
        raise ConfigError(f"teachers.{position}: lacks the key 'network'")
    return TeacherSpec(**arguments)


def _store_spec(arguments: dict[str, Any]) -> StoreSpec:
    check_arguments(StoreSpec, arguments, "store")
    check_types(StoreSpec, arguments, "store")
    return StoreSpec(**arguments)


@dataclass(frozen=True, slots=True)
class Assembly:
    """An environment and what it was made from.

    Attributes:
        env: The environment.
        data: The dataset.
        pool: The teachers, with their results and digests.
        fidelities: How near each int8 teacher is to what it was in float32.
    """

    env: MTKDVectorEnv
    data: ImageSet[Any]
    pool: TeacherPool
    fidelities: dict[str, Fidelity] = field(default_factory=dict)


@as_under_no_grad
def assemble(
    *,
    dataset: str = "digits",
    dataset_kwargs: dict[str, Any] | None = None,
    num_envs: int = 64,
    val_fraction: float = 0.0,
    train_size: int | None = None,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    views: int | None = None,
    view_seed: int = 0,
    teachers: Teachers = DEFAULT_TEACHERS,
    teacher_epochs: int | None = None,
    store: dict[str, Any] | None = None,
    prefetch: int | None = None,
    student: str = "resnet8",
    student_width: float = 0.25,
    student_arguments: dict[str, Any] | None = None,
    recipe: Recipe | dict[str, Any] | None = None,
    alpha: float = 1.0,
    beta: float = 5.0,
    temperature: float = 4.0,
    logit: Terms = "kd",
    feature: Terms = "mse",
    precision: str = FULL,
    teacher_precision: str | None = None,
    compile: str = NONE,
    device: str = "cpu",
    cache: str | Path | None = None,
    seed: int = 0,
    progress: PoolProgress | None = None,
    note: Note = logger.info,
    **env_kwargs: Any,
) -> Assembly:
    """Builds data, teachers, student and environment.

    Teachers that were never trained before are trained now and kept.

    Args:
        dataset: Name in `DATASETS`.
        dataset_kwargs: Arguments of the dataset, such as `path` for `npz`.
        num_envs: B, the batch size.
        val_fraction: Share of the training images held out for the split `val`.
        train_size: Number of training images to keep; all by default.
        mixup: α of the mixup of the student's batches; 0 is none. Teachers in training see whole
            images.
        cutmix: α of their cutmix; with both, every batch takes either.
        views: Views that each image is seen in, one after the other in the epochs; by default a new
            one at random every time.
        view_seed: Seed of the choice of so many views; not the run's, so that runs of all seeds can
            share the teachers' outputs.
        teachers: Networks' names, keyword arguments of `TeacherSpec`, a `PoolSpec`, or a YAML
            file that describes one.
        teacher_epochs: Epochs to train each teacher for, where `teachers` are names.
        store: Keyword arguments of `StoreSpec`, which keeps the teachers' outputs, instead of the
            pool's own.
        prefetch: Batches that the teachers are asked about together; None for what suits the
            device. The numbers do not depend on it but for rounding.
        student: Name of a network; see `mtkd_env.networks.find_network`.
        student_width: Factor on all channel counts of the student.
        student_arguments: Further keyword arguments of the student's network.
        recipe: The student's optimiser and schedule, or the keyword arguments of `Recipe`.
        alpha: α, weight of the logit terms.
        beta: β, weight of the feature terms.
        temperature: T of the logit terms.
        logit: Losses of the logit terms: a name in `LOGIT_TERMS`, `none`, or names with
            coefficients.
        feature: Losses of the feature terms, likewise in `FEATURE_TERMS`.
        precision: What student and teachers compute in: `fp32`, `bf16` or `fp16`.
        teacher_precision: What the teachers compute in, if it is something else; on a CPU also
            `int8`, which is nearly the same several times as fast.
        compile: How the networks are compiled: `none`, or a mode of `torch.compile`.
        device: Device of student, teachers and images.
        cache: Folder of trained teachers; see `mtkd_env.files.cache_folder`.
        seed: Seed of the first student and of its data order, until a seeded reset.
        progress: Called while a teacher is being trained.
        note: Called with a line about each teacher in int8; logged by default.
        env_kwargs: Keyword arguments of `MTKDVectorEnv`.

    Raises:
        ConfigError: Any argument that cannot be used; names it.
    """
    check_names(
        student=student,
        student_arguments=student_arguments,
        logit=logit,
        feature=feature,
        **env_kwargs,
    )
    check_scales(alpha=alpha, beta=beta, temperature=temperature)
    check_prefetch(prefetch)
    _check_computing(device, precision, teacher_precision or precision, compile)
    if not isinstance(recipe, Recipe):
        recipe = make_recipe(recipe or {}, "recipe")
    mixing = Mixing(mixup, cutmix)
    spec = pool_spec(teachers, teacher_epochs)
    kept = spec.store if store is None else _store_spec(store)
    images = load_images(dataset, dataset_kwargs, val_fraction=val_fraction, train_size=train_size)
    data = images.data
    make_student = student_maker(data, student, student_width, student_arguments)
    # Teachers may take days to train, so a student that cannot be made is to be known before.
    make_student(seed=0)
    data_seed = derive_seed(seed, "data")
    stream = images.stream(
        num_envs, torch.device(device), data_seed, mixing=mixing, view_set=ViewSet(views, view_seed)
    )
    check_store(kept, stream)
    pool, fidelities = prepare_teachers(
        spec,
        images,
        stream,
        val_fraction=val_fraction,
        store=kept,
        precision=teacher_precision or precision,
        compile=compile,
        prefetch=prefetch,
        device=device,
        cache=cache_folder(cache),
        progress=progress,
        note=note,
    )
    env = make_learner(
        make_student,
        pool.ensemble,
        data,
        stream,
        _evaluated(images, device),
        seed=seed,
        distillation={
            "recipe": recipe,
            "alpha": alpha,
            "beta": beta,
            "temperature": temperature,
            "logit": logit,
            "feature": feature,
            "precision": precision,
            "compile": compile,
        },
        **env_kwargs,
    )
    return Assembly(env, data, pool, fidelities)


def student_maker(
    data: ImageSet[Any], network: str, width: float, arguments: dict[str, Any] | None = None
) -> Callable[..., Network]:
    """Makes new students for a dataset.

    Args:
        data: The dataset.
        network: Name of a network.
        width: Factor on all its channel counts.
        arguments: Further keyword arguments of the network.
    """
    return partial(
        build_network,
        network,
        num_classes=data.num_classes,
        in_channels=data.image_shape[0],
        image_size=data.image_shape[1:],
        width=width,
        **(arguments or {}),
    )


def make_learner(
    make_student: Callable[..., Network],
    teachers: TeacherEnsemble,
    data: ImageSet[Any],
    stream: BatchStream,
    splits: Splits,
    *,
    seed: int,
    distillation: Mapping[str, Any],
    **env_kwargs: Any,
) -> MTKDVectorEnv:
    """An environment with a new student, of images and teachers that are there already.

    Args:
        make_student: Makes a new student.
        teachers: The teachers; they decide the device.
        data: What the images are.
        stream: The student's batches.
        splits: What the student is evaluated on.
        seed: Seed of the student, until a seeded reset.
        distillation: Further keyword arguments of `Distiller`.
        env_kwargs: Keyword arguments of `MTKDVectorEnv`.
    """
    needs_means = needs_directions(distillation["feature"])
    distiller = Distiller(
        make_student,
        teachers,
        image_shape=data.image_shape,
        steps_per_epoch=stream.steps_per_epoch,
        directions=class_means(teachers, splits["train"]()) if needs_means else (),
        device=next(teachers.parameters()).device,
        seed=derive_seed(seed, "student"),
        **distillation,
    )
    return MTKDVectorEnv(distiller, stream, splits, **env_kwargs)


def check_names(
    *,
    student: str,
    student_arguments: dict[str, Any] | None = None,
    logit: Terms,
    feature: Terms,
    **env_kwargs: Any,
) -> None:
    """Checks what `assemble` can know to be wrong before anything is loaded or trained.

    Raises:
        ConfigError: A network, a loss or a choice that does not exist, an unknown argument, or
            numbers of the action that cannot be used.
    """
    check_arguments(MTKDVectorEnv.__init__, env_kwargs, "env")
    check_choices(**env_kwargs)
    if "fusion" in env_kwargs:
        fusion_coefficients(env_kwargs["fusion"])
    if "logit_bound" in env_kwargs:
        check_logit_bound(env_kwargs["logit_bound"])
    check_network(student, "student")
    check_network_arguments(student, student_arguments or {}, "student.arguments")
    parse_terms(logit, LOGIT_TERMS, "logit")
    parse_terms(feature, FEATURE_TERMS, "feature")


def _check_computing(device: str, precision: str, teacher_precision: str, compile: str) -> None:
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: cannot use '{device}': {reason}") from error
    check_precision(precision, device)
    check_teacher_precision(teacher_precision, device)
    check_compile(compile, device)


def load_images(
    dataset: str,
    dataset_kwargs: dict[str, Any] | None = None,
    *,
    val_fraction: float = 0.0,
    train_size: int | None = None,
) -> TrainingSet:
    """A dataset and its parts; see `assemble` for the arguments."""
    data = load_dataset(dataset, **(dataset_kwargs or {}))
    return TrainingSet(data, data.split(val_fraction, train_size=train_size))


def _evaluated(images: TrainingSet, device: str) -> dict[str, Any]:
    """A maker of unaugmented batches for every split that there is."""
    splits = images.splits
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {
        name: partial(images.evaluation_batches, part.to(device), device)
        for name, part in parts.items()
        if part is not None
    }


def make_env(*, max_episode_steps: int | None = None, **kwargs: Any) -> MTKDVectorEnv:
    """The environment behind the registered ids.

    Args:
        max_episode_steps: Not supported: `episode` decides where episodes end.
        kwargs: Keyword arguments of `assemble`.

    Raises:
        ConfigError: Any argument that cannot be used; names it.
    """
    if max_episode_steps is not None:
        raise ConfigError("max_episode_steps: not supported; use episode='epoch' or 'training'")
    return assemble(**kwargs).env


def register_envs() -> None:
    """Registers `MTKD/Digits-v0` and others, one a dataset; done by importing the package."""
    for name, dataset in ENV_NAMES.items():
        if f"MTKD/{name}-v0" not in gymnasium.registry:
            gymnasium.register(
                id=f"MTKD/{name}-v0",
                vector_entry_point="mtkd_env.registration:make_env",
                kwargs={"dataset": dataset},
                nondeterministic=torch.cuda.is_available(),
            )
