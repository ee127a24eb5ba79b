"""ShuffleNetV2 for small images (Ma et al., 2018), torchvision's with another stem.

The stem is a 1x1 convolution without stride, and no pooling follows it.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import ShuffleNetV2 as TorchvisionShuffleNetV2

from mtkd_env.networks.base import Network, pool_and_classify, scaled
from mtkd_env.types import NetworkOutput

REPEATS = (4, 8, 4)
X1_0 = (24, 116, 232, 464, 1024)
X0_5 = (24, 48, 96, 192, 1024)


class ShuffleNetV2(Network):
    """Stem, three stages of shuffled units that halve the resolution, a last 1x1 convolution.

    Args:
        channels: Channels of the stem, of the three stages and of the last convolution.
        num_classes: C, the number of logits.
        in_channels: Channels of the images.
        width: Factor on all of `channels`, rounded to even numbers: a unit splits them in half.

    Raises:
        ConfigError: A width that is not positive.
    """

    def __init__(
        self,
        channels: tuple[int, int, int, int, int] = X1_0,
        *,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
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

    def head(self, feature_map: Float[Tensor, "B K H W"]) -> NetworkOutput:
        """Global average pooling and a linear classifier."""
        return pool_and_classify(feature_map, self.classifier)
