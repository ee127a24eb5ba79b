"""Classifiers of other libraries, and of the user, as networks of this package."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env.errors import ConfigError
from mtkd_env.networks.base import Network
from mtkd_env.types import NetworkOutput


class Layout(NamedTuple):
    """How a feature map lies in the tensor that a classifier's pooling takes.

    Attributes:
        to_map: Gives the feature map (B, K, H, W) in that tensor.
        from_map: Gives that tensor for a feature map.
    """

    to_map: Callable[[Tensor], Tensor]
    from_map: Callable[[Tensor], Tensor]


CHANNELS_FIRST = Layout(lambda last: last, lambda feature_map: feature_map)
CHANNELS_LAST = Layout(
    lambda last: last.permute(0, 3, 1, 2), lambda feature_map: feature_map.permute(0, 2, 3, 1)
)


def tokens(count: int, prefix: int | None = None) -> Layout:
    """The tensor is (B, N, K): tokens of a square of patches, row by row, behind some others.

    A map alone has no class token. The mean of its patches, which come from the same final norm,
    stands in for it.

    Args:
        count: N.
        prefix: Number of tokens before those of the patches; by default what N exceeds the
            nearest smaller square by.

    Raises:
        ConfigError: The patches are no square.
    """
    before = count - math.isqrt(count) ** 2 if prefix is None else prefix
    side = math.isqrt(count - before)
    if side**2 != count - before:
        raise ConfigError(f"{count - before} patches are not a square of patches")

    def to_map(last: Tensor) -> Tensor:
        return last[:, before:].transpose(1, 2).unflatten(2, (side, side))

    def from_map(feature_map: Tensor) -> Tensor:
        patches = feature_map.flatten(2).transpose(1, 2)
        return torch.cat([patches.mean(dim=1, keepdim=True)] * before + [patches], dim=1)

    return Layout(to_map, from_map)


class ForeignNetwork(Network):
    """A classifier in two parts: up to what its pooling takes, and from there to the logits.

    Subclasses make the parts and then call `_measure`.

    For a vision transformer the feature map is the grid of its patch tokens after the final norm,
    the feature the vector that its classifier takes (the class token, as a rule); `forward` reads
    the logits from the latter, `head` from a map alone, see `tokens`.
    """

    _layout: Layout

    @abstractmethod
    def _last(self, inputs: Tensor) -> Tensor:
        """What the pooling takes."""

    @abstractmethod
    def _classify(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """Feature (B, D) and logits (B, C) of what the pooling takes."""

    def features(self, inputs: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K2 H2 W2"]:
        """The map that is pooled, or the patches' tokens as one."""
        return self._layout.to_map(self._last(inputs))

    def head(self, feature_map: Float[Tensor, "B K H W"]) -> NetworkOutput:
        """Pooling and classifier."""
        feature, logits = self._classify(self._layout.from_map(feature_map))
        return NetworkOutput(logits, feature, feature_map)

    def forward(self, inputs: Float[Tensor, "B K H W"]) -> NetworkOutput:
        """Logits, pooled feature and last feature map of normalised images."""
        last, feature, logits = self._pass(inputs)
        return NetworkOutput(logits, feature, self._layout.to_map(last))

    def _pass(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the pooling takes, feature and logits."""
        last = self._last(inputs)
        return last, *self._classify(last)

    def native_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The given `state_dict`, or the wrapped classifier's own in the names it has here."""
        own = self.state_dict()
        if own.keys() <= state.keys():
            return state
        names = {_library_name(name): name for name in own}
        return {names.get(name, name): value for name, value in state.items()}

    def library_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The wrapped classifier's own names: here a part's name comes before them."""
        return {_library_name(name): value for name, value in state.items()}

    @torch.no_grad()
    def _measure(
        self,
        name: str,
        image_shape: Sequence[int],
        *,
        channels_last: bool = False,
        prefix: int | None = None,
    ) -> None:
        """Finds widths, layout and sign by a pass over one image of noise.

        Args:
            name: The network's name, for errors.
            image_shape: (K, H, W) of the images.
            channels_last: Whether a map's channels are its last axis.
            prefix: Number of tokens before those of the patches, where it is known.

        Raises:
            ConfigError: The network cannot take such images, or its last tensor is no map.
        """
        self.eval()
        with taking_images(name, image_shape):
            last = self._last(noise_image(image_shape, self))
            if not isinstance(last, Tensor):
                raise ConfigError(f"its feature layer gives a {type(last).__name__}, no map")
            feature, logits = self._classify(last)
            self._layout = _layout(last.shape, channels_last=channels_last, prefix=prefix)
        self.train()
        feature_map = self._layout.to_map(last)
        self.num_classes = logits.shape[1]
        self.feature_dim = feature.shape[1]
        self.map_channels = feature_map.shape[1]
        # Shapes alone do not tell the sign; a regressor without ReLU can imitate either.
        self.signed_map = feature_map.is_meta or bool((feature_map < 0).any())


def noise_image(image_shape: Sequence[int], network: nn.Module) -> Float[Tensor, "1 K H W"]:
    """One image (K, H, W) of noise, always the same, where a network is."""
    draw = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(1, *image_shape, generator=draw, device="cpu")
    return noise.to(next(network.parameters()).device)


@contextmanager
def taking_images(name: str, image_shape: Sequence[int]) -> Iterator[None]:
    """Lets what a network raises on its first images (K, H, W) become an error that names both."""
    try:
        yield
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        shape = "x".join(str(length) for length in image_shape)
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"'{name}' cannot take images of {shape}: {reason}") from error


def _layout(shape: Sequence[int], *, channels_last: bool, prefix: int | None) -> Layout:
    if len(shape) == 3:
        return tokens(shape[1], prefix)
    if len(shape) != 4:
        raise ConfigError(f"its feature layer gives {tuple(shape)}, neither a map nor tokens")
    return CHANNELS_LAST if channels_last else CHANNELS_FIRST


def _library_name(name: str) -> str:
    return name.partition(".")[2]
