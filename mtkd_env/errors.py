"""Errors that name what is wrong, what was expected, and the nearest valid choice."""

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A value that the user gave cannot be used; the message names it."""


@contextmanager
def errors_of(place: object) -> Iterator[None]:
    """Lets mistakes in a block say what they are in, such as a file or a key.

    Raises:
        ConfigError: One that was raised in the block, with the place in front.
        FloatingPointError: Likewise.
    """
    try:
        yield
    except (ConfigError, FloatingPointError) as error:
        raise type(error)(f"{place}: {error}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`'; did you mean ...?'` for the nearest known name, or one with that word in it, or `''`."""
    names = {one.lower(): one for one in known}
    nearest = [one for one in names if name.lower() in one.split("_")] or get_close_matches(
        name.lower(), names, n=1, cutoff=0.5
    )
    return f"; did you mean '{names[nearest[0]]}'?" if nearest else ""


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
        raise ConfigError(f"unknown {kind} {name!r}{did_you_mean(name, known)} (known: {names})")


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
            known = ", ".join(sorted(parameters)) or "none"
            hint = did_you_mean(name, parameters)
            place = f"{path}.{name}" if path else name
            raise ConfigError(f"{place}: unknown key{hint} (known: {known})")


def check_not_negative(**numbers: int | float) -> None:
    """Raises a `ConfigError` if a number, by its name, is negative, infinite or NaN."""
    for name, number in numbers.items():
        # Written so that NaN fails.
        if not 0 <= number < math.inf:
            raise ConfigError(f"{name}: expected a finite number >= 0, got {number}")


def check_positive(**numbers: int | float) -> None:
    """Raises a `ConfigError` if a number, by its name, is not above 0, infinite or NaN."""
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ConfigError(f"{name}: expected a finite number > 0, got {number}")


def check_at_least_1(**counts: int) -> None:
    """Raises a `ConfigError` if a count, by its name, is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name}: expected at least 1, got {count}")


def check_shape(what: str, found: Any, expected: Iterable[int]) -> None:
    """Raises a `ConfigError` if what a function of the user's gives is no tensor of a shape."""
    shape = getattr(found, "shape", None)
    if shape is None or tuple(shape) != tuple(expected):
        got = type(found).__name__ if shape is None else tuple(shape)
        raise ConfigError(f"{what}: expected a tensor of shape {tuple(expected)}, got {got}")


def check_same_tensors(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Checks that tensors have the names and shapes of others.

    Raises:
        ConfigError: One is missing, too many or of another shape; names the first.
    """
    for name in dict.fromkeys([*expected, *found]):
        wanted, got = (list(e[name].shape) if name in e else "none" for e in (expected, found))
        if wanted != got:
            raise ConfigError(f"{name}: expected {wanted}, found {got}")


def check_choice(known: Collection[str], **names: str) -> None:
    """As `check_name`, of values by their names."""
    for key, name in names.items():
        with errors_of(key):
            check_name(known, name, "name")
