"""VGG networks for small images (Simonyan and Zisserman, 2015), from torchvision's layers.

With batch norms, global average pooling and one linear layer, and only three of the five poolings.
"""

from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env.networks import published
from mtkd_env.networks.base import Network, replace_input_convolution, scaled

CHANNELS = (64, 128, 256, 512, 512)
POOLED_STAGES = 3


class VGG(Network):
    """Five stages of 3x3 convolutions, each with a batch norm and a ReLU.

    The resolution is halved behind each of the first three stages.

    Args:
        repeats: The convolutions of each stage.
    """

    published_names = published.VGG

    def __init__(
        self,
        repeats: tuple[int, int, int, int, int],
        *,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        from torchvision.models.vgg import make_layers

        super().__init__()
        self.stages = nn.Sequential()
        before = in_channels
        for number, (count, channels) in enumerate(zip(repeats, CHANNELS, strict=True)):
            pooling = ["M"] if number < POOLED_STAGES else []
            stage = make_layers([scaled(channels, width)] * count + pooling, batch_norm=True)
            replace_input_convolution(stage, before)
            self.stages.append(stage)
            before = scaled(channels, width)
        self._classify_mean(before, num_classes)

    def features(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """Output of the fifth stage, after its last ReLU."""
        return self.stages(inputs)
