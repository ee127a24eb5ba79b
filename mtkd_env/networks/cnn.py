"""Three strided convolutions: a network for studies of many runs, a second of CPU time an epoch."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env.networks.base import Network, scaled

CHANNELS = (16, 32, 64)


class CNN(Network):
    """3x3 convolutions of stride 2, each with a batch norm and a ReLU; mean and linear classifier.

    Args:
        channels: Channels of each convolution.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = CHANNELS,
        *,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise([in_channels, *(scaled(one, width) for one in channels)]):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers)
        self._classify_mean(after, num_classes)

    def features(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """Output of the last convolution, after its ReLU."""
        return self.body(inputs)
