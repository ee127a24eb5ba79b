"""What an experiment is made of: the options of what it builds, and where and how it runs."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from types import NoneType
from typing import Any

from agents import check_agent, find_agent
from agents.base import WARMUP_WEIGHTS
from experiments.config.layers import shipped_methods
from mtkd_env.agent_file import PRETRAINED
from mtkd_env.computing import Computing
from mtkd_env.data import DataSpec
from mtkd_env.env import EnvSpec
from mtkd_env.errors import ConfigError, check_name, check_not_negative
from mtkd_env.files import path_or_name, to_yaml, user_path, whole_path
from mtkd_env.imports import Named, is_in_memory, name_of, texts_in
from mtkd_env.keeping import CheckpointConfig
from mtkd_env.networks import StudentSpec
from mtkd_env.optimization import Recipe
from mtkd_env.options import Options, default_values
from mtkd_env.registration import PARTS
from mtkd_env.teachers import PoolSpec
from mtkd_env.terms import Distillation

# Where and how a run is computed, what its values are called, and how images are read; the numbers
# do not depend on it. A run that skips batches, where it would otherwise have stopped, says so in
# its result.
PLACE = (
    *(
        "device",
        "threads",
        "output",
        "cache",
        "recipe",
        "checkpoint",
        "prefetch",
        "compile",
        "deterministic",
        "method",
        "setting",
    ),
    *("env.on_nan", "env.output", "teachers.store"),
    *("data.arguments.download", "data.arguments.workers", "data.arguments.prefetch_bytes"),
)

# More are a mistake, and more than a process can start.
MOST_THREADS = 4096


@dataclass(frozen=True)
class AgentConfig(Options):
    """The agent.

    Attributes:
        name: An agent, a weighting or an algorithm, see algo; by default that of --algo.
        arguments: Its keyword arguments.
        load: What another agent has learned, to begin from: the folder of its run, its
            agent.safetensors, or pretrained for the agent that is shipped. Its network is the
            other's unless arguments say otherwise.
        learn: Whether it goes on learning; false: it only acts with what it has loaded.
    """

    name: Named | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    load: str | None = None
    learn: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load is not None and self.load != PRETRAINED:
            object.__setattr__(self, "load", whole_path(self.load))


@dataclass(frozen=True)
class WarmupConfig(Options):
    """The epochs in which all teachers count the same.

    Attributes:
        epochs: Number of epochs, the first of the student's.
        weights: uniform (1/M each) or ones.

    Raises:
        ConfigError: Unknown weights.
    """

    epochs: int = 1
    weights: str = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(WARMUP_WEIGHTS, self.weights, "weights")


@dataclass(frozen=True)
class RunConfig(Options):
    """What every run that is kept is told, whatever trains.

    Attributes:
        seed: Seed of all that is drawn.
        threads: CPU threads; torch's choice by default.
        output: Folder that run folders are made in.
        checkpoint: When the run keeps what it can go on from.

    Raises:
        ConfigError: A negative seed, or a number of threads that cannot be.
    """

    seed: int = 0
    threads: int | None = None
    output: str = "runs"
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(seed=self.seed)
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise ConfigError(f"threads: expected 1 to {MOST_THREADS}, got {self.threads}")
        object.__setattr__(self, "output", str(user_path(self.output)))

    def to_yaml(self) -> str:
        """The whole configuration; as a `--config` file it gives an equal one."""
        return to_yaml(asdict(self))


@dataclass(frozen=True)
class ExperimentConfig(RunConfig, Computing):
    """One run: a student, its teachers, and who weights them.

    Attributes:
        algo: Name of the method; selects configs/algo/<algo>.yaml. Or one's own: a class of Agent,
            of Weighting or of a Stable-Baselines3 algorithm, as `module:Class` or as an object.
        recipe: Name of an experiment of the paper, which selects configs/recipe/<recipe>.yaml, or a
            YAML file.
        data: The images.
        teachers: The pool of teachers, or a YAML file that describes one.
        student: The student.
        optimizer: Optimiser and schedule of the student; its epochs are those of the run.
        distillation: The loss of the student.
        env: What the agent sees, does and is paid for.
        agent: The agent.
        warmup: The epochs in which all teachers count the same.
        threads: CPU threads; by default one for the digits, whose images are too small to share,
            and torch's choice for everything else.
        method: What tables and pages call the method; by default its name.
        setting: What they call the setting that the method is run in.

    Raises:
        ConfigError: A value that cannot be used.
    """

    algo: Named = "ppo"
    recipe: str | None = None
    data: DataSpec = field(default_factory=DataSpec)
    teachers: PoolSpec = field(default_factory=PoolSpec)
    student: StudentSpec = field(default_factory=StudentSpec)
    optimizer: Recipe = field(default_factory=Recipe)
    distillation: Distillation = field(default_factory=Distillation)
    env: EnvSpec = field(default_factory=EnvSpec)
    agent: AgentConfig = field(default_factory=AgentConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    method: str | None = None
    setting: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe is not None and path_or_name(self.recipe):
            object.__setattr__(self, "recipe", whole_path(self.recipe))
        if not 0 <= self.warmup.epochs <= self.optimizer.epochs:
            raise ConfigError(
                f"warmup.epochs: expected 0 to optimizer.epochs = {self.optimizer.epochs}, "
                f"got {self.warmup.epochs}"
            )

    @property
    def agent_name(self) -> Named:
        """The agent's name, or the agent: its own, or else the method's."""
        return self.agent.name or self.algo

    @property
    def parts(self) -> dict[str, Any]:
        """Arguments of `assemble`; where and in what all is computed, the run says itself.

        A weighting may look at the teachers' maps where no loss does.
        """
        parts = {name: getattr(self, name, self) for name in PARTS}
        if getattr(find_agent(self.agent_name), "needs_maps", False):
            store = self.teachers.store.resolved(compared=True)
            parts["teachers"] = replace(self.teachers, store=store)
        return parts

    def check_agent(self) -> None:
        """Checks the agent, which is imported for it, before anything is loaded.

        Raises:
            ConfigError: An unknown agent, an argument that it does not take, or nothing to load.
        """
        agent = self.agent
        check_agent(
            self.agent_name,
            agent.arguments,
            load=agent.load,
            learn=agent.learn,
            others=() if agent.name else shipped_methods(),
        )

    def to_yaml(self) -> str:
        """The whole configuration; as a `--config` file it gives an equal one.

        But for objects that are `in_memory`: of these it has the names only.
        """
        return to_yaml(_plain(self))

    @property
    def in_memory(self) -> list[str]:
        """The keys of objects that no other process can find by their names."""
        return [key for key, text in texts_in(_plain(self)) if is_in_memory(text)]

    @property
    def digest(self) -> str:
        """Digest of everything that the numbers of a run depend on; not of where it runs.

        Values that are the defaults of their class do not count, so that a new key, whose default
        changes nothing, leaves the digests of finished runs as they are.
        """
        values = _without_place(_plain(self, set_only=True))
        if self.teachers.store:  # It counts how outputs are rounded, not where they are kept.
            values["store"] = self.teachers.store.dtype
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _without_place(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values that the numbers of a run depend on."""
    kept = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        inner = _without_place(value, f"{path}.") if isinstance(value, dict) else value
        # What holds nothing else is as good as not set.
        if path not in PLACE and (inner or not value):
            kept[name] = inner
    return kept


def _plain(value: Any, *, set_only: bool = False) -> Any:
    """What YAML can hold: keys and values, lists, and names of objects.

    Args:
        value: Options, or what they may hold.
        set_only: Without the fields of options that are their defaults.
    """
    plain = partial(_plain, set_only=set_only)
    if isinstance(value, Options):
        defaults = default_values(type(value)) if set_only else {}
        return {
            entry.name: name_of(one) if entry.type == Named else plain(one)
            for entry in fields(value)
            for one in [getattr(value, entry.name)]
            if entry.name not in defaults or one != defaults[entry.name]
        }
    if isinstance(value, dict):
        return {name_of(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if isinstance(value, int | float | NoneType) else name_of(value)
