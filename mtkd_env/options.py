"""Options are frozen dataclasses beside what they build; here they are made of what a user wrote.

One rule for Python's keyword arguments, YAML files and flags: the object itself, its fields by
name, or the value of its first field alone.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from mtkd_env.errors import ConfigError, check_arguments, check_types

T = TypeVar("T")


def build(kind: type[T], given: Any, path: str = "") -> T:
    """An object of options.

    Args:
        kind: A dataclass. Fields that are dataclasses themselves, or tuples of them, are built
            alike; what is not said of one keeps the value of its default.
        given: One of the kind; its fields by name; where the first field is a name or a list, that
            alone; None for the defaults.
        path: Where it stands, for errors.

    Raises:
        ConfigError: An unknown or missing field, or a value that cannot be; named as `path.field`.
    """
    if isinstance(given, kind):
        return given
    given = as_fields(kind, given, path)
    check_arguments(kind, given, path)
    types, defaults = get_type_hints(kind), default_values(kind)
    for name in field_names(kind):
        if name not in given and name not in defaults:
            raise ConfigError(f"{_at(path)}lacks the key '{name}'")
    values = {
        name: _value(types[name], value, defaults.get(name), _join(path, name))
        for name, value in given.items()
    }
    check_types(kind, values, path)
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(_named(kind, str(error), path)) from None


def as_fields(kind: type, given: Any, path: str = "") -> dict[str, Any]:
    """Fields by name, of any form that `build` takes.

    Raises:
        ConfigError: Something else.
    """
    if isinstance(given, kind):
        return {name: getattr(given, name) for name in field_names(kind)}
    if isinstance(given, Mapping):
        return dict(given)
    first = fields(kind)[0]
    named = first.type is str and isinstance(given, str)
    if named or (get_origin(first.type) is tuple and isinstance(given, list | tuple)):
        return {first.name: given}
    if given is None:
        return {}
    raise ConfigError(f"{_at(path)}expected {kind.__name__} or its fields by name, got {given!r}")


def field_names(kind: type) -> list[str]:
    """Names of the fields of a dataclass."""
    return [entry.name for entry in fields(kind)]


def default_values(kind: type) -> dict[str, Any]:
    """The defaults of a dataclass, by the names of those fields that have one."""
    found = {entry.name: _default(entry) for entry in fields(kind)}
    return {name: value for name, value in found.items() if value is not MISSING}


def _default(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _value(annotation: Any, value: Any, default: Any, path: str) -> Any:
    """A field's value in the type that its annotation says, where that takes no guess."""
    if is_dataclass(annotation) and isinstance(annotation, type):
        if isinstance(value, Mapping) and default is not None:
            value = as_fields(annotation, default) | dict(value)
        if value is None:
            raise ConfigError(f"{path}: expected keys and values, got None")
        return build(annotation, value, path)
    if get_origin(annotation) is tuple and isinstance(value, list | tuple):
        inner = get_args(annotation)[0]
        return tuple(_value(inner, entry, None, f"{path}.{i}") for i, entry in enumerate(value))
    if isinstance(value, Path):
        return str(value)
    if type(value) is int and float in (annotation, *get_args(annotation)):
        return float(value)  # 1 and 1.0 are one value, and one digest.
    return value


def _named(kind: type, message: str, path: str) -> str:
    """A message of a class about its fields, with where they stand."""
    first = re.match(r"\w+(?=[.:])", message)
    own = first is not None and first[0] in field_names(kind)
    return _join(path, message) if own else _at(path) + message


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _at(path: str) -> str:
    return f"{path}: " if path else ""
