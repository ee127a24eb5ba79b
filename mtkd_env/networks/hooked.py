"""A classifier whose forward torch.fx cannot follow, seen through hooks at its last feature map."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtkd_env.errors import ConfigError
from mtkd_env.networks.foreign import ForeignNetwork, noise_image, taking_images

ADVICE = "a subclass of mtkd_env.networks.Network says itself what is what (docs/networks.md)"


class HookedNetwork(ForeignNetwork):
    """A classifier as it is; hooks see what its feature layer gives and what its last layer takes.

    A forward is one pass. `head`, which some weightings ask about another map, is a whole pass too:
    over black images, with the map in the place of the feature layer's output.

    Args:
        model: The classifier; hooks stay on it.
        layer: Name of the module whose output is the feature map, or tokens; of a tuple the first.
        num_classes: C, by which the logits are known in an output of several parts.
        name: The network's name, for errors.
        image_shape: (K, H, W) of the images.

    Raises:
        ConfigError: The logits cannot be told, are not a linear layer's, or depend on more than the
            layer; or the network cannot take such images.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        num_classes: int,
        name: str,
        image_shape: Sequence[int],
    ) -> None:
        super().__init__()
        self.model = model
        self._name, self._layer, self._image_shape = name, layer, tuple(image_shape)
        self._expected = num_classes
        self._given: Tensor | None = None
        self._map: Tensor | None = None
        self._feature: Tensor | None = None
        self._classifier().register_forward_pre_hook(self._at_classifier)
        model.get_submodule(layer).register_forward_hook(self._at_layer)
        self._measure(name, image_shape)
        self._check_cut()

    def _last(self, inputs: Tensor) -> Tensor:
        return self._pass(inputs)[0]

    def _classify(self, last: Tensor) -> tuple[Tensor, Tensor]:
        black = last.new_zeros(len(last), *self._image_shape)
        return self._pass(black, last)[1:]

    def _pass(self, inputs: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """As of `ForeignNetwork`; if a map is given, what is said of it whatever the inputs."""
        self._given = given
        try:
            logits = _logits(self.model(inputs), self._expected, self._name)
            if self._map is None or self._feature is None:
                raise RuntimeError(f"its forward never calls the layer '{self._layer}'")
            return self._map, self._feature, logits
        finally:
            self._given = self._map = self._feature = None

    def _at_layer(self, _layer: nn.Module, _inputs: object, output: Any) -> Any:
        parts = output if isinstance(output, tuple | list) else (output,)
        self._map = parts[0] if self._given is None else self._given
        if self._given is None:
            return None
        return self._given if parts is not output else (self._given, *parts[1:])

    def _at_classifier(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (self._feature,) = inputs

    @torch.no_grad()
    def _classifier(self) -> nn.Module:
        """The linear layer whose output the logits are."""
        given: list[tuple[nn.Module, Tensor]] = []
        layers = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)]
        hooks = [
            layer.register_forward_hook(lambda *call: given.append((call[0], call[2])))
            for layer in layers
        ]
        self.model.eval()
        with taking_images(self._name, self._image_shape):
            output = self.model(noise_image(self._image_shape, self.model))
        for hook in hooks:
            hook.remove()
        logits = _logits(output, self._expected, self._name)
        for layer, found in reversed(given):
            if found is logits or torch.equal(found, logits):
                return layer
        raise ConfigError(f"'{self._name}': expected logits from an nn.Linear at its end; {ADVICE}")

    @torch.no_grad()
    def _check_cut(self) -> None:
        """Checks that the logits of a map are those of the image that the map is of."""
        self.eval()
        last, _, logits = self._pass(noise_image(self._image_shape, self))
        _, again = self._classify(last)
        self.train()
        if not torch.allclose(logits, again, rtol=1e-3, atol=1e-4):
            raise ConfigError(
                f"'{self._name}': its logits depend on more than the feature layer "
                f"'{self._layer}'; {ADVICE}"
            )


def _logits(output: Any, num_classes: int, name: str) -> Tensor:
    """The logits in what a forward gives.

    A tensor is the logits; so is the attribute or key `logits`; and of a tuple, list or dictionary
    the only part that is one row of C numbers for each image.
    """
    if isinstance(output, Tensor):
        return output
    parts = dict(output) if isinstance(output, Mapping) else {}
    if isinstance(named := parts.get("logits", getattr(output, "logits", None)), Tensor):
        return named
    if isinstance(output, tuple | list):
        parts = dict(enumerate(output))
    fitting = [
        part
        for part in parts.values()
        if isinstance(part, Tensor) and part.ndim == 2 and part.shape[1] == num_classes
    ]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(f"{key}: {_described(part)}" for key, part in parts.items())
    raise ConfigError(
        f"'{name}': expected logits, a tensor or the only part of shape (B, {num_classes}), its "
        f"forward gives {_described(output)}{f' of {found}' if found else ''}; {ADVICE}"
    )


def _described(part: Any) -> str:
    if isinstance(part, Tensor):
        return f"({', '.join(['B', *map(str, part.shape[1:])])})"
    return f"a {type(part).__name__}"
