"""Every classifier of torchvision that ends in a linear layer, as a network of this package."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mtkd_env.errors import ConfigError
from mtkd_env.networks.base import check_fixed_width, replace_input_convolution
from mtkd_env.networks.cut import CutNetwork, last_map_node, trace

PREFIX = "torchvision:"
# What torchvision's classifiers are made for.
IMAGE_SIZE = (224, 224)


def model_names() -> list[str]:
    """Names of torchvision's classifiers."""
    models = _models()
    names: list[str] = models.list_models(module=models)
    return names


def build(
    model: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    width: float = 1.0,
    image_size: tuple[int, int] | None = None,
    **arguments: Any,
) -> CutNetwork:
    """A freshly initialised classifier, cut at the last map, or tokens, that its pooling takes.

    Args:
        model: Name in torchvision.
        num_classes: C, the number of logits.
        in_channels: Channels of the images; other than 3, the first convolution is a new one.
        width: 1: the channels are torchvision's.
        image_size: Height and width of the images.
        arguments: Further arguments of torchvision's constructor.

    Raises:
        ConfigError: Another width, arguments that torchvision does not take, images of a size that
            the model does not take, or a model that cannot be cut.
    """
    name = PREFIX + model
    check_fixed_width(width, name)
    traced = trace(classifier(model, num_classes, in_channels, arguments), name)
    node = last_map_node(traced, (in_channels, *IMAGE_SIZE), name)
    shape = (in_channels, *(image_size or IMAGE_SIZE))
    return CutNetwork(traced, node, name, shape)


def classifier(
    model: str, num_classes: int, in_channels: int, arguments: Mapping[str, Any]
) -> nn.Module:
    """A freshly initialised model, as torchvision has it but for the channels of its images.

    Raises:
        ConfigError: Arguments that torchvision does not take.
    """
    try:
        made = _models().get_model(model, weights=None, num_classes=num_classes, **arguments)
    except TypeError as error:
        raise ConfigError(f"'{PREFIX}{model}': {error}") from error
    replace_input_convolution(made, in_channels)
    return made


def weight_names(model: str) -> list[str]:
    """Names of the weights that torchvision publishes for a model, such as `IMAGENET1K_V1`."""
    return [weights.name for weights in _models().get_model_weights(model)]


def download(model: str, weights: str) -> Mapping[str, Tensor]:
    """The `state_dict` of published weights, from torch's hub folder or the net."""
    state: Mapping[str, Tensor] = (
        _models().get_model_weights(model)[weights].get_state_dict(progress=True, check_hash=True)
    )
    return state


def _models() -> Any:
    """Torchvision's models, imported when they are asked for: half a second of processor time."""
    from torchvision import models

    return models


def input_of(model: str, weights: str) -> Mapping[str, Any]:
    """What the images are like that published weights were trained on, by their transforms."""
    view = _models().get_model_weights(model)[weights].transforms()
    return {
        "mean": tuple(view.mean),
        "std": tuple(view.std),
        "size": view.crop_size[0],
        "interpolation": view.interpolation.value,
        "channels": "rgb",
    }
