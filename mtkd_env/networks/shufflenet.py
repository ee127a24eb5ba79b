"""ShuffleNetV1 (Zhang et al., 2018) and V2 (Ma et al., 2018; torchvision's) for small images.

The stem is a 1x1 convolution without stride, and no pooling follows it.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mtkd_env.networks import published
from mtkd_env.networks.base import Network, scaled

REPEATS = (4, 8, 4)
X1_0 = (24, 116, 232, 464, 1024)
X0_5 = (24, 48, 96, 192, 1024)

# Of V1: the channels of its stem and stages, the groups of its 1x1 convolutions.
V1_CHANNELS = (24, 240, 480, 960)
GROUPS = 3
# What the channels of a V1 unit are a multiple of, so that groups and a quarter of them are whole.
V1_MULTIPLE = 4 * GROUPS


class ShuffleNetV1(Network):
    """Stem and three stages of units with grouped 1x1 convolutions, which halve the resolution.

    As in the networks that distillation papers compare on CIFAR, a ReLU also follows the 3x3
    convolution of a unit, and the first grouped convolution of all is not grouped. Channels are
    rounded to multiples of 12.
    """

    published_names = published.RESNET

    def __init__(self, *, num_classes: int, in_channels: int = 3, width: float = 1.0) -> None:
        from torchvision.ops import Conv2dNormActivation

        super().__init__()
        stem, *stages = (scaled(count, width, V1_MULTIPLE) for count in V1_CHANNELS)
        self.stem = Conv2dNormActivation(in_channels, stem, kernel_size=1)
        self.stages = nn.Sequential()
        before = stem
        for number, (wanted, count) in enumerate(zip(stages, REPEATS, strict=True)):
            # So that something stands beside the pooled.
            channels = max(wanted, before + V1_MULTIPLE)
            first = _Unit(before, channels, stride=2, groups=GROUPS if number else 1)
            rest = (_Unit(channels, channels, stride=1, groups=GROUPS) for _ in range(count - 1))
            self.stages.append(nn.Sequential(first, *rest))
            before = channels
        self._classify_mean(before, num_classes)

    def features(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """Output of the last stage, after its ReLU."""
        return self.stages(self.stem(inputs))


class _Unit(nn.Module):
    """A unit of V1: its residual is added to its input, or at stride 2 stands before the pooled."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        out = out_channels - in_channels if stride == 2 else out_channels
        inner = out // 4
        self.groups, self.stride = groups, stride
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(out)

    def forward(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """Residual and shortcut, behind a ReLU."""
        squeezed = functional.relu(self.bn1(self.conv1(inputs)))
        shuffled = functional.channel_shuffle(squeezed, self.groups)
        residual = self.bn3(self.conv3(functional.relu(self.bn2(self.conv2(shuffled)))))
        if self.stride == 1:
            return functional.relu(residual + inputs)
        pooled = functional.avg_pool2d(inputs, 3, stride=2, padding=1)
        return functional.relu(torch.cat([residual, pooled], dim=1))


class ShuffleNetV2(Network):
    """Stem, three stages of shuffled units that halve the resolution, a last 1x1 convolution.

    Args:
        channels: Channels of the stem, of the three stages and of the last convolution; rounded to
            even numbers, as a unit splits them in half.
    """

    published_names = published.SHUFFLENET_V2

    def __init__(
        self,
        channels: tuple[int, int, int, int, int] = X1_0,
        *,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        from torchvision.models import ShuffleNetV2 as TorchvisionShuffleNetV2

        super().__init__()
        counts = [scaled(count, width, multiple=2) for count in channels]
        model = TorchvisionShuffleNetV2(list(REPEATS), counts, num_classes=num_classes)
        self.num_classes = num_classes
        self.feature_dim = self.map_channels = counts[-1]
        convolution = nn.Conv2d(in_channels, counts[0], kernel_size=1, bias=False)
        self.stem = nn.Sequential(convolution, *model.conv1[1:])
        self.stages = nn.Sequential(model.stage2, model.stage3, model.stage4)
        self.last = model.conv5
        self.classifier = model.fc

    def features(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """Output of the last convolution, after its ReLU."""
        return self.last(self.stages(self.stem(inputs)))
