"""RegNets for small images (Radosavovic et al., 2020), from torchvision's stages.

The networks that distillation papers call RegNetX-200MF, X-400MF and Y-400MF on CIFAR are not those
of the RegNet paper: their stem keeps the resolution, only the last two stages halve it, and the
"Y-400MF" is the X-400MF with squeeze-and-excitation.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env.networks.base import Network, scaled

STEM_CHANNELS = 64
STRIDES = (1, 1, 2, 2)


@dataclass(frozen=True)
class RegNetShape:
    """The four stages of a RegNet.

    Attributes:
        depths: Blocks of each stage.
        channels: Channels of each stage.
        group_width: Channels in a group of the 3x3 convolutions.
        squeeze: Width of the squeeze relative to the block's input; none without it.
    """

    depths: tuple[int, int, int, int]
    channels: tuple[int, int, int, int]
    group_width: int
    squeeze: float | None = None


X_200MF = RegNetShape((1, 1, 4, 7), (24, 56, 152, 368), group_width=8)
X_400MF = RegNetShape((1, 2, 7, 12), (32, 64, 160, 384), group_width=16)
Y_400MF = RegNetShape((1, 2, 7, 12), (32, 64, 160, 384), group_width=16, squeeze=0.25)


class RegNet(Network):
    """Stem convolution and four stages of grouped bottlenecks at strides 1, 1, 2, 2.

    Channels, the stem's included, are rounded to whole groups.
    """

    def __init__(
        self, shape: RegNetShape, *, num_classes: int, in_channels: int = 3, width: float = 1.0
    ) -> None:
        from torchvision.models.regnet import BlockParams
        from torchvision.models.regnet import RegNet as TorchvisionRegNet
        from torchvision.ops import Conv2dNormActivation

        super().__init__()
        channels = [scaled(count, width, shape.group_width) for count in shape.channels]
        blocks = BlockParams(
            depths=list(shape.depths),
            widths=channels,
            group_widths=[shape.group_width] * len(channels),
            bottleneck_multipliers=[1.0] * len(channels),
            strides=list(STRIDES),
            se_ratio=shape.squeeze,
        )

        def stem(_channels: int, out_channels: int, *layers: Any) -> nn.Module:
            norm, activation = layers
            return Conv2dNormActivation(
                in_channels, out_channels, norm_layer=norm, activation_layer=activation
            )

        stem_width = scaled(STEM_CHANNELS, width, shape.group_width)
        model = TorchvisionRegNet(
            blocks, num_classes=num_classes, stem_width=stem_width, stem_type=stem
        )
        self.num_classes = num_classes
        self.feature_dim = self.map_channels = channels[-1]
        self.stem = model.stem
        self.stages = model.trunk_output
        self.classifier = model.fc

    def features(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """Output of the fourth stage, after its last ReLU."""
        return self.stages(self.stem(inputs))
