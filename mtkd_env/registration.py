"""Assembles an environment from options; what `gymnasium.make_vec` calls."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

import gymnasium
import torch

from mtkd_env.action import Prior
from mtkd_env.computing import Computing
from mtkd_env.data import DataSpec, ImageSet
from mtkd_env.data.stream import BatchStream
from mtkd_env.distiller import Distiller
from mtkd_env.env import EnvSpec, MTKDVectorEnv
from mtkd_env.errors import ConfigError, check_name, did_you_mean
from mtkd_env.imports import Named
from mtkd_env.inference import as_under_no_grad
from mtkd_env.networks import StudentSpec, build_network
from mtkd_env.networks.base import Network
from mtkd_env.optimization import Recipe
from mtkd_env.options import as_fields, build, field_names
from mtkd_env.reference import ReferenceImages
from mtkd_env.seeding import derive_seed
from mtkd_env.teachers.ensemble import TeacherEnsemble
from mtkd_env.teachers.pool import PoolSpec, TeacherPool, TeacherSpec, load_pool_spec, own_images
from mtkd_env.teachers.preparation import Progress, prepare_teachers
from mtkd_env.teachers.quantization import Fidelity, check_teacher_precision
from mtkd_env.teachers.store import check_store
from mtkd_env.teachers.training import EVALUATION_BATCH, TrainingSet
from mtkd_env.terms import Distillation
from mtkd_env.weighting import WEIGHTING

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


@dataclass(frozen=True, slots=True)
class Parts:
    """What an environment is assembled from: the arguments of `assemble`, as options."""

    data: DataSpec
    teachers: PoolSpec
    student: StudentSpec
    optimizer: Recipe
    distillation: Distillation
    env: EnvSpec
    computing: Computing


# Classes of options by the names of the arguments of `assemble`.
PARTS: Mapping[str, Any] = {entry.name: entry.type for entry in fields(Parts)}

T = TypeVar("T")

# Options, their fields by name, or the first of them if that is a name or an object; None for the
# defaults.
Given: TypeAlias = Mapping[str, Any] | Named | T | None
Teachers: TypeAlias = (
    Given[PoolSpec] | Path | Sequence[TeacherSpec] | Sequence[str] | Sequence[Mapping[str, Any]]
)


@dataclass(frozen=True, slots=True)
class Assembly:
    """An environment and what it was made from.

    Attributes:
        env: The environment.
        images: The dataset and its parts.
        pool: The teachers, with their results and digests.
        fidelities: How near each int8 teacher is to what it was in float32.
    """

    env: MTKDVectorEnv
    images: TrainingSet
    pool: TeacherPool
    fidelities: dict[str, Fidelity] = field(default_factory=dict)


class Quiet:
    """Progress that is worth no more than a line in the log."""

    def teacher(self, name: str, epoch: int, epochs: int, loss: float) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Logs the line."""
        logger.info(text)


@as_under_no_grad
def assemble(
    *,
    data: Given[DataSpec] = None,
    teachers: Teachers = None,
    student: Given[StudentSpec] = None,
    optimizer: Given[Recipe] = None,
    distillation: Given[Distillation] = None,
    env: Given[EnvSpec] = None,
    computing: Given[Computing] = None,
    progress: Progress | None = None,
    **loose: Any,
) -> Assembly:
    """Builds data, teachers, student and environment.

    Teachers that were never trained before are trained now and kept. Until a seeded `reset`, the
    student and its data order are those of seed 0.

    Args:
        data: The images, or the dataset.
        teachers: The pool, a YAML file that describes one, or the teachers: networks' names, or
            fields of `TeacherSpec`.
        student: The student, or its network.
        optimizer: Its optimiser and schedule.
        distillation: What the teachers add to its loss.
        env: What the agent sees, does and is paid for, or the reward.
        computing: Where and in what all is computed, or the name of a device.
        progress: What is told of the teachers; by default notes are logged.
        loose: Fields of these, but the teachers', that only one of them has, such as `alpha=2.0` or
            `network=MyNet`, which come on top.

    Raises:
        ConfigError: Anything that cannot be used, named by its path, such as `student.width`.

    Example:
        A reward, an optimiser and a network of one's own:

        >>> import torch
        >>> from mtkd_env import assemble
        >>> from mtkd_env.networks import cut_at
        >>> def agreement(state, distillation):
        ...     return (state.teachers.logits.argmax(-1) == state.batch.targets).T.float()
        >>> class MyNet(torch.nn.Module):
        ...     def __init__(self, num_classes, in_channels):
        ...         super().__init__()
        ...         self.body = torch.nn.Conv2d(in_channels, 8, 3, stride=2)
        ...         self.classifier = torch.nn.Linear(8, num_classes)
        ...
        ...     def forward(self, images):
        ...         return self.classifier(self.body(images).relu().mean((2, 3)))
        >>> assembly = assemble(
        ...     data={"train_size": 64, "batch_size": 16},
        ...     teachers=[{"network": "resnet8", "kind": "random"}],
        ...     network=cut_at(MyNet, "body"),
        ...     optimizer={"optimizer": torch.optim.NAdam, "lr": 0.01},
        ...     reward=agreement,
        ...     device="cpu",
        ... )
        >>> _, info = assembly.env.reset(seed=0)
        >>> assembly.env.step(assembly.env.action_space.sample())[1].shape
        (16,)
    """
    given = {
        "data": data,
        "teachers": load_pool_spec(teachers) if isinstance(teachers, str | Path) else teachers,
        "student": student,
        "optimizer": optimizer,
        "distillation": distillation,
        "env": env,
        "computing": computing,
    }
    parts = sorted_keywords(
        {name: part for name, part in given.items() if part is not None} | loose
    )
    made = Parts(**{name: build(kind, parts.get(name), name) for name, kind in PARTS.items()})
    return _assembled(made, progress or Quiet())


def _assembled(parts: Parts, progress: Progress) -> Assembly:
    data, computing, device = parts.data, parts.computing, parts.computing.place()
    check_teacher_precision(computing.for_teachers, device)
    images = load_images(data, parts.teachers)
    parts = replace(parts, env=parts.env.resolved(complete=images.complete))
    store = parts.teachers.store.resolved(compared=parts.distillation.beta > 0)
    # What cannot be made or learn is known before the teachers, who may take days.
    check_labels(images, data, parts.distillation)
    student_maker(images.data, parts.student)(seed=0)
    stream = images.stream(
        data.batch_size,
        device,
        derive_seed(0, "data"),
        mixing=data.mixing,
        view_set=data.view_set,
    )
    check_store(store, stream)
    pool, fidelities = prepare_teachers(
        replace(parts.teachers, store=store),
        images,
        stream,
        val_fraction=data.val_fraction,
        computing=computing,
        device=device,
        progress=progress,
    )
    return Assembly(make_learner(images, stream, pool.ensemble, parts), images, pool, fidelities)


def student_maker(data: ImageSet[Any], student: StudentSpec) -> Callable[..., Network]:
    """Makes new students for a dataset."""
    return partial(
        build_network,
        student.network,
        num_classes=data.num_classes,
        in_channels=data.image_shape[0],
        image_size=data.image_shape[1:],
        width=student.factor,
        **student.arguments,
    )


def make_learner(
    images: TrainingSet, stream: BatchStream, teachers: TeacherEnsemble, parts: Parts
) -> MTKDVectorEnv:
    """An environment with a new student, of images and teachers that are there already.

    Args:
        images: What the student is evaluated on.
        stream: The student's batches.
        teachers: The teachers; they decide the device.
        parts: What it is made of; its data and teachers are not looked at.
    """
    device = next(teachers.parameters()).device
    splits = {
        name: partial(images.evaluation_batches, split.to(device), device)
        for name in ("train", "val", "test")
        if (split := getattr(images.splits, name)) is not None
    }
    reference = ReferenceImages(
        teachers,
        labelled=partial(
            images.data.evaluation_batches, images.splits.labelled, EVALUATION_BATCH, device=device
        ),
        student=splits["train"],
        complete=images.complete,
    )
    distiller = Distiller(
        student_maker(images.data, parts.student),
        teachers,
        image_shape=images.data.image_shape,
        steps_per_epoch=stream.steps_per_epoch,
        distillation=parts.distillation,
        recipe=parts.optimizer,
        computing=parts.computing,
        reference=reference,
    )
    prior = prior_of(distiller, parts.env.prior)
    return MTKDVectorEnv(distiller, stream, splits, parts.env, prior)


def prior_of(distiller: Distiller, named: Any) -> Prior | None:
    """Weights that an action adds to: a weighting that `WEIGHTING` finds, or None.

    Raises:
        ConfigError: An unknown name, or something else.
    """
    return None if named is None else replace(WEIGHTING, what="prior").find(named)(distiller)


def load_images(data: DataSpec, teachers: PoolSpec | None = None) -> TrainingSet:
    """A dataset and its parts, without what is the teachers' own."""
    images = data.load()
    own = own_images(teachers, images) if teachers is not None else {}
    splits = images.split(
        data.val_fraction,
        train_size=data.train_size,
        labels=data.labels,
        reserved=torch.cat([*own.values()]) if own else None,
    )
    return TrainingSet(images, splits)


def check_labels(images: TrainingSet, data: DataSpec, distillation: Distillation) -> None:
    """Raises a `ConfigError` unless the labels are there that a student's training asks for."""
    needing = {
        "data.mixup:": data.mixup,
        "data.cutmix:": data.cutmix,
        "distillation.feature: 'nd'": distillation.needs_directions,
    }
    for what, needed in needing.items():
        if needed and not images.complete:
            raise ConfigError(f"{what} needs the label of every image, and some are missing")


def make_env(
    *,
    num_envs: int | None = None,
    max_episode_steps: int | None = None,
    render_mode: str | None = None,
    **keywords: Any,
) -> MTKDVectorEnv:
    """The environment behind the registered ids.

    Args:
        num_envs: B, in place of the batch size of `data`. 1 is also what Gymnasium gives where
            nothing was said; it yields to the latter, and is warned of without it.
        max_episode_steps: Not supported: `episode` decides where episodes end.
        render_mode: `rgb_array` for pictures; see `MTKDVectorEnv.render`.
        keywords: Arguments of `assemble`.

    Raises:
        ConfigError: Any argument that cannot be used; names it.
    """
    if max_episode_steps is not None:
        raise ConfigError("max_episode_steps: not supported; use episode='epoch' or 'training'")
    if render_mode is not None:
        check_name(MTKDVectorEnv.metadata["render_modes"], render_mode, "render mode")
    parts = sorted_keywords(keywords)
    data = as_fields(DataSpec, parts.get("data"), "data")
    if num_envs is not None and (num_envs > 1 or "batch_size" not in data):
        warn_of_one(num_envs)
        parts["data"] = data | {"batch_size": num_envs}
    env = assemble(**parts).env
    env.render_mode = render_mode
    return env


def warn_of_one(num_envs: int | None) -> None:
    """Warns of batches of a single image, which Gymnasium makes of a user's silence."""
    if num_envs == 1:
        warnings.warn(
            "num_envs: 1, which is what gymnasium.make_vec takes by default: the student then "
            "learns from one image at a time; num_envs=64 gives batches of 64",
            stacklevel=3,
        )


def refuse_single(**keywords: Any) -> NoReturn:
    """What `gymnasium.make` finds behind the registered ids: says what to use instead."""
    del keywords
    raise ConfigError(
        "gymnasium.make: expected gymnasium.make_vec(id, num_envs=64), since the environment is a "
        "batch whose samples share one student"
    )


def sorted_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `assemble`, from these and from loose fields of theirs, but the teachers'.

    Raises:
        ConfigError: A keyword that is neither, a field that several arguments have, or one that is
            given twice.
    """
    parts = {name: value for name, value in keywords.items() if name in (*PARTS, "progress")}
    loose: dict[str, dict[str, Any]] = {}
    for name in keywords.keys() - parts.keys():
        loose.setdefault(_owner(name), {})[name] = keywords[name]
    for part, values in loose.items():
        given = parts.get(part)
        known = as_fields(PARTS[part], given, part)
        if not isinstance(given, PARTS[part]) and (twice := known.keys() & values.keys()):
            raise ConfigError(f"{min(twice)}: given twice, by itself and in {part}")
        parts[part] = known | values
    return parts


def _owner(name: str) -> str:
    """The argument of `assemble` that has a field of this name."""
    # The teachers' own would be taken for the student's: seed, recipe, batch size.
    named = {part: field_names(kind) for part, kind in PARTS.items() if part != "teachers"}
    owners = [part for part, names in named.items() if name in names]
    if not owners:
        known = sorted({*PARTS, "num_envs", *(one for names in named.values() for one in names)})
        hint = did_you_mean(name, known)
        raise ConfigError(f"unknown keyword '{name}'{hint} (known: {', '.join(known)})")
    if len(owners) > 1:
        forms = " or ".join(f"{owner}={{'{name}': ...}}" for owner in owners)
        raise ConfigError(f"{name}: several parts have it; expected {forms}")
    return owners[0]


def register_envs() -> None:
    """Registers an environment of every dataset, and of tasks; done by importing the package."""
    entries: dict[str, tuple[str, dict[str, Any]]] = {
        name: ("mtkd_env.registration:make_env", {"dataset": dataset})
        for name, dataset in ENV_NAMES.items()
    }
    entries["Tasks"] = ("mtkd_env.tasks:make_tasks_env", {})
    for name, (maker, keywords) in entries.items():
        if f"MTKD/{name}-v0" not in gymnasium.registry:
            gymnasium.register(
                id=f"MTKD/{name}-v0",
                entry_point="mtkd_env.registration:refuse_single",
                vector_entry_point=maker,
                kwargs=keywords,
                nondeterministic=torch.cuda.is_available(),
            )
