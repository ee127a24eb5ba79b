"""A pool of teachers from its description: trained and cached, loaded, or broken on purpose."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from mtkd_env import distributed
from mtkd_env.data import load_training_images
from mtkd_env.data.dataset import ImageSet
from mtkd_env.data.split import with_noise
from mtkd_env.data.stream import BatchStream
from mtkd_env.errors import (
    ConfigError,
    check_at_least_1,
    check_name,
    check_not_negative,
    check_positive,
    errors_of,
)
from mtkd_env.evaluation import Evaluation, check_outputs, evaluate
from mtkd_env.files import (
    cache_folder,
    digest_of,
    load_yaml,
    name_in_path,
    user_path,
    whole_path,
)
from mtkd_env.imports import IN_MEMORY, Named, Trust, check_trusted, is_in_memory, name_of
from mtkd_env.networks import build_network, check_network_arguments, has_weights
from mtkd_env.networks.libraries import published_accuracy, published_input
from mtkd_env.optimization import Recipe
from mtkd_env.options import PLAIN, Options, build, default_values, field_names
from mtkd_env.precision import FULL
from mtkd_env.seeding import derive_seed
from mtkd_env.teachers.ensemble import TeacherEnsemble, check_teacher_names, own_targets
from mtkd_env.teachers.inputs import InputSpec, teacher_view
from mtkd_env.teachers.parts import Part, class_positions, divide_among_teachers
from mtkd_env.teachers.store import StoreSpec
from mtkd_env.teachers.training import TeacherTraining, TrainingSet, class_cycle, train_teacher
from mtkd_env.teachers.weights import keep, load_given, load_kept, weights_digest
from mtkd_env.types import UNKNOWN, Batch

# Part of every digest: raise it when the same description would train to something else, or be kept
# in another form.
RECIPE_VERSION = 3

# Every digest holds these; of keys that came later, only values other than the default, so that a
# new key leaves the teachers in the cache as they are.
ALWAYS_IN_DIGEST = {
    *("network", "kind", "width", "seed"),
    *("epochs", "lr", "momentum", "weight_decay", "nesterov", "milestones", "decay"),
}

KINDS = ("trained", "random", "permuted")

# Called after every epoch of a teacher in training: name, epochs done, epochs in all, mean loss.
PoolProgress = Callable[[str, int, int, float], None]


def teacher_recipe() -> Recipe:
    """The paper's teachers: weight decay 5e-4 and no Nesterov; in as many epochs as digits need."""
    return Recipe(epochs=12, weight_decay=5e-4, nesterov=False)


@dataclass(frozen=True)
class TeacherSpec(Options):
    """One teacher.

    Attributes:
        network: Name of a network; see `mtkd_env.networks.find_network`. Or one's own, as for a
            student; a module that has been made already is a teacher as it is.
        name: Name in tables and in the observation's layout; by default the network's, with the
            kind of a broken teacher behind it.
        kind: `trained`; or broken on purpose: `random` (never trained) or `permuted` (trained on
            labels that a permutation of the classes has changed).
        width: Factor on all channel counts of the network.
        seed: Seed of initialisation, data order and permutation.
        checkpoint: File with a `state_dict` of the network, to use instead of training; or, for a
            network of torchvision or timm, the name of weights that it publishes, such as
            `IMAGENET1K_V1`.
        weights: Which of the weights in that file, if there are several: `ema` for their moving
            average, or a key, or what the tensors' names begin with, such as `student`.
        arguments: Further keyword arguments of the network, such as drop_path_rate of a transformer
            of timm.
        images: Number of images of its own that it is trained on, which no other teacher and not
            the student sees; a share of the training images if it is below 1. By default it is
            trained on the student's images that have a label.
        skew: Concentration of the Dirichlet distribution that the classes' shares of its own images
            are drawn from: 0.3 is skewed, 100 is even; as they come by default.
        trained_on: Classes, by name or number, that it is trained on; all by default. It still has
            an output for every class.
        label_noise: Share of its training labels that are drawn anew, uniformly over all classes.
        classes: Classes, by name or number, that its outputs are of, in their order; those of the
            data set by default. It is asked about no others.
        input: What its images are like, where they are not like the student's. Of weights that a
            library publishes this is known.
        data: A file or folder of its own that it is trained on instead of images of the data set:
            `.npz`, or a folder where the data set is in files.
    """

    network: Named
    name: str = ""
    kind: str = "trained"
    width: float = 1.0
    seed: int = 0
    checkpoint: str | None = None
    weights: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    images: float | None = None
    skew: float | None = None
    trained_on: tuple[str | int, ...] | None = None
    label_noise: float = 0.0
    classes: tuple[str | int, ...] | None = None
    input: InputSpec = field(default_factory=InputSpec)
    data: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(KINDS, self.kind, "kind of teacher")
        check_network_arguments(self.network, self.arguments, "arguments")
        if self.checkpoint is not None and user_path(self.checkpoint).exists():
            # So that a run's configuration means the same from another working directory.
            object.__setattr__(self, "checkpoint", whole_path(self.checkpoint))
        if self.data is not None:
            object.__setattr__(self, "data", whole_path(self.data))
        check_not_negative(seed=self.seed)
        check_positive(width=self.width)
        if has_weights(self.network) and self.kind != "trained":
            raise ConfigError(f"network: a module that has been made cannot be {self.kind}")
        if self.checkpoint is not None and self.kind != "trained":
            raise ConfigError(f"checkpoint: a {self.kind} teacher cannot have one")
        if self.weights is not None and self.checkpoint is None:
            raise ConfigError("weights: expected with a checkpoint, the file that holds them")
        self._check_images()

    def _check_images(self) -> None:
        check_positive(**{k: v for k in ("images", "skew") if (v := getattr(self, k)) is not None})
        if self.skew is not None and self.images is None:
            raise ConfigError("skew: expected with images, the number of its own images")
        if not 0 <= self.label_noise <= 1:
            raise ConfigError(f"label_noise: expected a share in [0, 1], got {self.label_noise}")
        training = (self.images, self.trained_on, self.label_noise or None, self.data)
        if self.checkpoint is not None and any(value is not None for value in training):
            raise ConfigError(
                "images, trained_on, label_noise and data say how it is trained, and a "
                "checkpoint says that it is not"
            )
        if self.data is not None and self.images is not None:
            raise ConfigError(
                "data: expected either that or images, which are of the data set, got both"
            )
        if self.classes is not None and len(self.classes) < 2:
            raise ConfigError(f"classes: expected at least 2, got {len(self.classes)}")

    @property
    def label(self) -> str:
        """The teacher's name."""
        suffix = "" if self.kind == "trained" else f"-{self.kind}"
        named = self.network if isinstance(self.network, str) else name_of(self.network)
        return self.name or named.removeprefix(IN_MEMORY) + suffix


# The digits need seconds each to train them.
SMALL_TEACHERS = tuple(map(TeacherSpec, ("resnet8", "resnet14", "resnet20", "wrn_16_1")))


@dataclass(frozen=True)
class PoolSpec(Options):
    """A pool of teachers and the recipe that those without a checkpoint are trained by.

    Attributes:
        teachers: The teachers in the order of the weights' columns; names must be unique.
        recipe: Optimiser, schedule and epochs.
        batch_size: Images in a training batch.
        store: Whether their outputs are kept.
        seed: Seed of which images are each teacher's own, and added to the seed of every teacher:
            another seed is another pool.
        members: Names of the teachers that are asked; all by default. The others are not trained,
            but the images that are their own stay so: every choice is of the same pool.

    Raises:
        ConfigError: No teacher, a name used twice, a batch size below 1, a negative seed, or a
            member that is no teacher's name.
    """

    teachers: tuple[TeacherSpec, ...] = SMALL_TEACHERS
    recipe: Recipe = field(default_factory=teacher_recipe)
    batch_size: int = 64
    store: StoreSpec = field(default_factory=StoreSpec)
    seed: int = 0
    members: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_1(batch_size=self.batch_size)
        check_not_negative(seed=self.seed)
        names = [teacher.label for teacher in self.teachers]
        check_teacher_names(names)
        if self.members is not None and len(set(self.members)) != max(1, len(self.members)):
            raise ConfigError(f"members: expected different names, got {list(self.members)}")
        for name in self.members or ():
            check_name(names, name, "teacher in members")

    @property
    def asked(self) -> tuple[TeacherSpec, ...]:
        """The teachers that are asked, in the order of the pool."""
        chosen = self.members
        return tuple(one for one in self.teachers if chosen is None or one.label in chosen)


@dataclass(frozen=True, slots=True)
class TeacherPool:
    """Teachers ready for use.

    Attributes:
        ensemble: The teachers, frozen, on their device.
        evaluations: Each teacher's result on the test images.
        digests: SHA-256 of each teacher's weights.
        stated: Accuracy that is stated of a teacher, by its file or by whoever published it.
    """

    ensemble: TeacherEnsemble
    evaluations: dict[str, Evaluation]
    digests: dict[str, str]
    stated: dict[str, float] = field(default_factory=dict)


def load_pool_spec(path: Path | str, *, trust: bool = False) -> PoolSpec:
    """Reads a pool from YAML.

    Args:
        path: The file.
        trust: Whether it may name networks of any module, which then runs.

    Raises:
        ConfigError: No such file, an unknown key, a value of the wrong type or a network that is
            not to be trusted; names it.
    """
    with Trust(None if trust else frozenset()).applied():
        return read_pool_spec(path)


def read_pool_spec(path: Path | str) -> PoolSpec:
    """The same where it is said already what files may name.

    Raises:
        ConfigError: See `load_pool_spec`.
    """
    path = user_path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected a YAML file that describes a pool")
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, found {content!r}")
    with errors_of(path):
        check_trusted(content)
        return build(PoolSpec, content)


def own_images(spec: PoolSpec, data: ImageSet[Any]) -> dict[str, Tensor]:
    """Positions of the training images that are a teacher's own, by its name.

    Raises:
        ConfigError: A class that does not exist, or more images than there are.
    """
    parts = {
        teacher.label: Part(teacher.images, teacher.skew, _trained_on(teacher, data))
        for teacher in spec.teachers
        if teacher.images is not None
    }
    return divide_among_teachers(data.parts[0].targets, parts, data.num_classes, spec.seed)


def _classes(teacher: TeacherSpec, data: ImageSet[Any]) -> tuple[int, ...] | None:
    """The classes that a teacher's outputs are of, by number; None for those of the data set."""
    if teacher.classes is None:
        return None
    key = f"teachers.{teacher.label}.classes"
    return class_positions(teacher.classes, data.class_names, data.num_classes, key)


def _trained_on(teacher: TeacherSpec, data: ImageSet[Any]) -> tuple[int, ...] | None:
    """The classes that a teacher is trained on, by number; None for all."""
    known = _classes(teacher, data)
    if teacher.trained_on is None:
        return known
    key = f"teachers.{teacher.label}.trained_on"
    found = class_positions(teacher.trained_on, data.class_names, data.num_classes, key)
    for name, position in zip(teacher.trained_on, found, strict=True):
        if known is not None and position not in known:
            raise ConfigError(f"{key}: expected some of its classes, got {name!r}")
    return found


def build_pool(
    spec: PoolSpec,
    images: TrainingSet,
    *,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    precision: str = FULL,
    progress: PoolProgress | None = None,
) -> TeacherPool:
    """Finds, loads or trains the teachers of a pool.

    Args:
        spec: The pool.
        images: What they are trained and measured on.
        device: Where they are trained and will stay.
        cache: Folder of trained teachers; `cache_folder()` by default.
        precision: What they are asked in; they are always trained in float32.
        progress: Called while a teacher is being trained.

    Raises:
        ConfigError: An unknown network, a checkpoint that does not fit it, a file in the cache that
            holds other weights than were trained, or outputs that say nothing of the image.
    """
    workshop = _Workshop(
        spec,
        images,
        own_images(spec, images.data),
        device=torch.device(device),
        cache=cache_folder(cache),
        precision=precision,
        progress=progress,
    )
    teachers = {teacher.label: _Teacher(teacher, workshop) for teacher in spec.asked}
    # Teachers may take days to train, so a checkpoint that does not fit is to be known before.
    given_first = sorted(teachers.values(), key=lambda teacher: teacher.spec.checkpoint is None)
    found = {teacher.label: teacher.fill() for teacher in given_first}
    ensemble = TeacherEnsemble(
        [teacher.network for teacher in teachers.values()],
        [*teachers],
        precision,
        classes={name: one.classes for name, one in teachers.items() if one.classes is not None},
        num_classes=images.data.num_classes,
        views={name: one.view for name, one in teachers.items() if one.view is not None},
    ).to(device)
    return TeacherPool(
        ensemble,
        evaluations={name: found[name] for name in teachers},
        digests={name: weights_digest(one.network.state_dict()) for name, one in teachers.items()},
        stated={name: one.stated for name, one in teachers.items() if one.stated is not None},
    )


@dataclass(frozen=True)
class _Workshop:
    """What all teachers of a pool are made with; see `build_pool` and `own_images`."""

    pool: PoolSpec
    images: TrainingSet
    own: Mapping[str, Tensor]
    device: torch.device
    cache: Path
    precision: str
    progress: PoolProgress | None


class _Teacher:
    """A teacher in the making.

    Attributes:
        classes: Those that its outputs are of, by number; None for those of the data set.
        seed: Its own in pool 0, another in every other.
        view: What makes its images of the student's; None if they are the same.
        network: As it is initialised, until `fill`.
        stated: Accuracy that its file states or that is published with its weights, if any.
    """

    def __init__(self, spec: TeacherSpec, workshop: _Workshop) -> None:
        self.spec, self.label, self._workshop = spec, spec.label, workshop
        self._data = data = workshop.images.data
        self.classes = _classes(spec, data)
        self._outputs = data.num_classes if self.classes is None else len(self.classes)
        pool_seed = workshop.pool.seed
        self.seed = derive_seed(pool_seed, str(spec.seed)) if pool_seed else spec.seed
        published = published_input(name_of(spec.network), spec.checkpoint)
        with self._errors(".input"):
            view = teacher_view(spec.input, published, data)
        self.view = None if view is None else view.to(workshop.device)
        channels, *size = (self.view or data).image_shape
        with self._errors():
            network = build_network(
                spec.network,
                num_classes=self._outputs,
                in_channels=channels,
                image_size=(size[0], size[1]),
                width=spec.width,
                seed=derive_seed(self.seed, "teacher"),
                **spec.arguments,
            )
        self.network = network.to(workshop.device)
        self.stated: float | None = None

    def _errors(self, key: str = "") -> AbstractContextManager[None]:
        return errors_of(f"teachers.{self.label}{key}")

    def fill(self) -> Evaluation:
        """Loads, finds or trains the weights; gives the result on the test images."""
        spec, precision = self.spec, self._workshop.precision
        source = spec.checkpoint or "the network as it was initialised"
        if spec.checkpoint is not None:
            name = name_of(spec.network)
            with self._errors():
                self.stated = load_given(self.network, name, spec.checkpoint, spec.weights)
            if self.stated is None and self.classes is None:
                self.stated = published_accuracy(name, spec.checkpoint, self._data.class_names)
        elif spec.kind != "random" and not has_weights(spec.network):
            source = str(self._train_or_find())
        test = self._test()
        first = list(islice(test, 1))
        with self._errors():
            check_outputs(self.network, first, precision, source)
        return evaluate(self.network, chain(first, test), precision)

    def _test(self) -> Iterator[Batch]:
        """The test images; those of classes that the teacher does not know have no label."""
        images = self._workshop.images
        for batch in images.evaluation_batches(images.splits.test, self._workshop.device):
            targets = own_targets(batch.targets, self.classes, self._data.num_classes)
            yield self._seen(replace(batch, targets=targets))

    def _seen(self, batch: Batch) -> Batch:
        """A batch of the student's as the teacher sees it."""
        return batch if self.view is None else replace(batch, inputs=self.view(batch.inputs))

    def _train_or_find(self) -> Path:
        workshop, split = self._workshop, self._train_split()
        made_from = json.dumps(self._made_from(split), sort_keys=True)
        digest = hashlib.sha256(made_from.encode()).hexdigest()
        folder = workshop.cache / "teachers" / name_in_path(self._data.name)
        path = folder / f"{name_in_path(self.label)}-{digest[:16]}.pt"
        if distributed.agree(path.exists()):
            with self._errors():
                load_kept(self.network, path, made_from)
            return path
        stream = self._stream(split)
        _make_folder(folder)
        permuted = self.spec.kind == "permuted"
        report = workshop.progress
        with self._errors():
            training = TeacherTraining(
                self.network,
                stream,
                workshop.pool.recipe,
                relabel=class_cycle(self._outputs, self.spec.seed) if permuted else None,
                progress=None if report is None else partial(report, self.label),
            )
            train_teacher(
                training,
                path.with_suffix(".checkpoints"),
                derive_seed(self.seed, "training"),
                partial(keep, self.network, path, made_from),
            )
        return path

    def _train_split(self) -> Any:
        """What it is trained on, its outputs for labels.

        A file, or images of its own, or those of the student's that have a label.
        """
        data, workshop = self._data, self._workshop
        if self.spec.data is not None:
            with self._errors(".data"):
                split = load_training_images(self.spec.data, data)
        elif self.label in workshop.own:
            split = data.parts[0].take(workshop.own[self.label])
        else:
            split = workshop.images.splits.train
        kept = split.targets != UNKNOWN
        if (seen := _trained_on(self.spec, data)) is not None:
            kept &= torch.isin(split.targets, torch.tensor(seen))
        if not kept.any():
            raise ConfigError(
                f"teachers.{self.label}: expected labelled images to train it on, found none; it "
                "may have a checkpoint instead, or data of its own"
            )
        if not kept.all():
            split = split.take(kept.nonzero().squeeze(1))
        targets = own_targets(split.targets, self.classes, data.num_classes)
        targets = with_noise(targets, self.spec.label_noise, self._outputs, self.seed)
        return split if targets is split.targets else split.relabelled(targets)

    def _stream(self, split: Any) -> BatchStream:
        workshop = self._workshop
        images = TrainingSet(self._data, replace(workshop.images.splits, train=split))
        try:
            stream = images.stream(workshop.pool.batch_size, workshop.device, self.seed)
        except ConfigError as error:
            raise ConfigError(f"teachers.{error} (of the teacher {self.label})") from error
        stream.teaching = lambda batches, _: map(self._seen, batches)
        return stream

    def _made_from(self, split: Any) -> dict[str, Any]:
        """Everything that a trained teacher depends on."""
        seen = split.index.numpy().tobytes() + split.targets.numpy().tobytes()
        own = {} if self.spec.data is None else {"own_data": digest_of(split.contents())}
        # How its images were chosen does not count, but which ones they are.
        chosen: dict[str, Any] = {
            "images": None,
            "skew": None,
            "trained_on": None,
            "label_noise": 0.0,
        }
        made = replace(
            self.spec, name="", seed=self.seed, classes=self.classes, data=None, **chosen
        )
        return own | {
            "version": RECIPE_VERSION,
            "teacher": _in_digest(made),
            "recipe": _in_digest(self._workshop.pool.recipe),
            "batch_size": self._workshop.pool.batch_size,
            "data": self._data.digest,
            "train_images": hashlib.sha256(seen).hexdigest(),
        }


def _in_digest(part: TeacherSpec | Recipe) -> dict[str, Any]:
    """The values that a digest is made of."""
    defaults = default_values(type(part))
    return {
        name: value if isinstance(value, tuple(PLAIN)) else _name_in_digest(value)
        for name in field_names(type(part))
        if (value := getattr(part, name)) != defaults.get(name) or name in ALWAYS_IN_DIGEST
    }


def _name_in_digest(value: Any) -> Any:
    """The fields of options; the name of an object, which nothing kept is of if others have it."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    name = name_of(value)
    return f"{name} {uuid4()}" if is_in_memory(name) else name


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cache: cannot make {folder}: {error.strerror}; --cache or MTKD_CACHE says where else"
        ) from error
