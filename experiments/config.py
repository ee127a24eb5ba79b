"""What an experiment is made of, and where its values come from.

Layers, later ones win: `configs/default.yaml`, `configs/recipe/<recipe>.yaml`,
`configs/algo/<algo>.yaml`, `--config` files, flags; a comparison has further ones around the
method's. Arguments of the agent are merged key by key; everything else is replaced.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from agents.base import WARMUP_WEIGHTS
from mtkd_env.compilation import MODES, NONE
from mtkd_env.data import Mixing, with_whole_paths
from mtkd_env.data.views import ViewSet
from mtkd_env.env import CHOICES
from mtkd_env.errors import (
    ConfigError,
    check_fields,
    check_name,
    check_not_negative,
    did_you_mean,
    plain_message,
)
from mtkd_env.files import load_yaml, parse_yaml, path_or_name, user_path, whole_path
from mtkd_env.imports import PROJECT, TRUST, Trust, check_trusted, trust_of
from mtkd_env.optimization import Recipe, make_recipe
from mtkd_env.precision import FULL, PRECISIONS
from mtkd_env.teachers import TEACHER_PRECISIONS, PoolSpec, check_prefetch
from mtkd_env.terms import check_scales

CONFIGS = Path(__file__).parent / "configs"

RECIPES = CONFIGS / "recipe"

# How images are read, among the arguments of a dataset; the numbers do not depend on it.
READING = ("download", "workers", "prefetch_bytes")

# Where and how a run is computed, and what its values are called; likewise.
# A run that skips batches, where it would otherwise have stopped, says so in its result.
PLACE = (
    "device",
    "threads",
    "output",
    "cache",
    "recipe",
    "checkpoint",
    "on_nan",
    "prefetch",
    "compile",
    "method",
    "setting",
)

# More are a mistake, and more than a process can start.
MOST_THREADS = 4096

# Where a configuration holds recipes of training.
TRAININGS = ("optimizer", "teachers.recipe")

# A value may name a class of an option; the parser would import it from wherever it is.
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=sorted(PROJECT))

# How the names of pools' files end.
YAML = (".yaml", ".yml")

# How the parser's messages name a key that it does not know.
UNKNOWN_KEY = re.compile(
    r"unrecognized arguments: --([\w.]+)|Option '([\w.]+)'"
    r"|Group '([\w.]+)' does not accept option '([\w.]+)'"
)


@dataclass(frozen=True)
class DataConfig:
    """The images.

    Attributes:
        dataset: Name of a dataset.
        arguments: Keyword arguments of the dataset, such as path for npz.
        batch_size: Images in a batch; also the number of sub-environments.
        val_fraction: Share of the training images to hold out for choices.
        train_size: Training images to keep; all by default.
        mixup: Alpha of the mixup of the student's batches; 0 is none.
        cutmix: Alpha of their cutmix; with both, every batch takes either.
        views: Views that each image is seen in, one after the other in the epochs; by default a new
            one at random every time. Teacher outputs on a few views can be kept.
        view_seed: Seed of the choice of so many views; not the run's, so that runs of all seeds can
            share the teachers' outputs.
    """

    dataset: str = "digits"
    arguments: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    val_fraction: float = 0.0
    train_size: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    views: int | None = None
    view_seed: int = 0

    def __post_init__(self) -> None:
        Mixing(self.mixup, self.cutmix)
        ViewSet(self.views, self.view_seed)
        object.__setattr__(self, "arguments", with_whole_paths(self.dataset, self.arguments))


@dataclass(frozen=True)
class StudentConfig:
    """The student.

    Attributes:
        network: Name of a network.
        width: Factor on all its channel counts.
        arguments: Further keyword arguments of the network, such as drop_path_rate of a transformer
            of timm.
    """

    network: str = "resnet8"
    width: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DistillationConfig:
    """The loss of the student (Equ. 2).

    Attributes:
        alpha: Weight of the logit terms.
        beta: Weight of the feature terms.
        temperature: Softening of the logit terms.
        logit: Losses of the logit terms: kd, dist, none, or names with coefficients.
        feature: Losses of the feature terms: mse, nd, none, or names with coefficients.

    Raises:
        ConfigError: A negative weight, or a temperature that is not positive.
    """

    alpha: float = 1.0
    beta: float = 5.0
    temperature: float = 4.0
    logit: str | dict[str, float] = "kd"
    feature: str | dict[str, float] = "mse"

    def __post_init__(self) -> None:
        scales = {name: getattr(self, name) for name in ("alpha", "beta", "temperature")}
        check_scales(**scales, path="distillation.")


@dataclass(frozen=True)
class EnvConfig:
    """What the agent sees, does and is paid for.

    Attributes:
        reward: paper, alignment, aggregate, reference, improvement or cross_entropy.
        reward_timing: before or after the student's step.
        reward_normalization: Replaces the reward's own normalisation.
        observation: all, performance or gaps.
        normalize_observation: Whether observations are standardised.
        observation_dtype: float32 or float16.
        fusion: paper, generator, learnable, ...; or three coefficients.
        logit_bound: Bound of the action box.
        episode: batch, epoch or training.
    """

    reward: str = "paper"
    reward_timing: str = "before"
    reward_normalization: str | None = None
    observation: str = "all"
    normalize_observation: bool = True
    observation_dtype: str = "float32"
    fusion: str | list[float] = "paper"
    logit_bound: float = 3.0
    episode: str = "batch"


@dataclass(frozen=True)
class AgentConfig:
    """The agent.

    Attributes:
        name: Name of an agent, a weighting or an algorithm; by default that of --algo.
        arguments: Its keyword arguments.
    """

    name: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WarmupConfig:
    """The epochs in which all teachers count the same.

    Attributes:
        epochs: Number of epochs, the first of the student's.
        weights: uniform (1/M each) or ones.
    """

    epochs: int = 1
    weights: str = "uniform"


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run keeps what it can go on from, beside when it is stopped by a signal.

    Attributes:
        epochs: Epochs between two checkpoints; 0 for none by epochs.
        minutes: Minutes between two checkpoints; 0 for none by time. Both 0: none at all.
        share: Largest share of the time that they may take; those that would exceed it are put off.

    Raises:
        ConfigError: A negative number, or a share above 1.
    """

    epochs: int = 1
    minutes: float = 10.0
    share: float = 0.05

    def __post_init__(self) -> None:
        check_not_negative(**{"checkpoint.epochs": self.epochs, "checkpoint.minutes": self.minutes})
        if not 0 <= self.share <= 1:
            raise ConfigError(f"checkpoint.share: expected a number in [0, 1], got {self.share}")

    @property
    def enabled(self) -> bool:
        """Whether there are any checkpoints."""
        return self.epochs > 0 or self.minutes > 0


@dataclass(frozen=True)
class ExperimentConfig:
    """One run: a student, its teachers, and who weights them.

    Attributes:
        teachers: The pool of teachers, or a YAML file that describes one.
        algo: Name of the method; selects configs/algo/<algo>.yaml.
        recipe: Name of an experiment of the paper, which selects configs/recipe/<recipe>.yaml, or a
            YAML file.
        data: The images.
        student: The student.
        optimizer: Optimiser and schedule of the student; its epochs are those of the run.
        distillation: The loss of the student.
        env: What the agent sees, does and is paid for.
        agent: The agent.
        warmup: The epochs in which all teachers count the same.
        precision: What student and teachers compute in: fp32, bf16 or fp16.
        teacher_precision: What the teachers compute in, if it is something else; on a CPU also
            int8, which is nearly the same several times as fast.
        compile: How student and teachers are compiled: none, or a mode of torch.compile: default,
            reduce-overhead or max-autotune. It takes minutes at first.
        seed: Seed of the student, the data order and the agent.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        threads: CPU threads; by default one for the digits, whose images are too small to share,
            and torch's choice for everything else.
        output: Folder that run folders are made in.
        cache: Folder of trained teachers; by default $MTKD_CACHE or ~/.cache/mtkd_env.
        checkpoint: When the run keeps what it can go on from.
        prefetch: Batches that the teachers are asked about together; by default 1 on a CPU and 512
            images on a GPU.
        on_nan: What becomes of a batch whose loss or gradient is NaN or infinite: stop ends the
            run, skip takes the next batch instead and counts it; the host then waits for the GPU
            in every step.
        method: What tables and pages call the method; by default its name.
        setting: What they call the setting that the method is run in.
    """

    teachers: PoolSpec
    algo: str = "ppo"
    recipe: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    optimizer: Recipe = field(default_factory=Recipe)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    precision: str = FULL
    teacher_precision: str | None = None
    compile: str = NONE
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    output: str = "runs"
    cache: str | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    prefetch: int | None = None
    on_nan: str = "stop"
    method: str | None = None
    setting: str = ""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed: expected a number >= 0, got {self.seed}")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise ConfigError(f"threads: expected 1 to {MOST_THREADS}, got {self.threads}")
        self._find_places()
        check_prefetch(self.prefetch)
        check_name(PRECISIONS, self.precision, "precision")
        if self.teacher_precision is not None:
            check_name(TEACHER_PRECISIONS, self.teacher_precision, "teacher_precision")
        check_name(MODES, self.compile, "compile")
        check_name(CHOICES["on_nan"], self.on_nan, "on_nan")
        check_name(WARMUP_WEIGHTS, self.warmup.weights, "warmup.weights")
        if not 0 <= self.warmup.epochs <= self.optimizer.epochs:
            raise ConfigError(
                f"warmup.epochs: expected 0 to optimizer.epochs = {self.optimizer.epochs}, "
                f"got {self.warmup.epochs}"
            )

    def _find_places(self) -> None:
        """Makes what the run reads findable from another working directory, where it is kept."""
        object.__setattr__(self, "output", str(user_path(self.output)))
        if self.cache is not None:
            object.__setattr__(self, "cache", whole_path(self.cache))
        if self.recipe is not None and path_or_name(self.recipe):
            object.__setattr__(self, "recipe", whole_path(self.recipe))

    @property
    def agent_name(self) -> str:
        """The agent's name: its own, or else the method's."""
        return self.agent.name or self.algo

    def to_yaml(self) -> str:
        """The whole configuration; as a `--config` file it gives an equal one."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)

    @property
    def digest(self) -> str:
        """Digest of everything that the numbers of a run depend on; not of where it runs.

        Values that are the defaults of their class do not count, so that a new key, whose default
        changes nothing, leaves the digests of finished runs as they are.
        """
        values = {k: v for k, v in _plain(_set_values(self)).items() if k not in PLACE}
        if arguments := values.get("data", {}).get("arguments"):
            values["data"]["arguments"] = {k: v for k, v in arguments.items() if k not in READING}
        values["teachers"].pop("store", None)
        if self.teachers.store:  # It counts how outputs are rounded, not where they are kept.
            values["teachers"]["store"] = self.teachers.store.dtype
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _set_values(value: Any) -> Any:
    """The fields of a dataclass that differ from their defaults, as `asdict` would give them."""
    if isinstance(value, list | tuple):
        return [_set_values(entry) for entry in value]
    if not is_dataclass(value):
        return value
    kept = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    defaults = {entry.name: _default(entry) for entry in fields(value)}
    return {name: _set_values(kept[name]) for name in kept if kept[name] != defaults[name]}


def _default(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


SECTIONS = {
    name
    for name, entry in ExperimentConfig.__dataclass_fields__.items()
    if name != "teachers" and is_dataclass(entry.type)
}


class ConfigurationParser(ArgumentParser):
    """Reports what is wrong as a `ConfigError` of one line, with the nearest valid key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Does not end the program itself."""
        text = " ".join(message.split()).removeprefix('Parser key "config": ')
        raise ConfigError(plain_message(text) + self._hint(text)) from ex

    def _hint(self, message: str) -> str:
        unknown = UNKNOWN_KEY.search(message)
        if unknown is None or "did you mean" in message:
            return ""
        key = ".".join(part for part in unknown.groups() if part)
        return did_you_mean(key, self.get_defaults(skip_validation=True).keys())


@cache
def _parser(defaults: tuple[str, ...], program: str) -> ConfigurationParser:
    parser = ConfigurationParser(
        prog=Path(program).name,
        description=(
            "Distils a student from its teachers under a method's weights. Layers, later ones "
            "win: configs/default.yaml, configs/recipe/RECIPE.yaml, configs/algo/ALGO.yaml, "
            "--config files, flags. --algo takes several methods with commas between them. "
            "--epochs N is short for --optimizer.epochs N; the learning rate falls at the same "
            "fractions of the training. --resume RUN_DIR goes on with an unfinished run. "
            f"{TRUST} lets files name a module:Name of any module, whose code then runs; flags "
            "may in any case. "
            "--debug shows where an error came from. "
            f"Recipes: {', '.join(sorted(shipped_recipes()))}."
        ),
        default_config_files=list(defaults),
        default_env=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; may be given several times")
    parser.add_class_arguments(ExperimentConfig)
    return parser


@dataclass(frozen=True)
class Layer:
    """Keys and values of one source, laid over those of earlier ones.

    Attributes:
        name: What errors call it, such as a file's path.
        values: Keys and values, some of those of `ExperimentConfig`.
        source: What the parser reads: a file's path, or the values as YAML.
        shipped: Whether it belongs to the program, whose help shows its values.
    """

    name: str
    values: Mapping[str, Any]
    source: str
    shipped: bool = False

    def __post_init__(self) -> None:
        for section in SECTIONS & self.values.keys():
            self._check_mapping(section, self.values[section])
        self._check_mapping("agent.arguments", self.agent_arguments)

    def _check_mapping(self, key: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise ConfigError(f"{self.name}: {key}: expected keys and values, found {value!r}")

    @property
    def agent_arguments(self) -> dict[str, Any]:
        """Arguments of the agent, which are merged key by key."""
        arguments: dict[str, Any] = self.values.get("agent", {}).get("arguments", {})
        return arguments


def file_layer(path: Path, *, flag: str = "--config", shipped: bool = False) -> Layer:
    """The keys and values of a YAML file, which errors say `flag` has named."""
    values = read_yaml(path, flag)
    if not isinstance(pool := values.get("teachers"), str):
        return Layer(str(path), values, str(path), shipped)
    values["teachers"] = pool_path(pool, path.parent)
    return Layer(str(path), values, yaml.safe_dump(values), shipped)


def pool_path(named: str, folder: Path = Path()) -> str:
    """The whole path of a pool's file in a folder; anything else as it is.

    The parser would take a bare `pool.yaml` for the name of a class.
    """
    return str((folder / user_path(named)).absolute()) if named.endswith(YAML) else named


def mapping_layer(name: str, values: Mapping[str, Any]) -> Layer:
    """Keys and values that are part of something else, which `name` says."""
    return Layer(name, values, yaml.safe_dump(dict(values)))


def default_layer() -> Layer:
    """What holds for every run unless it is told otherwise: configs/default.yaml."""
    return file_layer(CONFIGS / "default.yaml", shipped=True)


def shipped_recipes() -> dict[str, Path]:
    """The recipes in configs/recipe, by their names."""
    return {path.stem: path for path in RECIPES.glob("*.yaml")}


def recipe_layers(recipe: str | None) -> list[Layer]:
    """What a recipe brings along: that of configs/recipe, or a YAML file; nothing without one.

    Raises:
        ConfigError: No such recipe, or a file that cannot be read.
    """
    if recipe is None:
        return []
    if path := path_or_name(recipe):
        return [file_layer(path, flag="--recipe")]
    shipped = shipped_recipes()
    check_name(shipped, recipe, "recipe")
    return [file_layer(shipped[recipe], shipped=True)]


def algo_layers(algo: str) -> list[Layer]:
    """What a method brings along: configs/algo/<algo>.yaml, or nothing."""
    shipped = {path.stem: path for path in (CONFIGS / "algo").glob("*.yaml")}
    return [file_layer(shipped[algo], shipped=True)] if algo in shipped else []


@dataclass(frozen=True)
class Flags:
    """A command line, with what needs care taken out.

    Attributes:
        layers: The `--config` files.
        algos: The methods in the last `--algo`; empty without one.
        recipe: The recipe in the last `--recipe`, or else in the last `--config` file with one.
        agent_arguments: What each `--agent.arguments` says.
        pools: What each `--teachers` says.
        trust: What the files may name.
        others: All other flags.
    """

    layers: list[Layer]
    algos: list[str]
    recipe: str | None
    agent_arguments: list[dict[str, Any]]
    pools: list[str]
    trust: Trust
    others: list[str]


def read_flags(argv: Sequence[str]) -> Flags:
    """Sorts the flags of a command line.

    Raises:
        ConfigError: A flag without its value, or a file that cannot be read.
    """
    paths, flags = take([flag for flag in argv if flag != TRUST], "--config")
    named, flags = take(flags, "--algo")
    recipes, flags = take(flags, "--recipe")
    epochs, flags = take(flags, "--epochs")
    on_nan, flags = take(flags, "--on-nan")
    given, flags = take(flags, "--agent.arguments")
    flags = _with_pool_paths(flags)
    layers = [file_layer(user_path(path)) for path in paths]
    in_files = [str(layer.values["recipe"]) for layer in layers if layer.values.get("recipe")]
    return Flags(
        layers=layers,
        algos=_names(named[-1]) if named else [],
        recipe=[None, *in_files, *recipes][-1],
        agent_arguments=[_load_arguments(text) for text in given],
        pools=take(flags, "--teachers")[0],
        trust=trust_of(argv),
        others=[
            *flags,
            *(f"--optimizer.epochs={count}" for count in epochs),
            *(f"--on_nan={choice}" for choice in on_nan),
        ],
    )


def _with_pool_paths(flags: Sequence[str]) -> list[str]:
    """Some flags, with the whole paths of the files in `--teachers FILE` and `--teachers=FILE`."""
    whole = []
    for before, flag in zip(["", *flags], flags, strict=False):
        name, equals, value = flag.partition("=")
        if before == "--teachers":
            whole.append(pool_path(flag))
        else:
            whole.append(f"{name}={pool_path(value)}" if name == "--teachers" and equals else flag)
    return whole


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise ConfigError(f"--algo: expected names with commas between them, got '{text}'")
    return names


def parse_arguments(argv: Sequence[str], program: str = "run.py") -> list[ExperimentConfig]:
    """The configurations that a command line asks for: one for each method in `--algo`.

    Args:
        argv: Flags, without the program's name; `--algo` may hold several names with commas.
        program: The program's name, for its help.

    Raises:
        ConfigError: An unknown key, a value of the wrong type, or a file that cannot be read.
        SystemExit: After `--help` or `--print_config`.
    """
    flags = read_flags(argv)
    in_files = [str(layer.values["algo"]) for layer in flags.layers if "algo" in layer.values]
    algos = flags.algos or [ExperimentConfig.algo, *in_files][-1:]
    first = [default_layer(), *recipe_layers(flags.recipe)]
    return [
        build_config(
            algo, [*first, *algo_layers(algo)], flags, recipe=flags.recipe, program=program
        )
        for algo in algos
    ]


def build_config(
    algo: str,
    layers: Sequence[Layer],
    flags: Flags,
    *,
    recipe: str | None = None,
    program: str = "run.py",
) -> ExperimentConfig:
    """The configuration of one method: the layers, then the `--config` files, then the flags.

    Args:
        algo: The method's name.
        layers: Earlier layers first.
        flags: The command line.
        recipe: Name of the recipe that is among the layers, for the record.
        program: The program's name, for its help.

    Raises:
        ConfigError: An unknown key or a value of the wrong type; names the layer it stands in.
        SystemExit: After `--help` or `--print_config`.
    """
    layers = [*layers, *flags.layers]
    arguments = [*(layer.agent_arguments for layer in layers), *flags.agent_arguments]
    others = [*flags.others, *(["--recipe", recipe] if recipe else [])]
    # Options import what they name when they are built, if only to be checked.
    with flags.trust.applied():
        for named in (*(layer.values.get("teachers") for layer in layers), *flags.pools):
            _check_pool_file(named)
        try:
            return _parse(algo, layers, arguments, others, program)
        except ConfigError as error:
            name = _culprit(layers, str(error), program)
            if name is None:
                raise
            raise ConfigError(f"{name}: {error}") from error


def _parse(
    algo: str,
    layers: Sequence[Layer],
    arguments: Sequence[Mapping[str, Any]],
    flags: Sequence[str],
    program: str,
) -> ExperimentConfig:
    shipped = list(takewhile(lambda layer: layer.shipped, layers))
    sources = [layer.source for layer in layers[len(shipped) :] if layer.values]
    configs = [part for source in sources for part in ("--config", source)]
    together = {key: value for layer in arguments for key, value in layer.items()}
    # As YAML, because JSON has no word for NaN or infinity.
    merged = ["--agent.arguments", yaml.safe_dump(together)] if together else []
    parser = _parser(tuple(layer.source for layer in shipped), program)
    try:
        parsed = parser.parse_args([*configs, *merged, *flags, "--algo", algo])
    except ImportError as error:  # What a value names, and is not to be imported.
        parser.error(str(error), error)
    check_fields(ExperimentConfig, parsed.as_dict())
    check_trusted(parsed.as_dict())
    for path in TRAININGS:
        make_recipe(parsed[path].as_dict(), path)
    values = parser.instantiate(parsed).as_dict()
    return ExperimentConfig(
        **{name: values[name] for name in ExperimentConfig.__dataclass_fields__}
    )


def _culprit(layers: Sequence[Layer], message: str, program: str) -> str | None:
    """Name of the first layer that brings the message about; none where a flag does."""
    algo = ExperimentConfig.algo
    for count in range(1, len(layers) + 1):
        try:
            _parse(algo, layers[:count], [], [], program)
        except ConfigError as error:
            if str(error) == message:
                return layers[count - 1].name
    return None


def _check_pool_file(named: Any) -> None:
    """Checks the file of a pool, which the parser reads less strictly, if it is one.

    Raises:
        ConfigError: It cannot be read, holds something else, or names what is not to be trusted.
    """
    if isinstance(named, str) and named.endswith(YAML):
        path = user_path(named)
        if path.exists():
            check_trusted(read_yaml(path, "teachers"), f"{path}: ")


def _load_arguments(text: str) -> dict[str, Any]:
    try:
        arguments = parse_yaml(text)
    except yaml.YAMLError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ConfigError(f"agent.arguments: expected keys and values, got '{text}'")
    return arguments


def read_yaml(path: Path, flag: str) -> dict[str, Any]:
    """The keys and values of a YAML file; none if it is empty.

    Args:
        path: The file.
        flag: What the user named it by, for errors.

    Raises:
        ConfigError: A file that cannot be read or holds something else.
    """
    try:
        content = load_yaml(path)
    except OSError as error:
        raise ConfigError(f"{flag}: {path}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from error
    if not isinstance(content or {}, dict):
        raise ConfigError(f"{flag}: {path}: expected keys and values, found {content!r}")
    return content or {}


def take(flags: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """The values of a flag, given as `--flag value` or `--flag=value`, and all other flags."""
    values: list[str] = []
    others: list[str] = []
    remaining = iter(flags)
    for flag in remaining:
        if flag == name:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise ConfigError(f"{name}: expected a value")
            values.append(value)
        elif flag.startswith(f"{name}="):
            values.append(flag.partition("=")[2])
        else:
            others.append(flag)
    return values, others


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML can hold."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
