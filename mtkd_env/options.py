"""Options are frozen dataclasses beside what they build; here they are made of what a user wrote.

One rule for Python's keyword arguments, YAML files and flags: the object itself, its fields by
name, or the value of its first field alone; and each value in the type that its annotation says.
What has an annotation of `Named` is left to whoever looks it up.
"""

import inspect
import re
import sys
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import repeat
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from mtkd_env.errors import ConfigError, check_arguments
from mtkd_env.imports import Named

T = TypeVar("T")

# Types that a value can be told to be or not to be, and what they are called in errors.
PLAIN: dict[Any, str] = {
    **{kind: kind.__name__ for kind in (bool, int, float, str, dict, list)},
    Mapping: "dict",
    Path: "str",
    Sequence: "list",
    tuple: "list",
    types.NoneType: "None",
}


@dataclass(frozen=True)
class Options:
    """What all classes of options begin with: their fields are made what `build` makes of them."""

    def __post_init__(self) -> None:
        defaults = default_values(type(self))
        for name, value in typed(type(self), vars(self), defaults=defaults).items():
            object.__setattr__(self, name, value)


def build(kind: type[T], given: Any, path: str = "") -> T:
    """An object of options.

    Args:
        kind: A dataclass. Fields that are dataclasses themselves, or tuples of them, are built
            alike; what is not said of one keeps the value of its default.
        given: One of the kind; its fields by name; where the first field is a name, an object that
            a name may stand for, or a list, that alone; None for the defaults.
        path: Where it stands, for errors.

    Raises:
        ConfigError: An unknown or missing field, or a value that cannot be; named as `path.field`.
    """
    if isinstance(given, kind):
        return given
    given = as_fields(kind, given, path)
    check_arguments(kind, given, path)
    defaults = default_values(kind)
    for name in field_names(kind):
        if name not in given and name not in defaults:
            raise ConfigError(f"{_at(path)}lacks the key '{name}'")
    values = typed(kind, given, path, defaults=defaults)
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(_named(kind, str(error), path)) from None


def typed(
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    path: str = "",
    *,
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """Keyword arguments as plain values of the types that a signature says.

    What sweeps and notebooks give becomes Python's own, in lists and mappings as well: numbers of
    numpy and torch, their arrays as lists, paths as texts. 8 is 8.0 where a float is expected, and
    8.0 is 8 where a whole number is, so that both have one digest. A text is never a number, and
    neither is True. Types that are not plain are the target's own business, but for dataclasses,
    which `build` makes.

    Args:
        target: What takes the arguments.
        arguments: By name; those that it has no parameter for are made plain.
        path: Where they stand, for errors.
        defaults: Of options, whose parts keep of these what is not said.

    Raises:
        ConfigError: A value of another type; named as `path.argument`.
    """
    signature = _class_signature if isinstance(target, type) else inspect.signature
    parameters = signature(target).parameters
    return {
        name: fitted(
            plain(value),
            parameters[name].annotation if name in parameters else Any,
            _join(path, name),
            defaults.get(name),
        )
        for name, value in arguments.items()
    }


def plain(value: Any) -> Any:
    """A value in Python's own types, where it is one of numpy's or torch's, a path or a number."""
    if isinstance(value, type):
        return value
    if callable(convert := getattr(value, "tolist", None)):
        value = convert()
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return tuple(map(plain, value)) if isinstance(value, tuple) else [*map(plain, value)]
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def as_fields(kind: type, given: Any, path: str = "") -> dict[str, Any]:
    """Fields by name, of any form that `build` takes.

    Raises:
        ConfigError: Something else.
    """
    if isinstance(given, kind):
        return {name: getattr(given, name) for name in field_names(kind)}
    if isinstance(given, Mapping):
        return dict(given)
    if given is None:
        return {}
    first = fields(kind)[0]
    named = first.type == Named or (first.type is str and isinstance(given, str))
    if named or (get_origin(first.type) is tuple and isinstance(given, list | tuple)):
        return {first.name: given}
    raise ConfigError(f"{_at(path)}expected {kind.__name__} or its fields by name, got {given!r}")


def field_names(kind: type) -> list[str]:
    """Names of the fields of a dataclass."""
    return [entry.name for entry in fields(kind)]


def default_values(kind: type) -> Mapping[str, Any]:
    """The defaults of a dataclass, by the names of those fields that have one."""
    return _defaults(kind)


@cache
def _defaults(kind: type) -> Mapping[str, Any]:
    """Made once, because those that are options have defaults of their own, and so on."""
    found = {
        entry.name: entry.default if entry.default_factory is MISSING else entry.default_factory()
        for entry in fields(kind)
    }
    return types.MappingProxyType(
        {name: value for name, value in found.items() if value is not MISSING}
    )


_class_signature = cache(inspect.signature)


def fitted(value: Any, annotation: Any, path: str, default: Any = None) -> Any:
    """A plain value in the type that an annotation says, where that takes no guess.

    Args:
        value: The value; see `plain`.
        annotation: The type.
        path: Where the value stands, for errors.
        default: Of options, whose parts keep of it what is not said.

    Raises:
        ConfigError: A value of another type.
    """
    if is_dataclass(annotation) and isinstance(annotation, type):
        return _part(annotation, value, path, default)
    union = get_origin(annotation) in {Union, types.UnionType}
    members = get_args(annotation) if union else (annotation,)
    kinds = {get_origin(kind) or kind: kind for kind in members}
    if not kinds.keys() <= PLAIN.keys():
        return value
    value = _number(value, kinds)
    for origin, kind in kinds.items():
        if _is_a(value, origin):
            return _with_entries(value, kind, path)
    expected = " or ".join(dict.fromkeys(PLAIN[origin] for origin in kinds))
    raise ConfigError(f"{_at(path)}expected {expected}, got {value!r}")


def _part(kind: type, value: Any, path: str, default: Any) -> Any:
    """Options that are part of others."""
    if isinstance(value, Mapping) and default is not None:
        value = as_fields(kind, default) | dict(value)
    if value is None:
        raise ConfigError(f"{path}: expected keys and values, got None")
    return build(kind, value, path)


def _number(value: Any, kinds: Collection[Any]) -> Any:
    """A number in the type that is expected, if it has its value there; anything else as it is."""
    if type(value) is int and int not in kinds and float in kinds:
        return float(value) if abs(value) <= sys.float_info.max else value
    if type(value) is float and float not in kinds and int in kinds:
        return int(value) if value.is_integer() else value
    return value


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    wider: dict[Any, Any] = {
        Path: str,
        list: list | tuple,
        tuple: list | tuple,
        Sequence: list | tuple,
    }
    return isinstance(value, wider.get(kind, kind))


def _with_entries(value: Any, kind: Any, path: str) -> Any:
    """A list or mapping whose entries are of the type that an annotation says; else the value."""
    inner = get_args(kind) or (Any, ...)
    if isinstance(value, Mapping):
        return {key: fitted(entry, inner[1], _join(path, str(key))) for key, entry in value.items()}
    if not isinstance(value, list | tuple):
        return value
    make = tuple if (get_origin(kind) or kind) is tuple else list
    fixed = make is tuple and ... not in inner
    if fixed and len(inner) != len(value):
        raise ConfigError(f"{_at(path)}expected {len(inner)} values, got {value!r}")
    return make(
        fitted(entry, of, _join(path, str(position)))
        for position, (entry, of) in enumerate(
            zip(value, inner if fixed else repeat(inner[0]), strict=fixed)
        )
    )


def _named(kind: type, message: str, path: str) -> str:
    """A message of a class about its fields, with where they stand."""
    first = re.match(r"\w+(?=[.:])", message)
    own = first is not None and first[0] in field_names(kind)
    return _join(path, message) if own else _at(path) + message


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _at(path: str) -> str:
    return f"{path}: " if path else ""
