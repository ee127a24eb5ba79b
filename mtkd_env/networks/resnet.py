"""Residual networks for small images (He et al., 2016, section 4.2), from torchvision's block.

Unlike the paper's, their shortcuts are projections wherever stride or width changes, as in the
networks that distillation papers compare on CIFAR.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from mtkd_env.errors import ConfigError
from mtkd_env.networks.base import Network, initialise_convolutions, pool_and_classify, scaled
from mtkd_env.types import NetworkOutput

NARROW = (16, 16, 32, 64)
DOUBLE = (16, 32, 64, 128)
WIDE = (32, 64, 128, 256)


class ResNet(Network):
    """Stem convolution and three stages of n basic blocks at strides 1, 2, 2; depth 6n + 2.

    Args:
        depth: Number of layers with weights, shortcuts not counted.
        channels: Channels of the stem and of the three stages.
        num_classes: C, the number of logits.
        in_channels: Channels of the images.
        width: Factor on all of `channels`.

    Raises:
        ConfigError: A depth that is not 6n + 2, or a width that is not positive.
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
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ConfigError(f"depth: expected 6n + 2 (8, 14, 20, ...), found {depth}")
        stem, first, second, third = (scaled(count, width) for count in channels)
        self.num_classes = num_classes
        self.feature_dim = self.map_channels = third
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, stem, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.Sequential(
            _stage(stem, first, blocks, stride=1),
            _stage(first, second, blocks, stride=2),
            _stage(second, third, blocks, stride=2),
        )
        self.classifier = nn.Linear(third, num_classes)
        initialise_convolutions(self)

    def features(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """Output of the third stage, after its last ReLU."""
        return self.stages(self.stem(inputs))

    def head(self, feature_map: Float[Tensor, "B K H W"]) -> NetworkOutput:
        """Global average pooling and a linear classifier."""
        return pool_and_classify(feature_map, self.classifier)


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Basic blocks of one width; only the first has a stride, and a projection if it needs one."""
    projection = None
    if stride != 1 or in_channels != out_channels:
        projection = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )
    first = BasicBlock(in_channels, out_channels, stride, projection)
    return nn.Sequential(
        first, *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1))
    )
