"""MobileNetV2 for small images (Sandler et al., 2018), torchvision's with another block.

The second stage has no stride, so that 32x32 images come out at 2x2. As in the networks that
distillation papers compare on CIFAR, every block has its expansion, even by a factor of 1, and
every activation is a plain ReLU.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env.errors import check_positive
from mtkd_env.networks import published
from mtkd_env.networks.base import Network, initialise_convolutions, replace_input_convolution
from mtkd_env.types import NetworkOutput

# Expansion, channels, blocks and stride of each stage.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(Network):
    """Stem, inverted residuals down to a linear bottleneck, a last 1x1 convolution.

    The feature map is the linear bottleneck, which takes negative values; the last convolution is
    a part of the head; at a width below 1 it keeps its 1280 channels.
    """

    signed_map = True
    published_names = published.MOBILENET_V2

    def __init__(self, *, num_classes: int, in_channels: int = 3, width: float = 1.0) -> None:
        from torchvision.models import MobileNetV2 as TorchvisionMobileNetV2

        super().__init__()
        check_positive(width=width)
        model = TorchvisionMobileNetV2(
            num_classes,
            width_mult=width,
            inverted_residual_setting=[list(stage) for stage in STAGES],
            round_nearest=1,
            block=_block,
            dropout=0.0,
        )
        replace_input_convolution(model, in_channels)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.ReLU6):
                model.set_submodule(name, nn.ReLU(inplace=True))
        initialise_convolutions(model)
        self.num_classes = num_classes
        self.feature_dim = model.last_channel
        self.map_channels = model.features[-2].out_channels
        self.stages = model.features[:-1]
        self.last = model.features[-1]
        self.classifier = model.classifier[-1]

    def features(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """Output of the last inverted residual, after its batch norm."""
        return self.stages(inputs)

    def head(self, feature_map: Float[Tensor, "B K H W"]) -> NetworkOutput:
        """The last convolution, global average pooling and a linear classifier."""
        feature = self.last(feature_map).mean(dim=(2, 3))
        return NetworkOutput(self.classifier(feature), feature, feature_map)


def _block(inp: int, oup: int, stride: int, expand_ratio: int, norm_layer: Any = None) -> nn.Module:
    """Torchvision's block, which leaves an expansion by 1 out, with it."""
    from torchvision.models.mobilenetv2 import InvertedResidual
    from torchvision.ops import Conv2dNormActivation

    block: nn.Module = InvertedResidual(inp, oup, stride, expand_ratio, norm_layer)
    if expand_ratio == 1:
        expansion = Conv2dNormActivation(inp, inp, kernel_size=1, norm_layer=norm_layer)
        block.conv = nn.Sequential(expansion, *block.get_submodule("conv").children())
    return block
