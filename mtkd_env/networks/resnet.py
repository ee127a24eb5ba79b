"""Residual networks for small images (He et al., 2016, section 4.2), from torchvision's blocks.

Unlike the paper's, their shortcuts are projections wherever stride or width changes, as in the
networks that distillation papers compare on CIFAR.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env.errors import ConfigError
from mtkd_env.networks import published
from mtkd_env.networks.base import Network, scaled, subsample

NARROW = (16, 16, 32, 64)
DOUBLE = (16, 32, 64, 128)
WIDE = (32, 64, 128, 256)
FOUR_STAGES = (64, 64, 128, 256, 512)


class ResidualNetwork(Network):
    """Stem convolution and stages of residual blocks, at stride 1 and from the second on at 2.

    Args:
        block: Torchvision's class of them, `BasicBlock` or `Bottleneck`.
        blocks: Their number in each stage.
        channels: Channels of the stem and of the stages, without a block's own expansion.
    """

    published_names = published.RESNET

    def __init__(
        self,
        block: str,
        blocks: Sequence[int],
        channels: Sequence[int],
        *,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        from torchvision.models import resnet
        from torchvision.ops import Conv2dNormActivation

        super().__init__()
        kind = getattr(resnet, block)
        stem, *inner = (scaled(count, width) for count in channels)
        outer = [stem, *(count * kind.expansion for count in inner)]
        self.stem = Conv2dNormActivation(in_channels, stem)
        stages = zip(outer, inner, blocks, strict=False)  # the last of `outer` feeds none
        self.stages = nn.Sequential(
            *(_stage(kind, *stage, 2 if number else 1) for number, stage in enumerate(stages))
        )
        self._classify_mean(outer[-1], num_classes)

    def features(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """Output of the last stage, after its last ReLU."""
        return self.stages(self.stem(inputs))


class ResNet(ResidualNetwork):
    """Three stages of n basic blocks; depth 6n + 2.

    Args:
        depth: Number of layers with weights, shortcuts not counted.
        channels: Channels of the stem and of the three stages.

    Raises:
        ConfigError: A depth that is not 6n + 2.
    """

    def __init__(
        self,
        depth: int,
        channels: tuple[int, int, int, int] = NARROW,
        *,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ConfigError(f"depth: expected 6n + 2 (8, 14, 20, ...), found {depth}")
        given = {"num_classes": num_classes, "in_channels": in_channels}
        super().__init__("BasicBlock", (blocks,) * 3, channels, **given, width=width)


# That of ImageNet, with the stem and the stride of the first stage for small images.
ResNet50 = partial(ResidualNetwork, "Bottleneck", (3, 4, 6, 3), FOUR_STAGES)


def _stage(block: Any, in_channels: int, inner: int, blocks: int, stride: int) -> nn.Sequential:
    """Blocks of one width; only the first has a stride, and a projection if it needs one."""
    out_channels = inner * block.expansion
    projection = None
    if stride != 1 or in_channels != out_channels:
        # The tensors' names are those of published files.
        layers = {
            "subsample": subsample(stride),
            "0": nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
            "1": nn.BatchNorm2d(out_channels),
        }
        projection = nn.Sequential(OrderedDict(layers))
    first = block(in_channels, inner, stride, projection)
    return nn.Sequential(first, *(block(out_channels, inner) for _ in range(blocks - 1)))
