"""Kinds of runs that can be compared: how each is configured, done and watched."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

from experiments.executors import Task
from experiments.running.result import RunResult
from mtkd_env.errors import ConfigError, lookup

DISTILLATION = "distillation"

# The kinds, by where they stand; each imports only what it needs.
KINDS: Mapping[str, str] = {
    DISTILLATION: "experiments.comparison.distillation:Distillation",
    "detection": "experiments.comparison.transfer:Detection",
    "segmentation": "experiments.comparison.transfer:Segmentation",
}


@dataclass(frozen=True)
class Entry:
    """What a file says of one method in one setting.

    Attributes:
        path: The file.
        recipe: The recipe of the setting or else of the file, a path from there; none if neither
            has one.
        setting: Name of the setting.
        method: Label of the method.
        sections: Keys and values of all configurations, of the setting without the recipe, and of
            the method, each by what the section is called.
    """

    path: Path
    recipe: str | None
    setting: str
    method: str
    sections: Mapping[str, Mapping[str, Any]]


class Kind(ABC):
    """A kind of runs; its configurations are dataclasses with `seed`, `threads` and `digest`.

    Attributes:
        result_type: What a run comes to.
        reserved: Keys of a configuration that a comparison says elsewhere, and where.
    """

    result_type: type[RunResult]
    reserved: ClassVar[Mapping[str, str]]

    @abstractmethod
    def config(self, entry: Entry, flags: Sequence[str]) -> Any:
        """The configuration of an entry's runs, but for the seed and where they are kept.

        Raises:
            ConfigError: Anything that cannot be used.
        """

    def of_pool(self, config: Any, pool: int) -> Any:
        """The configuration with the pool of teachers that a seed makes.

        Raises:
            ConfigError: There are no such pools.
        """
        del config, pool
        raise ConfigError("pools: expected none, these runs have no teachers")

    def placed(self, config: Any, folder: Path) -> Any:
        """The configuration of the run in a folder."""
        return replace(config, output=str(folder))

    @abstractmethod
    def length(self, config: Any) -> tuple[int, str]:
        """How far a run goes, and what in a row of its log says how far it is."""

    @abstractmethod
    def check_data(self, configs: Sequence[Any]) -> None:
        """Looks at the data before the first run.

        Raises:
            ConfigError: Images or weights that cannot be loaded.
        """

    def teachers(self, configs: Sequence[Any], log: Path) -> list[tuple[Task, Sequence[int]]]:
        """What has to be done before the runs, and the numbers of the runs that need it.

        Args:
            configs: The configurations of all runs.
            log: The file in which the tasks tell how far they are.
        """
        del configs, log
        return []

    @abstractmethod
    def train(self, config: Any, folder: Path, name: str) -> None:
        """Does a run, from where it was interrupted if it was."""

    def shared(self, config: Any) -> Sequence[Path]:
        """Folders beside the output's that all nodes of a cluster have to see and write into."""
        del config
        return []


def find_kind(name: str) -> Kind:
    """A kind by its name.

    Raises:
        ConfigError: There is no such kind.
    """
    kind: Kind = resolve_name(lookup(KINDS, name, "kind"))()
    return kind
