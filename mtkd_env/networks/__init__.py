"""Image classifiers for students and teachers alike; to add one is a file and a line in the table.

Networks know neither their role nor the data; each gives a `NetworkOutput`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from mtkd_env.errors import check_arguments, lookup
from mtkd_env.networks.base import Network
from mtkd_env.networks.resnet import WIDE, ResNet
from mtkd_env.networks.wide_resnet import WideResNet
from mtkd_env.seeding import seeded

__all__ = ["NETWORKS", "Network", "build_network"]

NETWORKS: dict[str, Callable[..., Network]] = {
    "resnet8": partial(ResNet, 8),
    "resnet14": partial(ResNet, 14),
    "resnet20": partial(ResNet, 20),
    "resnet32": partial(ResNet, 32),
    "resnet44": partial(ResNet, 44),
    "resnet56": partial(ResNet, 56),
    "resnet110": partial(ResNet, 110),
    "resnet8x4": partial(ResNet, 8, WIDE),
    "resnet32x4": partial(ResNet, 32, WIDE),
    "wrn_16_1": partial(WideResNet, 16, 1),
    "wrn_16_2": partial(WideResNet, 16, 2),
    "wrn_40_1": partial(WideResNet, 40, 1),
    "wrn_40_2": partial(WideResNet, 40, 2),
    "wrn_28_4": partial(WideResNet, 28, 4),
}


def build_network(
    name: str, *, num_classes: int, in_channels: int = 3, seed: int | None = None, **kwargs: Any
) -> Network:
    """A freshly initialised network of the table.

    Args:
        name: Key of `NETWORKS`.
        num_classes: C, the number of logits.
        in_channels: Channels of the images.
        seed: Seed of the initialisation; without one it draws from torch's global generator.
        **kwargs: Arguments of the network itself, such as `width`.

    Raises:
        ConfigError: An unknown name, or an argument that the network does not take.
    """
    constructor = lookup(NETWORKS, name, "network")
    check_arguments(constructor, kwargs, name)
    with nullcontext() if seed is None else seeded(seed):
        return constructor(num_classes=num_classes, in_channels=in_channels, **kwargs)
