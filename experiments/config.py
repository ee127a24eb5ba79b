"""What an experiment is made of, and where its values come from.

Layers, later ones win: `configs/default.yaml`, `configs/algo/<algo>.yaml`, `--config` files,
flags. Arguments of the agent are merged key by key; everything else is replaced.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from mtkd_env.errors import ConfigError, did_you_mean
from mtkd_env.optimization import SGDRecipe
from mtkd_env.teachers import PoolSpec

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class DataConfig:
    """The images.

    Attributes:
        dataset: Name of a dataset.
        arguments: Keyword arguments of the dataset, such as path for npz.
        batch_size: Images in a batch; also the number of sub-environments.
        val_fraction: Share of the training images to hold out for choices.
        train_size: Training images to keep; all by default.
    """

    dataset: str = "digits"
    arguments: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    val_fraction: float = 0.0
    train_size: int | None = None


@dataclass(frozen=True)
class StudentConfig:
    """The student.

    Attributes:
        network: Name of a network.
        width: Factor on all its channel counts.
    """

    network: str = "resnet8"
    width: float = 1.0


@dataclass(frozen=True)
class DistillationConfig:
    """The loss of the student (Equ. 2).

    Attributes:
        alpha: Weight of the logit terms.
        beta: Weight of the feature terms.
        temperature: Softening of the logit terms.
    """

    alpha: float = 1.0
    beta: float = 5.0
    temperature: float = 4.0


@dataclass(frozen=True)
class EnvConfig:
    """What the agent sees, does and is paid for.

    Attributes:
        reward: paper, alignment, aggregate or reference.
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
class ExperimentConfig:
    """One run: a student, its teachers, and who weights them.

    Attributes:
        teachers: The pool of teachers, or a YAML file that describes one.
        algo: Name of the method; selects configs/algo/<algo>.yaml.
        data: The images.
        student: The student.
        optimizer: Optimiser and schedule of the student; its epochs are those of the run.
        distillation: The loss of the student.
        env: What the agent sees, does and is paid for.
        agent: The agent.
        warmup: The epochs in which all teachers count the same.
        seed: Seed of the student, the data order and the agent.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        output: Folder that run folders are made in.
        cache: Folder of trained teachers; by default $MTKD_CACHE or ~/.cache/mtkd_env.
    """

    teachers: PoolSpec
    algo: str = "ppo"
    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    optimizer: SGDRecipe = field(default_factory=SGDRecipe)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    seed: int = 0
    device: str = "auto"
    output: str = "runs"
    cache: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.warmup.epochs <= self.optimizer.epochs:
            raise ConfigError(
                f"warmup.epochs: expected 0 to optimizer.epochs = {self.optimizer.epochs}, "
                f"got {self.warmup.epochs}"
            )

    @property
    def agent_name(self) -> str:
        """The agent's name: its own, or else the method's."""
        return self.agent.name or self.algo

    def to_yaml(self) -> str:
        """The whole configuration; as a `--config` file it gives an equal one."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)


class _Parser(ArgumentParser):
    """Reports what is wrong as a `ConfigError` of one line, with the nearest valid key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(message.split())
        raise ConfigError(text + self._hint(text)) from ex

    def _hint(self, message: str) -> str:
        known = list(self.get_defaults(skip_validation=True).keys())
        for prefix, suffix in (("unrecognized arguments: --", ""), ("Option '", "'")):
            if prefix in message:
                wrong = message.split(prefix, 1)[1].split(suffix or " ", 1)[0].split("=")[0]
                return did_you_mean(wrong, known)
        return ""


def _parser(layers: Sequence[Path], program: str) -> _Parser:
    parser = _Parser(
        prog=Path(program).name,
        description=(
            "Distils a student from its teachers under a method's weights. Layers, later ones "
            "win: configs/default.yaml, configs/algo/ALGO.yaml, --config files, flags. "
            "--algo takes several methods with commas between them."
        ),
        default_config_files=[str(layer) for layer in layers],
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; may be given several times")
    parser.add_class_arguments(ExperimentConfig)
    return parser


def parse_arguments(argv: Sequence[str], program: str = "run.py") -> list[ExperimentConfig]:
    """The configurations that a command line asks for: one for each method in `--algo`.

    Args:
        argv: Flags, without the program's name; `--algo` may hold several names with commas.
        program: The program's name, for its help.

    Raises:
        ConfigError: An unknown key, a value of the wrong type, or a file that cannot be read.
        SystemExit: After `--help` or `--print_config`.
    """
    flags = _split_equals(argv)
    files = [Path(path) for path in _values_of(flags, "--config")]
    contents = [_read_yaml(path) for path in files]
    named = _values_of(flags, "--algo")
    if named:
        algos = named[-1].split(",")
    else:
        found = [content["algo"] for content in contents if "algo" in content]
        algos = [str(found[-1] if found else ExperimentConfig.algo)]
    rest = _without(flags, "--algo")
    return [_parse_one(algo, contents, rest, program) for algo in algos]


def _parse_one(
    algo: str, contents: Iterable[dict[str, Any]], flags: Sequence[str], program: str
) -> ExperimentConfig:
    layers = [CONFIGS / "default.yaml"]
    arguments: dict[str, Any] = {}
    own = CONFIGS / "algo" / f"{algo}.yaml"
    if own.is_file():
        layers.append(own)
        arguments.update(_agent_arguments(_read_yaml(own)))
    for content in contents:
        arguments.update(_agent_arguments(content))
    configs = [part for path in _values_of(flags, "--config") for part in ("--config", path)]
    merged = ["--agent.arguments", json.dumps(arguments)] if arguments else []
    parser = _parser(layers, program)
    parsed = parser.parse_args([*configs, *merged, *_without(flags, "--config"), "--algo", algo])
    values = parser.instantiate(parsed).as_dict()
    names = ExperimentConfig.__dataclass_fields__
    return ExperimentConfig(**{name: values[name] for name in names})


def _agent_arguments(content: dict[str, Any]) -> dict[str, Any]:
    agent = content.get("agent") or {}
    return (agent.get("arguments") or {}) if isinstance(agent, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path}: not valid YAML ({error})") from error
    if not isinstance(content or {}, dict):
        raise ConfigError(f"--config: {path}: expected keys and values, found {content!r}")
    return content or {}


def _split_equals(argv: Sequence[str]) -> list[str]:
    """`--flag=value` as two entries, for the flags that are read before the parser."""
    flags: list[str] = []
    for flag in argv:
        name, equals, value = flag.partition("=")
        early = name in ("--algo", "--config")
        flags.extend([name, value] if early and equals else [flag])
    return flags


def _values_of(flags: Sequence[str], name: str) -> list[str]:
    positions = [i for i, flag in enumerate(flags[:-1]) if flag == name]
    return [flags[i + 1] for i in positions]


def _without(flags: Sequence[str], name: str) -> list[str]:
    dropped = {i + offset for i, flag in enumerate(flags) if flag == name for offset in (0, 1)}
    return [flag for i, flag in enumerate(flags) if i not in dropped]


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML can hold."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
