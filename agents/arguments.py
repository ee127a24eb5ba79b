"""Which values the arguments of this package's agents may have."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from mtkd_env.errors import ConfigError, check_name

# Checks a value, given its name for the message.
Check = Callable[[str, Any], None]


def check_values(checks: Mapping[str, Check], values: Mapping[str, Any], path: str = "") -> None:
    """Checks those values that there is a check for.

    Args:
        checks: Check of each argument.
        values: The arguments' values.
        path: What an argument is named after in messages, with the dot.

    Raises:
        ConfigError: A value that cannot be used.
    """
    for name, value in values.items():
        if name in checks:
            checks[name](f"{path}{name}", value)


def at_least_1(name: str, count: int | None) -> None:
    """Checks a count; None stands for no limit.

    Raises:
        ConfigError: It is below 1.
    """
    if count is not None and count < 1:
        raise ConfigError(f"{name}: expected at least 1, got {count}")


def at_least_0(name: str, number: float) -> None:
    """Checks a number that may be 0.

    Raises:
        ConfigError: It is negative, infinite or NaN.
    """
    # Written so that NaN fails, here and below.
    if not 0 <= number < math.inf:
        raise ConfigError(f"{name}: expected a number >= 0, got {number}")


def above_0(name: str, number: float) -> None:
    """Checks a number that may not be 0.

    Raises:
        ConfigError: It is 0, negative, infinite or NaN.
    """
    if not 0 < number < math.inf:
        raise ConfigError(f"{name}: expected a number > 0, got {number}")


def below_1(name: str, number: float) -> None:
    """Checks a factor that something shrinks by.

    Raises:
        ConfigError: It is outside [0, 1).
    """
    if not 0 <= number < 1:
        raise ConfigError(f"{name}: expected a number in [0, 1), got {number}")


def among(known: Collection[str], kind: str) -> Check:
    """A check that a name is among the known ones.

    Args:
        known: All names.
        kind: What they are names of.
    """

    def check(_: str, name: str) -> None:
        check_name(known, name, kind)

    return check
