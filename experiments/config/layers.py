"""Where the values of a configuration come from: files, and parts of them, one over the other."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.config.experiment import ExperimentConfig
from mtkd_env.errors import ConfigError, check_name
from mtkd_env.files import load_yaml, path_or_name, user_path

CONFIGS = Path(__file__).parent.parent / "configs"

RECIPES = CONFIGS / "recipe"

# How the names of pools' files end.
YAML = (".yaml", ".yml")

# Parts of a configuration that hold keys and values; the teachers' may also be the name of a file.
SECTIONS = {
    entry.name
    for entry in fields(ExperimentConfig)
    if entry.name != "teachers" and is_dataclass(entry.type)
}


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


def shipped_methods() -> dict[str, Path]:
    """The methods in configs/algo, by their names; others need no file."""
    return {path.stem: path for path in (CONFIGS / "algo").glob("*.yaml")}


def algo_layers(algo: str) -> list[Layer]:
    """What a method brings along: configs/algo/<algo>.yaml, or nothing."""
    shipped = shipped_methods()
    return [file_layer(shipped[algo], shipped=True)] if algo in shipped else []


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
