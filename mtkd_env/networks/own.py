"""The user's own networks, as objects or by the name of their module and class."""

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

from torch import nn

from mtkd_env.errors import ConfigError, check_arguments
from mtkd_env.imports import PROJECT, Named, import_name, is_users, name_of, package_of
from mtkd_env.networks.base import Network, check_fixed_width
from mtkd_env.networks.cut import CutNetwork, check_layer, layer_node, trace
from mtkd_env.networks.hooked import HookedNetwork

# The digits' size and CIFAR's are the rule for networks that do not say theirs.
IMAGE_SIZE = (32, 32)

# What says of a maker of networks that they are copies of one, weights included.
COPIES = "copies"

EXPECTED = "a class of nn.Module or a function of num_classes that makes one, or such a module"


def load(given: Named) -> Callable[..., Network]:
    """Makes the network that an object stands for, or `module:Name`, or `module:Name@layer`.

    A class, or function, is called with those of `num_classes` and `in_channels` that its signature
    has, and with a `width` other than 1. One that names no `num_classes` but takes any keyword, as
    factories do, is given it, and `in_channels` other than 3. Of a module that has been made
    already, each network is a copy, weights included. What is no `Network` needs the name of its
    last feature layer: behind an @, or by `cut_at`.

    Raises:
        ConfigError: It cannot be imported, or makes no network.
    """
    if not isinstance(given, str):
        return cut_at(given)
    path, _, layer = given.partition("@")
    return cut_at(import_name(path, _makes_networks, EXPECTED), layer or None, given)


def cut_at(found: Any, layer: str | None = None, name: str | None = None) -> Callable[..., Network]:
    """Makes networks of a class, a function or a module, with the name of the last feature layer.

    Args:
        found: What makes them.
        layer: Name of the layer, as in `named_modules()`.
        name: What errors call it.

    Raises:
        ConfigError: Something else.
    """
    if isinstance(found, partial) and found.func is _build:
        return found
    if not _makes_networks(found):
        raise ConfigError(f"network: expected a name, or {EXPECTED}, got {found!r}")
    name = name or name_of(found) + (f"@{layer}" if layer else "")
    target = _copies(found) if isinstance(found, nn.Module) else found
    made = partial(_build, name, target, layer)
    # So that records can say what it is.
    vars(made).update(__module__=target.__module__, __qualname__=name.rpartition(":")[2])
    vars(made)[COPIES] = target is not found
    return made


def _copies(model: nn.Module) -> Callable[[], nn.Module]:
    """Makes copies of a module."""

    def copy() -> nn.Module:
        return deepcopy(model)

    copy.__module__ = type(model).__module__
    return copy


def _makes_networks(target: Any) -> bool:
    """Whether something makes networks, as far as can be told without calling it.

    Functions of libraries do more than that, such as reading files that an argument names.
    """
    if isinstance(target, nn.Module):
        return True
    if isinstance(target, type):
        return issubclass(target, nn.Module)
    if not is_users(target):
        return False
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        return False
    # Functions of the project take any keyword for other ends.
    project = package_of(target.__module__) in PROJECT
    return "num_classes" in parameters or (_takes_any(parameters) and not project)


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a signature takes any keyword, and nothing but keywords in any number."""
    kinds = {one.kind for one in parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds


def _build(
    name: str,
    target: Callable[..., Any],
    layer: str | None,
    *,
    num_classes: int,
    in_channels: int = 3,
    width: float = 1.0,
    image_size: tuple[int, int] | None = None,
    **arguments: Any,
) -> Network:
    signature = inspect.signature(target)
    check_arguments(target, arguments, name)
    common = _common(signature.parameters, num_classes, in_channels, width, name)
    try:
        signature.bind(**common, **arguments)
        made = target(**common, **arguments)
    except TypeError as error:
        raise ConfigError(f"'{name}' cannot be made: {error}") from error
    shape = (in_channels, *(image_size or IMAGE_SIZE))
    network = _as_network(name, made, layer, num_classes, shape)
    if network.num_classes != num_classes:
        raise ConfigError(
            f"'{name}' has {network.num_classes} classes, the images have {num_classes}"
        )
    return network


def _common(
    parameters: Mapping[str, inspect.Parameter],
    num_classes: int,
    in_channels: int,
    width: float,
    name: str,
) -> dict[str, Any]:
    """What every network is told, as far as its maker takes it; see `load`."""
    common: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    if "num_classes" not in parameters and _takes_any(parameters):
        given = {"num_classes"} | ({"in_channels"} if in_channels != 3 else set())
    else:
        given = common.keys() & parameters.keys()
    common = {key: common[key] for key in given}
    if "width" not in parameters:
        check_fixed_width(width, name)
    elif width != 1:
        common["width"] = width
    return common


def _as_network(
    name: str,
    model: Any,
    layer: str | None,
    num_classes: int,
    image_shape: tuple[int, int, int],
) -> Network:
    if isinstance(model, Network):
        if layer is not None:
            raise ConfigError(f"'{name}': a Network knows its feature layer; drop '@{layer}'")
        return model
    if not isinstance(model, nn.Module):
        raise ConfigError(f"'{name}' gives a {type(model).__name__}, expected an nn.Module")
    if layer is None:
        outermost = [child for child, _ in model.named_children()]
        raise ConfigError(
            f"'{name}' is no mtkd_env.networks.Network; name its last feature layer behind an @, "
            f"or by mtkd_env.networks.cut_at (outermost: {', '.join(outermost)})"
        )
    check_layer(model, layer, name)
    try:
        traced = trace(model, name, layer)
        return CutNetwork(traced, layer_node(traced, layer, name), name, image_shape)
    # Flags, several outputs, or a forward that is another one in training.
    except ConfigError:
        return HookedNetwork(model, layer, num_classes, name, image_shape)
