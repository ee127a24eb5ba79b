"""Libraries whose classifiers are networks of this package, named `library:model`.

Each is a module with these functions: `model_names()`; `classifier(model, num_classes, in_channels,
arguments)`, one as the library itself has it; `network(made, name, image_shape)` of that, for
images of (K, H, W), or (K,) and the size that the library's own are made for; and of published
weights `weight_names(model)`, `download(model, weights)`, their `state_dict`, and `input_of(model,
weights)`: mean and std of the channels of the images that they were trained on, size,
interpolation, channels; and `accuracy_of(model, weights, class_names)`, that on images of classes
of these names, or None.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mtkd_env.errors import ConfigError, did_you_mean
from mtkd_env.networks import timm_models, torchvision_models
from mtkd_env.networks.base import Network, check_fixed_width

LIBRARIES: Mapping[str, Any] = {"torchvision": torchvision_models, "timm": timm_models}


def library_model(library: str, model: str) -> Callable[..., Network]:
    """What makes a model of a library.

    Raises:
        ConfigError: The library has no such model, or is not installed.
    """
    names = LIBRARIES[library].model_names()
    if model in names:
        return partial(_build, library, model)
    base, _, weights = model.partition(".")
    if base in names:
        raise ConfigError(
            f"unknown network '{library}:{model}'; the network is '{library}:{base}', and "
            f"'{weights}' may be the checkpoint of a teacher"
        )
    nearest = did_you_mean(f"{library}:{model}", [f"{library}:{name}" for name in names])
    raise ConfigError(f"unknown network '{library}:{model}'{nearest}")


def _build(
    library: str,
    model: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    width: float = 1.0,
    image_size: tuple[int, int] | None = None,
    **arguments: Any,
) -> Network:
    """A freshly initialised classifier; `arguments` are further ones of the library's own."""
    name = f"{library}:{model}"
    check_fixed_width(width, name)
    made = LIBRARIES[library].classifier(model, num_classes, in_channels, arguments)
    return LIBRARIES[library].network(made, name, (in_channels, *(image_size or ())))


def published_weights(name: str, weights: str) -> Mapping[str, Tensor]:
    """The `state_dict` of weights that a network's library publishes, such as `IMAGENET1K_V1`.

    Args:
        name: Name of the network.
        weights: Name of the weights.

    Raises:
        ConfigError: There are no weights of that name, or they cannot be downloaded.
    """
    library, _, model = name.partition(":")
    known = LIBRARIES[library].weight_names(model) if library in LIBRARIES else []
    if weights not in known:
        published = f" (published for '{name}': {', '.join(known)})" if known else ""
        raise ConfigError(f"{weights}: no such checkpoint{published}")
    try:
        found: Mapping[str, Tensor] = LIBRARIES[library].download(model, weights)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{weights}: cannot download it: {error}") from error
    return found


def published_input(name: str, weights: str | None) -> Mapping[str, Any]:
    """What the images are like that a network's library has trained its weights on.

    Returns:
        `mean`, `std`, `size`, `interpolation` and `channels`; nothing if there are no such weights.
    """
    return _of_published("input_of", name, weights) or {}


def published_accuracy(name: str, weights: str | None, class_names: Sequence[str]) -> float | None:
    """The accuracy that a network's library publishes with its weights, as a share.

    Args:
        name: Name of the network.
        weights: Name of the weights.
        class_names: Those of the images; None is published for others.
    """
    return _of_published("accuracy_of", name, weights, class_names)


def _of_published(what: str, name: str, weights: str | None, *arguments: Any) -> Any:
    """What a function of a network's library says of weights; None if they are not published."""
    library, _, model = name.partition(":")
    known = LIBRARIES[library].weight_names(model) if library in LIBRARIES and weights else []
    if weights not in known:
        return None
    return getattr(LIBRARIES[library], what)(model, weights, *arguments)
