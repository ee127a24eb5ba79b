"""VGG networks for small images (Simonyan and Zisserman, 2015), from torchvision's layers.

With batch norms, global average pooling and one linear layer, and only three of the five poolings.
"""

from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env.networks import published
from mtkd_env.networks.base import (
    Network,
    initialise_convolutions,
    replace_input_convolution,
    scaled,
)

CHANNELS = (64, 128, 256, 512, 512)
POOLED_STAGES = 3


class VGG(Network):
    """Five stages of 3x3 convolutions, each with a batch norm and a ReLU.

    The resolution is halved behind each of the first three stages.

    Args:
        repeats: The convolutions of each stage.
        num_classes: C, the number of logits.
        in_channels: Channels of the images.
        width: Factor on all channels.

    Raises:
        ConfigError: A width that is not positive.
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
        self.num_classes = num_classes
        self.feature_dim = self.map_channels = scaled(CHANNELS[-1], width)
        self.stages = nn.Sequential()
        before = in_channels
        for number, (count, channels) in enumerate(zip(repeats, CHANNELS, strict=True)):
            pooling = ["M"] if number < POOLED_STAGES else []
            stage = make_layers([scaled(channels, width)] * count + pooling, batch_norm=True)
            replace_input_convolution(stage, before)
            self.stages.append(stage)
            before = scaled(channels, width)
        self.classifier = nn.Linear(self.feature_dim, num_classes)
        initialise_convolutions(self)

    def features(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """Output of the fifth stage, after its last ReLU."""
        return self.stages(inputs)
