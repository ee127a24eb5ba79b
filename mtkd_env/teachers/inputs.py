"""A teacher's own input: what its images are like, made of the student's view of an image."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mtkd_env.data.dataset import ImageSet
from mtkd_env.errors import ConfigError, check_at_least_1, check_choice, check_positive
from mtkd_env.options import Options

INTERPOLATIONS = ("bilinear", "bicubic", "nearest")

# How many channels there are.
CHANNELS: Mapping[str, int] = {"rgb": 3, "bgr": 3, "gray": 1}

# Of red, green and blue in the brightness of a pixel (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)

# What the values of pixels go from and to, for the student.
UNIT_RANGE = (0.0, 1.0)


@dataclass(frozen=True)
class InputSpec(Options):
    """What a teacher's images are like, where they are not like the student's.

    Without any of mean, std and range they are normalised as the student's. With one of them, the
    values are (v - mean) / std of pixels v in the range.

    Attributes:
        mean: That of each of its channels, in their order, in units of the range; 0 by default.
        std: Standard deviation of each of its channels, in units of the range; 1 by default.
        size: Height and width [pixels], or both as one number.
        interpolation: How images are resized: `bilinear` (the default), `bicubic` or `nearest`.
        range: The values of black and of white; by default 0 and 1.
        channels: `rgb`, `bgr` or `gray`.

    Raises:
        ConfigError: A value that cannot be.
    """

    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    size: int | tuple[int, int] | None = None
    interpolation: str | None = None
    range: tuple[float, float] | None = None
    channels: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interpolation is not None:
            check_choice(INTERPOLATIONS, interpolation=self.interpolation)
        if self.channels is not None:
            check_choice(CHANNELS, channels=self.channels)
        for side in _as_tuple(self.size):
            check_at_least_1(size=side)
        for value in _as_tuple(self.std):
            check_positive(std=value)
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ConfigError(
                f"range: expected the value of black and a larger one of white, got {self.range}"
            )

    def over(self, fields: Mapping[str, Any]) -> "InputSpec":
        """The same with other fields, where this says nothing."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return InputSpec(**{**fields, **said})


class TeacherView(nn.Module):
    """Makes a teacher's images of the student's.

    Args:
        spec: What they are like, with nothing left open.
        mean: Mean of each channel of the student's images, in units of [0, 1].
        std: Standard deviation of each.
    """

    _mean: Tensor
    _std: Tensor
    _scale: Tensor
    _shift: Tensor

    def __init__(
        self, spec: InputSpec, mean: Float[Tensor, " K"], std: Float[Tensor, " K"]
    ) -> None:
        super().__init__()
        assert spec.range is not None
        self.spec = spec
        black, white = spec.range
        own_mean, own_std = torch.tensor(spec.mean), torch.tensor(spec.std)
        numbers = {
            "_mean": mean,
            "_std": std,
            "_scale": (white - black) / own_std,
            "_shift": (black - own_mean) / own_std,
        }
        for name, values in numbers.items():
            self.register_buffer(name, values[:, None, None], persistent=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return len(self._scale), *_as_tuple(self.spec.size)

    def forward(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """The images as the teacher takes them."""
        pixels = _recoloured(inputs * self._std + self._mean, self.spec.channels)
        return self._resized(pixels) * self._scale + self._shift

    def _resized(self, pixels: Tensor) -> Tensor:
        mode = self.spec.interpolation or INTERPOLATIONS[0]
        if pixels.shape[2:] == _as_tuple(self.spec.size):
            return pixels
        if mode == "nearest":
            return functional.interpolate(pixels, self.spec.size, mode="nearest-exact")
        resized = functional.interpolate(
            pixels, self.spec.size, mode=mode, align_corners=False, antialias=True
        )
        # A cubic goes beyond black and white, which the images of a file cannot.
        return resized.clamp(0, 1) if mode == "bicubic" else resized


def teacher_view(
    spec: InputSpec, published: Mapping[str, Any], data: ImageSet[Any]
) -> TeacherView | None:
    """What makes a teacher's images of the student's; None if they are the same.

    Args:
        spec: What the user says of them.
        published: What is known of them otherwise, fields of `InputSpec`.
        data: The student's images.

    Raises:
        ConfigError: A number of channels that cannot be.
    """
    spec = spec.over(published)
    own = {1: "gray", 3: "rgb"}.get(data.image_shape[0])
    if spec.channels is not None and own is None:
        raise ConfigError(
            f"channels: expected none, because the images have {data.image_shape[0]} of their "
            f"own, got {spec.channels}"
        )
    channels = spec.channels or own
    mean, std = (
        _recoloured(one[None, :, None, None], channels).flatten() for one in (data.mean, data.std)
    )
    if not (spec.mean is None and spec.std is None and spec.range is None):
        mean, std = _given("mean", spec.mean, mean, 0.0), _given("std", spec.std, std, 1.0)
    sides = _as_tuple(spec.size) or data.image_shape[1:]
    whole = InputSpec(
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        size=(sides[0], sides[-1]),
        interpolation=spec.interpolation or INTERPOLATIONS[0],
        range=spec.range or UNIT_RANGE,
        channels=channels,
    )
    view = TeacherView(whole, data.mean, data.std)
    alike = (whole.range, channels, view.image_shape) == (UNIT_RANGE, own, data.image_shape)
    # Published means are rounded, and so is what they are compared with.
    alike = alike and torch.allclose(mean, data.mean) and torch.allclose(std, data.std)
    return None if alike else view


def _given(
    key: str, value: float | tuple[float, ...] | None, like: Tensor, default: float
) -> Tensor:
    """One number for each channel."""
    numbers = _as_tuple(default if value is None else value)
    if len(numbers) not in {1, len(like)}:
        raise ConfigError(f"{key}: expected 1 or {len(like)} numbers, got {len(numbers)}")
    return torch.tensor(numbers, dtype=like.dtype).expand(len(like))


def _recoloured(pixels: Tensor, channels: str | None) -> Tensor:
    """Pixels of gray or colour images (B, K, H, W) in other channels."""
    if channels == "gray" and pixels.shape[1] == 3:
        # No tensor of weights, which would have to come from the host each time.
        return (
            torch.stack(
                [share * plane for share, plane in zip(LUMA, pixels.unbind(1), strict=True)]
            )
            .sum(0)
            .unsqueeze(1)
        )
    if channels is not None and CHANNELS[channels] > pixels.shape[1]:
        return pixels.expand(-1, CHANNELS[channels], -1, -1)
    return pixels.flip(1) if channels == "bgr" else pixels


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)
