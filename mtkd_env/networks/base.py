"""What every network of this package gives: logits, pooled feature and last feature map."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env.errors import ConfigError
from mtkd_env.types import NetworkOutput


class Network(nn.Module, ABC):
    """An image classifier split at its last feature map.

    Attributes:
        num_classes: C, the number of logits.
        feature_dim: D, the width of the classifier's input.
        map_channels: K, the channels of the last feature map.
        signed_map: Whether the last feature map takes negative values; a regressor that imitates
            it must then not end in a ReLU.
    """

    num_classes: int
    feature_dim: int
    map_channels: int
    signed_map: bool = False

    @abstractmethod
    def features(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """Last feature map F of normalised images."""

    @abstractmethod
    def head(self, feature_map: Float[Tensor, "B K H W"]) -> NetworkOutput:
        """Everything that follows the last feature map: pooling and classifier."""

    def forward(self, inputs: Float[Tensor, "B K H W"]) -> NetworkOutput:
        """Logits, pooled feature and last feature map of normalised images."""
        return self.head(self.features(inputs))


def pool_and_classify(
    feature_map: Float[Tensor, "B K H W"], classifier: nn.Module
) -> NetworkOutput:
    """Head of the networks whose feature is the mean of the last feature map over its pixels."""
    feature = feature_map.mean(dim=(2, 3))
    return NetworkOutput(logits=classifier(feature), feature=feature, feature_map=feature_map)


def scaled(channels: int, width: float) -> int:
    """A channel count times a width factor, rounded, at least one.

    Raises:
        ConfigError: `width` is not positive.
    """
    if not width > 0:
        raise ConfigError(f"width: expected a positive factor, found {width}")
    return max(1, round(channels * width))


def initialise_convolutions(module: nn.Module) -> None:
    """Draws the weights of every convolution by He et al. (2015): normal, scaled by the fan-out."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
