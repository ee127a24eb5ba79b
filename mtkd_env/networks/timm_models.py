"""Every classifier of timm as a network of this package; timm is optional."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mtkd_env.errors import ConfigError, errors_of
from mtkd_env.imports import optional
from mtkd_env.networks.foreign import ForeignNetwork

PREFIX = "timm:"

# Arguments by which timm reads weights, maybe with code in them.
WEIGHTS = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def _timm() -> Any:
    """The package, which takes seconds to import."""
    with errors_of("networks named 'timm:...'"):
        return optional("timm")


class TimmNetwork(ForeignNetwork):
    """A classifier of timm, in the two parts that timm gives every model; see `_measure`.

    Raises:
        ConfigError: The classifier cannot take such images.
    """

    def __init__(self, model: nn.Module, *, name: str, image_shape: Sequence[int]) -> None:
        super().__init__()
        self.model: Any = model
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        prefix = getattr(model, "num_prefix_tokens", None)
        self._measure(name, image_shape, channels_last=channels_last, prefix=prefix)

    def _last(self, inputs: Tensor) -> Tensor:
        return self.model.forward_features(inputs)

    def _classify(self, last: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.model.forward_head(last, pre_logits=True)
        classifier = self.model.get_classifier()
        if isinstance(classifier, nn.Linear):
            return feature, classifier(feature)
        # Several classifiers, as distilled transformers have, or one with a norm.
        return feature, self.model.forward_head(last)


def model_names() -> list[str]:
    """Names of timm's models, without those of their weights.

    Raises:
        ConfigError: timm is not installed.
    """
    return _timm().list_models()


def classifier(model: str, num_classes: int, in_channels: int, arguments: Mapping[str, Any]) -> Any:
    """A freshly initialised model, as timm has it.

    Raises:
        ConfigError: timm is not installed, or arguments that it does not take.
    """
    name = PREFIX + model
    for argument in WEIGHTS:
        if argument in arguments:
            raise ConfigError(f"{name}.{argument}: cannot be given; see a teacher's checkpoint")
    try:
        return _timm().create_model(
            model, pretrained=False, num_classes=num_classes, in_chans=in_channels, **arguments
        )
    except TypeError as error:
        raise ConfigError(f"'{name}': {error}") from error


def network(made: Any, name: str, image_shape: Sequence[int]) -> TimmNetwork:
    """The network of a classifier."""
    channels, *size = image_shape
    size = size or made.pretrained_cfg["input_size"][1:]
    return TimmNetwork(made, name=name, image_shape=(channels, *size))


def weight_names(model: str) -> list[str]:
    """Names of the weights that timm publishes for a model, such as `fb_in1k`."""
    return [name.partition(".")[2] for name in _timm().list_pretrained(f"{model}.*")]


def download(model: str, weights: str) -> Mapping[str, Tensor]:
    """The `state_dict` of published weights, from the hub's cache or the net."""
    return _timm().create_model(f"{model}.{weights}", pretrained=True).state_dict()


def accuracy_of(*_: object) -> None:
    """Of timm's weights no names of classes are known."""


def input_of(model: str, weights: str) -> Mapping[str, Any]:
    """What the images are like that published weights were trained on, by timm's configuration."""
    config = _timm().get_pretrained_cfg(f"{model}.{weights}")
    channels, *size = config.input_size
    return {
        "mean": tuple(config.mean),
        "std": tuple(config.std),
        "size": tuple(size),
        "interpolation": config.interpolation,
        "channels": {1: "gray", 3: "rgb"}[channels],
    }
