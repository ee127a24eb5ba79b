"""What every network of this package gives: logits, pooled feature and last feature map."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env.errors import ConfigError, check_positive
from mtkd_env.networks.published import Renaming, renamed
from mtkd_env.types import NetworkOutput


class Network(nn.Module, ABC):
    """An image classifier split at its last feature map.

    Networks of the table are made of what is said of each, and then by keyword of `num_classes`,
    `in_channels` of the images (3 by default) and `width`, a factor on all their channels.

    Attributes:
        num_classes: C, the number of logits.
        feature_dim: D, the width of the classifier's input.
        map_channels: K, the channels of the last feature map.
        signed_map: Whether the last feature map takes negative values; a regressor that imitates
            it must then not end in a ReLU.
        classifier: The last layer, of networks with the head that there is by default.
        published_names: What tensors are called in checkpoints that others publish.

    Raises:
        ConfigError: A width that is not positive, of a network of the table.
    """

    num_classes: int
    feature_dim: int
    map_channels: int
    signed_map: bool = False
    classifier: nn.Module
    published_names: ClassVar[Renaming] = {}

    @abstractmethod
    def features(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """Last feature map F of normalised images."""

    def head(self, feature_map: Float[Tensor, "B K H W"]) -> NetworkOutput:
        """Everything that follows the last feature map: the mean over its pixels, `classifier`."""
        feature = feature_map.mean(dim=(2, 3))
        return NetworkOutput(self.classifier(feature), feature, feature_map)

    def forward(self, inputs: Float[Tensor, "B K H W"]) -> NetworkOutput:
        """Logits, pooled feature and last feature map of normalised images."""
        return self.head(self.features(inputs))

    def native_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A `state_dict` from elsewhere, in the names that this network gives its tensors."""
        if self.state_dict().keys() <= state.keys():
            return state
        return {renamed(name, self.published_names): value for name, value in state.items()}

    def library_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A `state_dict` of this network, in the names that its own library gives its tensors."""
        return dict(state)

    def _classify_mean(self, channels: int, num_classes: int) -> None:
        """Adds what a network with the head that there is by default ends in, and draws weights."""
        self.num_classes = num_classes
        self.feature_dim = self.map_channels = channels
        self.classifier = nn.Linear(channels, num_classes)
        initialise_convolutions(self)


def scaled(channels: int, width: float, multiple: int = 1) -> int:
    """A channel count times a width factor, rounded to a multiple, of which it is at least one.

    Raises:
        ConfigError: `width` is not positive.
    """
    check_positive(width=width)
    return multiple * max(1, round(channels * width / multiple))


def check_fixed_width(width: float, name: str) -> None:
    """Raises a `ConfigError` unless the width factor of a network with given channels is 1."""
    if width != 1:
        raise ConfigError(
            f"width: '{name}' has a fixed width, expected 1, found {width}; a student's is set by "
            "--student.width"
        )


def replace_input_convolution(model: nn.Module, in_channels: int) -> None:
    """Gives a model another number of input channels by a new first convolution, in place."""
    name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if first.in_channels == in_channels:
        return
    same: Any = first  # Its sizes are tuples of any length to the checker.
    new = nn.Conv2d(
        in_channels,
        first.out_channels,
        same.kernel_size,
        same.stride,
        same.padding,
        bias=first.bias is not None,
    )
    model.set_submodule(name, new)


def subsample(stride: int) -> nn.Module:
    """Every so manieth row and column of a map, for a 1×1 convolution to see no other.

    The same as that convolution's own stride, and as fast. Torch 2.14 on CPUs, channels-last,
    writes beyond its memory in the backward pass of a strided 1×1 convolution of fewer than 16
    channels.
    """
    return nn.Identity() if stride == 1 else nn.AvgPool2d(1, stride)


def strides_safely(layer: nn.Module) -> bool:
    """Whether a layer is none of those that `subsample` is there for."""
    if not isinstance(layer, nn.Conv2d):
        return True
    return {*layer.kernel_size} != {1} or {*layer.stride} == {1} or layer.in_channels >= 16


def initialise_convolutions(module: nn.Module) -> None:
    """Draws the weights of every convolution by He et al. (2015): normal, scaled by the fan-out."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
