"""Where the values of a configuration come from: files, and parts of them, one over the other."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.config.experiment import ExperimentConfig
from mtkd_env.errors import ConfigError, check_name, errors_of
from mtkd_env.files import load_yaml, parse_yaml, path_or_name, to_yaml, user_path
from mtkd_env.options import as_fields
from mtkd_env.teachers.pool import PoolSpec, TeacherSpec

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
    if shipped:  # The parser's help names the file.
        return Layer(str(path), values, str(path), shipped)
    if isinstance(pool := values.get("teachers"), str):
        values["teachers"] = pool = str((path.parent / user_path(pool)).absolute())
    return Layer(
        str(path), values, for_parser(values | ({"teachers": whole_pool(pool)} if pool else {}))
    )


def whole_pool(given: Any) -> Any:
    """A pool with keys and values wherever it may be given in another form.

    The parser knows no other: it would take a teacher's network alone for the name of a class.

    Args:
        given: The pool, or its file; anything else is for the parser to refuse.
    """
    if isinstance(given, str) and given.endswith(YAML) and user_path(given).is_file():
        given = load_yaml(user_path(given))
    if not isinstance(given, Mapping | list):
        return given
    pool = as_fields(PoolSpec, given)
    if isinstance(teachers := pool.get("teachers"), list):
        pool["teachers"] = [
            as_fields(TeacherSpec, one) if isinstance(one, str) else one for one in teachers
        ]
    return pool


def for_parser(values: Any) -> str:
    """Keys and values as a text that the parser reads as the same ones."""
    return to_yaml(_quoted(values))


def _quoted(values: Any) -> Any:
    """The same with quotes around texts that the parser would take for something else: `"0"`.

    It looks into every text once more; what it leaves of these, `plain_values` makes texts again.
    """
    if isinstance(values, Mapping):
        return {key: _quoted(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_quoted(value) for value in values]
    if isinstance(values, str) and not isinstance(yaml_value(values), str):
        return json.dumps(values, ensure_ascii=False)
    return values


def yaml_value(text: str) -> Any:
    """What a text says as YAML; the text itself if it is none."""
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text


def mapping_layer(name: str, values: Mapping[str, Any]) -> Layer:
    """Keys and values that are part of something else, which `name` says."""
    return Layer(name, values, to_yaml(dict(values)))


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
        with errors_of(flag):
            content = load_yaml(path)
    except OSError as error:
        raise ConfigError(f"{flag}: {path}: {error.strerror}") from error
    if not isinstance(content or {}, dict):
        raise ConfigError(f"{flag}: {path}: expected keys and values, found {content!r}")
    return content or {}
