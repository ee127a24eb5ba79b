"""Errors that name what is wrong, what was expected, and the nearest valid choice."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A value that the user gave cannot be used; the message names it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`'; did you mean ...?'` for the nearest known name, or an empty string."""
    nearest = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """The entry of a registry.

    Raises:
        ConfigError: `name` is not in `table`; names the nearest entry and all the known ones.
    """
    check_name(table, name, kind)
    return table[name]


def check_name(known: Collection[str], name: str, kind: str) -> None:
    """Checks that a name is among the known ones.

    Raises:
        ConfigError: It is not; names the nearest one and all of them.
    """
    if name not in known:
        names = ", ".join(sorted(known))
        raise ConfigError(f"unknown {kind} '{name}'{did_you_mean(name, known)} (known: {names})")


def check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any], path: str) -> None:
    """Checks keyword arguments against a signature before anything is built.

    Raises:
        ConfigError: An argument that `target` does not take; named as `path.argument`.
    """
    parameters = inspect.signature(target).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in arguments:
        if name not in parameters:
            known = ", ".join(sorted(parameters))
            hint = did_you_mean(name, parameters)
            raise ConfigError(f"{path}.{name}: unknown key{hint} (known: {known})")
