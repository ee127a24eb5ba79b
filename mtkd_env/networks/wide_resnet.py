"""Wide residual networks WRN-d-k (Zagoruyko and Komodakis, 2016), without dropout.

Their blocks are pre-activated: batch norm and ReLU come before each convolution.
"""

from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env.errors import ConfigError
from mtkd_env.networks import published
from mtkd_env.networks.base import Network, scaled, subsample


class WideResNet(Network):
    """Stem convolution, three groups of n blocks at strides 1, 2, 2, batch norm; depth 6n + 4.

    Args:
        depth: d, the number of layers with weights.
        widen: k, the factor on the channels 16, 32, 64 of the groups, not on the stem's 16.

    Raises:
        ConfigError: A depth that is not 6n + 4.
    """

    published_names = published.WIDE_RESNET

    def __init__(
        self,
        depth: int,
        widen: int,
        *,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if blocks < 1 or rest:
            raise ConfigError(f"depth: expected 6n + 4 (10, 16, 22, ...), found {depth}")
        channels = (16, 16 * widen, 32 * widen, 64 * widen)
        stem, first, second, third = (scaled(count, width) for count in channels)
        self.stem = nn.Conv2d(in_channels, stem, kernel_size=3, padding=1, bias=False)
        self.groups = nn.Sequential(
            _group(stem, first, blocks, stride=1),
            _group(first, second, blocks, stride=2),
            _group(second, third, blocks, stride=2),
        )
        self.activation = _norm_relu(third)
        self._classify_mean(third, num_classes)

    def features(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """Output of the third group, after the final batch norm and ReLU."""
        return self.activation(self.groups(self.stem(inputs)))


class _Block(nn.Module):
    """Two pre-activated convolutions beside a shortcut.

    The shortcut is the raw input, or, where the shape changes, a 1x1 convolution of the
    pre-activated input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.activation = _norm_relu(in_channels)
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            *_norm_relu(out_channels),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        )
        self.shortcut: nn.Module | None = None
        self.subsample = subsample(stride)
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """Residual plus shortcut."""
        activated = self.activation(inputs)
        if self.shortcut is None:
            return self.residual(activated) + inputs
        return self.residual(activated) + self.shortcut(self.subsample(activated))


def _norm_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def _group(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Blocks of one width; only the first changes width or resolution."""
    first = _Block(in_channels, out_channels, stride)
    rest = (_Block(out_channels, out_channels, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
