"""From the student's space to a teacher's: its last feature map (r_m of Equ. 2-4), its feature."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init


class Regressor(nn.Module):
    """Resizes a feature map, then a 1x1 convolution, batch norm and, for unsigned maps, a ReLU.

    For all teachers whose maps have one size and sign: every channel is computed alone, so that one
    convolution gives what one for each teacher would.

    The map is average-pooled where it is at least as large as the target and interpolated where it
    is smaller. Both are linear, act on each channel alone and keep constants, so they commute with
    the 1x1 convolution; an enlarging one comes after it, which is the same map for less work.

    Args:
        convolutions: To the channels of each teacher's map; several are copied into one.
        size: Height and width of the teachers' maps.
        signed: Whether the teachers' maps take negative values, which a ReLU could not imitate.
    """

    def __init__(
        self, convolutions: Sequence[nn.Conv2d], size: tuple[int, int], *, signed: bool = False
    ) -> None:
        super().__init__()
        self.channels = [convolution.out_channels for convolution in convolutions]
        self.size = size
        self.convolution = _merged(convolutions)
        self.norm = nn.BatchNorm2d(sum(self.channels))
        self.activation = nn.Identity() if signed else nn.ReLU()

    def forward(self, feature_map: Float[Tensor, "B K H W"]) -> tuple[Tensor, ...]:
        """The map in the space of each teacher's, (B, K_m, H_m, W_m)."""
        height, width = feature_map.shape[2:]
        if height < self.size[0] or width < self.size[1]:
            resized = functional.interpolate(
                self.convolution(feature_map), self.size, mode="bilinear", align_corners=False
            )
        else:
            resized = self.convolution(_pooled(feature_map, self.size))
        return self.activation(self.norm(resized)).split(self.channels, dim=1)


class Regressors(nn.ModuleList):
    """From the student's feature map to those of all teachers, with as few layers as they allow.

    One `Regressor` for every size and sign of the teachers' maps, in the order of their first
    teachers.

    Args:
        in_channels: Channels of the student's map.
        channels: Channels of each teacher's map.
        sizes: Height and width of each teacher's map.
        signed: Whether each teacher's map takes negative values.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        signed: Sequence[bool],
    ) -> None:
        # Drawn teacher by teacher, so that numbers do not depend on which of them are merged.
        convolutions = [nn.Conv2d(in_channels, width, kernel_size=1) for width in channels]
        members: dict[tuple[tuple[int, int], bool], list[int]] = {}
        for teacher, kind in enumerate(zip(sizes, signed, strict=True)):
            members.setdefault(kind, []).append(teacher)
        super().__init__(
            Regressor([convolutions[teacher] for teacher in group], size, signed=sign)
            for (size, sign), group in members.items()
        )
        order = [teacher for group in members.values() for teacher in group]
        self._places = [order.index(teacher) for teacher in range(len(order))]

    def forward(self, feature_map: Float[Tensor, "B K H W"]) -> tuple[Tensor, ...]:
        """The map in the space of each teacher's, (B, K_m, H_m, W_m)."""
        maps = [mapped for regressor in self for mapped in regressor(feature_map)]
        return tuple(maps[place] for place in self._places)


def _pooled(feature_map: Tensor, size: tuple[int, int]) -> Tensor:
    """The map, averaged down to a size."""
    height, width = feature_map.shape[2:]
    if (height, width) == size:
        return feature_map
    rows, columns = height // size[0], width // size[1]
    if (rows * size[0], columns * size[1]) == (height, width):
        return functional.avg_pool2d(feature_map, (rows, columns))
    # Areas that overlap; a GPU sums up their gradients in any order.
    return functional.adaptive_avg_pool2d(feature_map, size)


@torch.no_grad()
def _merged(convolutions: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """One 1x1 convolution with the output channels of several, in their order."""
    if len(convolutions) == 1:
        return convolutions[0]
    channels = sum(convolution.out_channels for convolution in convolutions)
    # Without numbers of its own, which would change what is drawn after it.
    merged = skip_init(nn.Conv2d, convolutions[0].in_channels, channels, kernel_size=1)
    for name, parameter in merged.named_parameters():
        parameter.copy_(torch.cat([getattr(part, name) for part in convolutions]))
    return merged


class FeatureProjection(nn.Sequential):
    """From the student's feature to the width of a teacher's: batch norm, then a linear map.

    The projection of the ND paper (see `losses.norm_direction`) without its dropout, so that a
    student depends on its seed alone; nothing at all where the widths agree.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        if in_features != out_features:
            self.extend([nn.BatchNorm1d(in_features), nn.Linear(in_features, out_features)])
