"""Image classifiers for students and teachers alike; to add one is a file and a line in the table.

Networks know neither their role nor the data; each gives a `NetworkOutput`. Those of torchvision,
of timm and of the user are found by their names.

- `base.py`: what every network is; `cnn.py`, `resnet.py`, `wide_resnet.py`, `regnet.py`,
  `mobilenet.py`, `shufflenet.py`, `vgg.py`: those of the table; `published.py`: others' names for
  their tensors.
- `libraries.py` with `torchvision_models.py`, `timm_models.py`; `own.py`: the user's. `foreign.py`:
  what all these are here: `cut.py` cuts them at their last map, `hooked.py` listens to a layer.
- `regressor.py`: from a student's map to a teacher's.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mtkd_env.errors import ConfigError, check_arguments, check_positive, did_you_mean
from mtkd_env.imports import Named, check_is_there, name_of
from mtkd_env.networks import own
from mtkd_env.networks.base import Network as Network
from mtkd_env.networks.cnn import CNN
from mtkd_env.networks.libraries import LIBRARIES, library_model
from mtkd_env.networks.mobilenet import MobileNetV2
from mtkd_env.networks.own import cut_at as cut_at
from mtkd_env.networks.regnet import X_200MF, X_400MF, Y_400MF, RegNet
from mtkd_env.networks.resnet import DOUBLE, WIDE, ResNet, ResNet50
from mtkd_env.networks.shufflenet import X0_5, ShuffleNetV1, ShuffleNetV2
from mtkd_env.networks.vgg import VGG
from mtkd_env.networks.wide_resnet import WideResNet
from mtkd_env.options import Options, typed
from mtkd_env.seeding import seeded

NETWORKS: dict[str, Callable[..., Network]] = {
    "cnn3": CNN,
    "resnet8": partial(ResNet, 8),
    "resnet14": partial(ResNet, 14),
    "resnet20": partial(ResNet, 20),
    "resnet32": partial(ResNet, 32),
    "resnet44": partial(ResNet, 44),
    "resnet56": partial(ResNet, 56),
    "resnet110": partial(ResNet, 110),
    "resnet8x4": partial(ResNet, 8, WIDE),
    "resnet20x4": partial(ResNet, 20, WIDE),
    "resnet32x4": partial(ResNet, 32, WIDE),
    "resnet110x2": partial(ResNet, 110, DOUBLE),
    "cifar_resnet50": ResNet50,
    "wrn_16_1": partial(WideResNet, 16, 1),
    "wrn_16_2": partial(WideResNet, 16, 2),
    "wrn_40_1": partial(WideResNet, 40, 1),
    "wrn_40_2": partial(WideResNet, 40, 2),
    "wrn_28_4": partial(WideResNet, 28, 4),
    "regnetx_200mf": partial(RegNet, X_200MF),
    "regnetx_400mf": partial(RegNet, X_400MF),
    "regnety_400mf": partial(RegNet, Y_400MF),
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
    "shufflenetv2_x0_5": partial(ShuffleNetV2, X0_5),
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
}


# What every network is told by whoever builds it.
GIVEN = ("num_classes", "in_channels", "image_size", "width", "seed")


# Factor on the channels of a student of the table that is not told another: the digits are small.
STUDENT_WIDTH = 0.25


def find_network(name: Named, kind: str = "network") -> Callable[..., Network]:
    """What makes the network of a name, or of an object.

    Args:
        name: Key of `NETWORKS`; `torchvision:MODEL` or `timm:MODEL`; `module:Class`, or
            `module:Class@layer` for a class that is no `Network`; or an object, see `own.load`.
        kind: What the name is of, for errors.

    Raises:
        ConfigError: No such network, or timm is not installed.
    """
    if not isinstance(name, str):
        return own.load(name)
    check_is_there(name, kind)
    if name in NETWORKS:
        return NETWORKS[name]
    library, colon, model = name.partition(":")
    if colon:
        return library_model(library, model) if library in LIBRARIES else own.load(name)
    of_torchvision = name in LIBRARIES["torchvision"].model_names()
    exact = f"; did you mean 'torchvision:{name}'?" if of_torchvision else ""
    known = f"{', '.join(sorted(NETWORKS))}; torchvision:MODEL, timm:MODEL, module:Class"
    hint = exact or did_you_mean(name, NETWORKS)
    raise ConfigError(f"unknown {kind} {name!r}{hint} (known: {known})")


def has_weights(name: Named) -> bool:
    """Whether a network is a module that has been made already, with its weights."""
    return bool(getattr(find_network(name), own.COPIES, False))


def check_network_arguments(name: Named, arguments: Mapping[str, Any], path: str) -> None:
    """Checks arguments of a network's own against its signature, without making it.

    Those of torchvision's and timm's networks, and of classes of the user, are known when they are
    made.

    Raises:
        ConfigError: No such network, or an argument that it does not take, is of another type, or
            is given in another way; named as `path.argument`.
    """
    for argument in arguments:
        if argument in GIVEN:
            raise ConfigError(f"{path}.{argument}: cannot be given here")
    check_arguments(find_network(name), arguments, path)
    typed(find_network(name), arguments, path)


def build_network(
    name: Named,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: tuple[int, int] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Network:
    """A freshly initialised network.

    Args:
        name: The network; see `find_network`.
        num_classes: C, the number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images. The networks of the table take any size; others
            are checked against it, and by default against the size that they are made for.
        seed: Seed of the initialisation; without one it draws from torch's global generator.
        **kwargs: Arguments of the network itself, such as `width`.

    Raises:
        ConfigError: An unknown name, an argument that the network does not take, or images that it
            does not take.
    """
    constructor = find_network(name)
    check_arguments(constructor, kwargs, name_of(name))
    kwargs = typed(constructor, kwargs, name_of(name))
    if not _is_of_table(name):
        kwargs["image_size"] = image_size
    with nullcontext() if seed is None else seeded(seed):
        return constructor(num_classes=num_classes, in_channels=in_channels, **kwargs)


@dataclass(frozen=True)
class StudentSpec(Options):
    """The student.

    Attributes:
        network: Name of a network, also torchvision:MODEL or timm:MODEL; see `find_network`. Or
            one's own: a class of nn.Module, a function of num_classes, or a module with weights
            that every student begins with, as `module:Name` (`module:Name@layer` where it is no
            Network) or as an object.
        width: Factor on all its channel counts; by default 0.25 for the networks that have a name
            here, and 1 for all others.
        arguments: Further keyword arguments of the network, such as drop_path_rate of a transformer
            of timm.

    Raises:
        ConfigError: No such network, or an argument that it does not take.
    """

    network: Named = "resnet8"
    width: float | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        find_network(self.network, "student")
        check_network_arguments(self.network, self.arguments, "arguments")
        if self.width is not None:
            check_positive(width=self.width)

    @property
    def factor(self) -> float:
        """The factor on its channel counts."""
        if self.width is not None:
            return self.width
        return STUDENT_WIDTH if _is_of_table(self.network) else 1.0


def _is_of_table(name: Named) -> bool:
    return isinstance(name, str) and name in NETWORKS
