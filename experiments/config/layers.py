"""Where the values of a configuration come from: files, and parts of them, one over the other."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from mtkd_env.errors import ConfigError, check_name, errors_of
from mtkd_env.files import load_yaml, path_or_name, user_path
from mtkd_env.imports import check_trusted, whole_name
from mtkd_env.options import as_fields, build, default_values
from mtkd_env.teachers.pool import PoolSpec, read_pool_spec

CONFIGS = Path(__file__).parent.parent / "configs"

RECIPES = CONFIGS / "recipe"

# How the names of pools' files end.
YAML = (".yaml", ".yml")

# The mapping that is merged key by key; others are replaced.
MERGED = "agent.arguments"

# Keys of paths and labels, in which nothing is the name of an object.
TEXTS = ("output", "cache", "recipe", "method", "setting")

# How near a key must be to what was typed to be what was meant.
NEAR = 0.6

T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """Keys and values of one source, laid over those of earlier ones.

    Attributes:
        name: What errors call it, such as a file's path.
        values: Keys and values; keys of parts may stand behind dots.
    """

    name: str
    values: Mapping[str, Any]


def file_layer(path: Path, *, flag: str = "--config") -> Layer:
    """The keys and values of a YAML file, which errors say `flag` has named."""
    values = read_yaml(path, flag)
    if isinstance(pool := values.get("teachers"), str):
        values["teachers"] = str((path.parent / user_path(pool)).absolute())
    return Layer(str(path), values)


def merged(
    kind: type, layers: Iterable[Layer], flags: Iterable[tuple[str, Any]] = ()
) -> dict[str, Any]:
    """What layers say together of the fields of a class, and flags over them.

    Raises:
        ConfigError: A key that the class does not have, or a part that is none; names the layer.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        with errors_of(layer.name):
            values = _laid_over(kind, values, layer.values)
    for key, value in flags:
        values = _laid_over(kind, values, {key: value})
    return values


def configured(kind: type[T], layers: Sequence[Layer], flags: Sequence[tuple[str, Any]]) -> T:
    """The object of a class whose fields some layers say, and flags over them.

    Raises:
        ConfigError: An unknown key, a value that cannot be, or one that names what is not to be
            trusted; names the layer that it stands in.
    """
    values = merged(kind, layers, flags)
    try:
        return _built(kind, values)
    except ConfigError as error:
        if name := _culprit(kind, layers, flags, str(error)):
            raise ConfigError(f"{name}: {error}") from error
        raise


def _culprit(
    kind: type, layers: Sequence[Layer], flags: Iterable[tuple[str, Any]], message: str
) -> str | None:
    """Name of the last layer that brings the message about; none where a flag does."""
    needed = [flag for flag in flags if flag[0].partition(".")[0] not in default_values(kind)]
    if _problem(kind, merged(kind, layers, needed)) == message:
        for layer in reversed(layers):
            others = merged(kind, [one for one in layers if one is not layer], needed)
            if _problem(kind, others) != message:
                return layer.name
    return None


def _built(kind: type[T], values: Mapping[str, Any]) -> T:
    check_trusted({name: value for name, value in values.items() if name not in TEXTS})
    return build(kind, _whole_names(values))


def _problem(kind: type, values: Mapping[str, Any]) -> str | None:
    try:
        _built(kind, values)
    except ConfigError as error:
        return str(error)
    return None


def _whole_names(values: Any) -> Any:
    """The same with names of objects as they are from any working folder."""
    if isinstance(values, Mapping):
        return {key: _whole_names(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_whole_names(value) for value in values]
    return whole_name(values) if isinstance(values, str) else values


def _laid_over(
    kind: type, under: Mapping[str, Any], over: Mapping[str, Any], path: str = ""
) -> dict[str, Any]:
    """Values over others; of parts, and of what is `MERGED`, key by key."""
    types = {entry.name: entry.type for entry in fields(kind)}
    values = dict(under)
    for dotted, value in over.items():
        name, _, rest = dotted.partition(".")
        key = f"{path}{name}"
        if name not in types:
            known = [f"{path}{one}" for one in keys_of(kind)]
            raise ConfigError(f"{key}: unknown key{nearest_key(key, known)}")
        given = {rest: value} if rest else value
        part = types[name]
        if isinstance(part, type) and is_dataclass(part):
            own = _fields(part, given, key)
            values[name] = _laid_over(part, values.get(name, {}), own, f"{key}.")
        elif rest or key == MERGED:
            values[name] = _mapping_over(values.get(name), given, key)
        else:
            values[name] = value
    return values


def _fields(part: Any, given: Any, key: str) -> dict[str, Any]:
    """Fields by name, of any form that a part may be given in: a pool also as its file.

    Raises:
        ConfigError: Something else.
    """
    if given is None:
        raise ConfigError(f"{key}: expected keys and values, got None")
    if part is PoolSpec and isinstance(given, str):
        with errors_of(key):
            if not given.endswith(YAML):
                raise ConfigError(f"expected a file *.yaml or its fields by name, got {given!r}")
            read_pool_spec(given)
        given = load_yaml(user_path(given))
    return as_fields(part, given, key)


def _mapping_over(under: Any, over: Any, key: str) -> dict[str, Any]:
    """A mapping over another, whose keys may stand behind dots.

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(over, Mapping):
        raise ConfigError(f"{key}: expected keys and values, got {over!r}")
    values = dict(under) if isinstance(under, Mapping) else {}
    for dotted, value in over.items():
        name, _, rest = dotted.partition(".")
        values[name] = _mapping_over(values.get(name), {rest: value}, key) if rest else value
    return values


def keys_of(kind: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a class and those of its parts, behind dots."""
    for entry in fields(kind):
        yield f"{prefix}{entry.name}"
        if is_dataclass(entry.type):
            yield from keys_of(entry.type, f"{prefix}{entry.name}.")


def nearest_key(name: str, known: Iterable[str], mark: str = "") -> str:
    """`'; did you mean ...?'` for the nearest by its whole name or by its last part, or nothing.

    Of several that are as near, it is the shortest.
    """
    longest_first = sorted(known, key=len, reverse=True)
    parts = {part: key for key in longest_first for part in (key.rpartition(".")[2], key)}
    nearest = get_close_matches(name.replace("-", "_"), parts, n=1, cutoff=NEAR)
    return f"; did you mean '{mark}{parts[nearest[0]]}'?" if nearest else ""


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
    return [file_layer(shipped[recipe])]


def shipped_methods() -> dict[str, Path]:
    """The methods in configs/algo, by their names; others need no file."""
    return {path.stem: path for path in (CONFIGS / "algo").glob("*.yaml")}


def algo_layers(algo: str) -> list[Layer]:
    """What a method brings along: configs/algo/<algo>.yaml, or nothing."""
    shipped = shipped_methods()
    return [file_layer(shipped[algo])] if algo in shipped else []


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
