"""The user's own networks, by the name of their module and class."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from mtkd_env.errors import ConfigError, check_arguments
from mtkd_env.imports import import_name, is_dependency, package_of
from mtkd_env.networks.base import Network, check_fixed_width
from mtkd_env.networks.cut import CutNetwork, check_layer, layer_node, trace
from mtkd_env.networks.hooked import HookedNetwork

# The digits' size and CIFAR's are the rule for networks that do not say theirs.
IMAGE_SIZE = (32, 32)

EXPECTED = "a class of nn.Module or a function of num_classes that makes one"


def load(name: str) -> Callable[..., Network]:
    """Makes the network that `module:Class` or `module:Class@layer` names.

    The class, or function, is called with those of `num_classes` and `in_channels` that its
    signature has, and with a `width` other than 1. What is no `Network` needs the name of its last
    feature layer.

    Raises:
        ConfigError: It cannot be imported, or makes no network.
    """
    path, _, layer = name.partition("@")
    target = import_name(path, _makes_networks, EXPECTED)
    return partial(_build, name, target, layer or None)


def _makes_networks(target: Any) -> bool:
    """Whether something makes networks, as far as can be told without calling it.

    Functions of libraries do more than that, such as reading files that an argument names.
    """
    if isinstance(target, type):
        return issubclass(target, nn.Module)
    module = getattr(target, "__module__", None)
    if not callable(target) or module is None or is_dependency(package_of(module)):
        return False
    try:
        return "num_classes" in inspect.signature(target).parameters
    except ValueError:
        return False


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
    parameters = signature.parameters
    check_arguments(target, arguments, name)
    common: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    common = {key: value for key, value in common.items() if key in parameters}
    if "width" not in parameters:
        check_fixed_width(width, name)
    elif width != 1:
        common["width"] = width
    try:
        signature.bind(**common, **arguments)
    except TypeError as error:
        raise ConfigError(f"'{name}' cannot be made: {error}") from error
    shape = (in_channels, *(image_size or IMAGE_SIZE))
    network = _as_network(name, target(**common, **arguments), layer, num_classes, shape)
    if network.num_classes != num_classes:
        raise ConfigError(
            f"'{name}' has {network.num_classes} classes, the images have {num_classes}"
        )
    return network


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
            f"'{name}' is no mtkd_env.networks.Network; name its last feature layer behind an @ "
            f"(outermost: {', '.join(outermost)})"
        )
    check_layer(model, layer, name)
    try:
        traced = trace(model, name, layer)
        return CutNetwork(traced, layer_node(traced, layer, name), name, image_shape)
    # Flags, several outputs, or a forward that is another one in training.
    except ConfigError:
        return HookedNetwork(model, layer, num_classes, name, image_shape)
