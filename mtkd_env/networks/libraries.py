"""Libraries whose classifiers are networks of this package, named `library:model`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from mtkd_env.errors import ConfigError, did_you_mean
from mtkd_env.networks import timm_models, torchvision_models
from mtkd_env.networks.base import Network


@dataclass(frozen=True)
class Library:
    """A library that networks come from.

    Attributes:
        model_names: Names of its classifiers.
        build: Makes one of them.
        classifier: Makes one as the library itself has it: its name, number of classes and of
            channels, and further arguments.
        weight_names: Names of the weights published for one of them.
        download: The `state_dict` of published weights.
        input_of: What the images are like that published weights were trained on: mean and std of
            their channels, size, interpolation, channels.
    """

    model_names: Callable[[], list[str]]
    build: Callable[..., Network]
    classifier: Callable[[str, int, int, Mapping[str, Any]], nn.Module]
    weight_names: Callable[[str], list[str]]
    download: Callable[[str, str], Mapping[str, Tensor]]
    input_of: Callable[[str, str], Mapping[str, Any]]


LIBRARIES: dict[str, Library] = {
    module.PREFIX.rstrip(":"): Library(
        module.model_names,
        module.build,
        module.classifier,
        module.weight_names,
        module.download,
        module.input_of,
    )
    for module in (torchvision_models, timm_models)
}


def library_model(library: str, model: str) -> Callable[..., Network]:
    """What makes a model of a library.

    Raises:
        ConfigError: The library has no such model, or is not installed.
    """
    names = LIBRARIES[library].model_names()
    if model in names:
        return partial(LIBRARIES[library].build, model)
    base, _, weights = model.partition(".")
    if base in names:
        raise ConfigError(
            f"unknown network '{library}:{model}'; the network is '{library}:{base}', and "
            f"'{weights}' may be the checkpoint of a teacher"
        )
    nearest = did_you_mean(f"{library}:{model}", [f"{library}:{name}" for name in names])
    raise ConfigError(f"unknown network '{library}:{model}'{nearest}")


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
        return LIBRARIES[library].download(model, weights)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{weights}: cannot download it: {error}") from error


def published_input(name: str, weights: str | None) -> Mapping[str, Any]:
    """What the images are like that a network's library has trained its weights on.

    Args:
        name: Name of the network.
        weights: Name of the weights.

    Returns:
        `mean`, `std`, `size`, `interpolation` and `channels`; nothing if there are no such weights.
    """
    library, _, model = name.partition(":")
    known = LIBRARIES[library].weight_names(model) if library in LIBRARIES and weights else []
    return LIBRARIES[library].input_of(model, weights) if weights in known else {}
