"""Every classifier of torchvision that ends in a linear layer, as a network of this package."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mtkd_env.errors import ConfigError
from mtkd_env.networks.base import replace_input_convolution
from mtkd_env.networks.cut import CutNetwork, last_map_node, trace

PREFIX = "torchvision:"
# What torchvision's classifiers are made for.
IMAGE_SIZE = (224, 224)


def model_names() -> list[str]:
    """Names of torchvision's classifiers."""
    models = _models()
    return models.list_models(module=models)


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


def network(made: nn.Module, name: str, image_shape: Sequence[int]) -> CutNetwork:
    """The network of a classifier, cut at the last map, or tokens, that its pooling takes."""
    traced = trace(made, name)
    channels, *size = image_shape
    node = last_map_node(traced, (channels, *IMAGE_SIZE), name)
    return CutNetwork(traced, node, name, (channels, *(size or IMAGE_SIZE)))


def weight_names(model: str) -> list[str]:
    """Names of the weights that torchvision publishes for a model, such as `IMAGENET1K_V1`."""
    return [weights.name for weights in _models().get_model_weights(model)]


def download(model: str, weights: str) -> Mapping[str, Tensor]:
    """The `state_dict` of published weights, from torch's hub folder or the net."""
    return (
        _models().get_model_weights(model)[weights].get_state_dict(progress=True, check_hash=True)
    )


def accuracy_of(model: str, weights: str, class_names: Sequence[str]) -> float | None:
    """The accuracy on ImageNet that is published with weights; None for other classes."""
    about = _models().get_model_weights(model)[weights].meta
    if list(about.get("categories", ())) != list(class_names):
        return None
    percent: float | None = about.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
    return None if percent is None else percent / 100


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
