"""From the student's space to a teacher's: its last feature map (r_m of Equ. 2-4), its feature."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class Regressor(nn.Module):
    """Resizes a feature map, then a 1x1 convolution, batch norm and, for unsigned maps, a ReLU.

    The map is average-pooled where it is at least as large as the target and interpolated where it
    is smaller. Both are linear, act on each channel alone and keep constants, so they commute with
    the 1x1 convolution; an enlarging one comes after it, which is the same map for less work.

    Args:
        in_channels: Channels of the student's map.
        out_channels: Channels of the teacher's map.
        size: Height and width of the teacher's map.
        signed: Whether the teacher's map takes negative values, which a ReLU could not imitate.
    """

    def __init__(
        self, in_channels: int, out_channels: int, size: tuple[int, int], *, signed: bool = False
    ) -> None:
        super().__init__()
        self.size = size
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.Identity() if signed else nn.ReLU()

    def forward(self, feature_map: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """The map in the teacher's space."""
        height, width = feature_map.shape[2:]
        if height < self.size[0] or width < self.size[1]:
            resized = functional.interpolate(
                self.convolution(feature_map), self.size, mode="bilinear", align_corners=False
            )
        else:
            pooled = functional.adaptive_avg_pool2d(feature_map, self.size)
            resized = self.convolution(pooled)
        mapped: Tensor = self.activation(self.norm(resized))
        return mapped


class FeatureProjection(nn.Module):
    """From the student's feature to the width of a teacher's: batch norm, then a linear map.

    The projection of the ND paper (see `losses.norm_direction`) without its dropout, so that a
    student depends on its seed alone; nothing at all where the widths agree.

    Args:
        in_features: Width of the student's feature.
        out_features: Width of the teacher's feature.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if in_features != out_features:
            layers = [nn.BatchNorm1d(in_features), nn.Linear(in_features, out_features)]
        self.layers = nn.Sequential(*layers)

    def forward(self, feature: Float[Tensor, "B D"]) -> Float[Tensor, "B D2"]:
        """The feature in the teacher's space."""
        projected: Tensor = self.layers(feature)
        return projected
