"""The tests' check of all signatures of `mtkd_env`: what jaxtyping does, with less ado.

jaxtyping binds the arguments of every call to the signature and checks them twice, before the call
and with what it returns. That was most of what small tensors cost.
"""

from collections.abc import Callable
from functools import wraps
from inspect import isgeneratorfunction
from types import FunctionType
from typing import Any, get_type_hints

import jaxtyping
from beartype import beartype

AXES = jaxtyping.jaxtyped("context")


def jaxtyped(function: Any = None, /, **options: Any) -> Any:
    """Takes the place of `jaxtyping.jaxtyped`, which keeps classes, properties and generators."""
    if function is None:
        return lambda decorated: _checked(decorated, options)
    return AXES if isinstance(function, str) else _checked(function, options)


def _checked(function: Any, options: dict[str, Any], full: Any = jaxtyping.jaxtyped) -> Any:
    hints = _hints(function)
    if hints is None:
        return full(**options)(function)
    function.__annotations__ = hints
    return _with_switch(function, beartype(function))


def _hints(function: Any) -> dict[str, Any] | None:
    """Annotations with all names looked up; none where that cannot be, or is not all there is."""
    if not isinstance(function, FunctionType) or isgeneratorfunction(function):
        return None
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        return None


def _with_switch(plain: Callable[..., Any], typed: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return plain(*args, **kwargs)
        with AXES:  # Axes of one name are of one length, from the arguments to what is returned.
            return typed(*args, **kwargs)

    return checked
