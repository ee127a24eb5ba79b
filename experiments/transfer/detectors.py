"""Detectors of torchvision on a ResNet's feature pyramid, and Cascade R-CNN.

What they are trained on and how is the business of `detection`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from experiments.transfer.cascade import cascade_rcnn
from mtkd_env.errors import ConfigError, check_name, lookup
from mtkd_env.precision import widen

BODIES = ("resnet18", "resnet34", "resnet50")

# Frozen ones normalise by the statistics that the distilled network has, and leave them alone.
NORMS: Mapping[str, type[nn.Module]] = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d}

# Parts of a body, from the last one, that can be trained: layer4, ..., layer1, conv1.
MOST_LAYERS = 5

# Channels of every map of a feature pyramid.
CHANNELS = 256

# The layers that boxes, classes and masks are read from.
HEADS = (RPNHead, FastRCNNPredictor, MaskRCNNPredictor, RetinaNetHead)


@dataclass(frozen=True)
class Detector:
    """How a detector is made.

    Attributes:
        make: Makes it from a feature pyramid, the number of classes and further arguments.
        options: Class of torchvision whose arguments those are.
        masks: Whether it predicts masks, too.
        focal: Whether it begins at the third stage and goes up to P7, as RetinaNet does; else the
            pyramid stands on all four stages.
    """

    make: Callable[..., nn.Module]
    options: Callable[..., nn.Module]
    masks: bool = False
    focal: bool = False

    def __call__(
        self,
        backbone: str,
        num_classes: int,
        *,
        min_size: int = 800,
        max_size: int = 1333,
        trainable_layers: int = 3,
        norm: str = "frozen",
        arguments: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """A freshly initialised detector.

        Args:
            backbone: Name in `BODIES`.
            num_classes: Classes, the background, which is class 0, included.
            min_size: Shorter side [pixels] that images are resized to.
            max_size: Longest side [pixels] that they may get by that.
            trainable_layers: Parts of the body, from the last one, that are trained: 0 to 5.
            norm: Name in `NORMS`, of the body's batch norms.
            arguments: Further arguments of torchvision's class.

        Raises:
            ConfigError: An unknown name, or a value that cannot be used.
        """
        arguments = dict(arguments or {})
        _check_sizes(min_size, max_size)
        self._check_arguments(arguments)
        pyramid = _pyramid(backbone, trainable_layers, norm, focal=self.focal)
        sizes = {"min_size": min_size, "max_size": max_size}
        try:
            model = self.make(pyramid, num_classes, **sizes, **arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"arguments: {error}") from error
        _widen_heads(model)
        return model

    def _check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Torchvision itself ignores keys that it does not know."""
        parameters = inspect.signature(self.options).parameters
        own = {"self", "kwargs", "backbone", "num_classes", "min_size", "max_size"}
        for name in arguments:
            check_name(parameters.keys() - own, name, "key of arguments")


DETECTORS: Mapping[str, Detector] = {
    "faster_rcnn": Detector(FasterRCNN, FasterRCNN),
    "mask_rcnn": Detector(MaskRCNN, MaskRCNN, masks=True),
    "retinanet": Detector(RetinaNet, RetinaNet, focal=True),
    "cascade_rcnn": Detector(cascade_rcnn, FasterRCNN),
}


def body(detector: nn.Module) -> nn.Module:
    """The ResNet inside a detector, whose tensors have the names that a classifier's have."""
    return detector.get_submodule("backbone.body")


def _pyramid(backbone: str, trainable_layers: int, norm: str, *, focal: bool) -> nn.Module:
    check_name(BODIES, backbone, "backbone")
    if not 0 <= trainable_layers <= MOST_LAYERS:
        raise ConfigError(f"trainable_layers: expected 0 to {MOST_LAYERS}, got {trainable_layers}")
    pyramid: nn.Module = resnet_fpn_backbone(
        backbone_name=backbone,
        weights=None,
        norm_layer=lookup(NORMS, norm, "norm"),
        trainable_layers=trainable_layers,
        returned_layers=[2, 3, 4] if focal else None,
        # P6 from P5, as torchvision's own RetinaNet has it; the paper takes it from the body.
        extra_blocks=LastLevelP6P7(CHANNELS, CHANNELS) if focal else None,
    )
    return pyramid


def _widen_heads(model: nn.Module) -> None:
    """Makes heads give float32 whatever they compute in, so that boxes have all their digits.

    A corner at 800 pixels would be rounded to a multiple of 4 in bfloat16.
    """
    for module in model.modules():
        if isinstance(module, HEADS):
            module.register_forward_hook(lambda *call: tree_map(widen, call[-1]))


def _check_sizes(min_size: int, max_size: int) -> None:
    if min_size < 1:
        raise ConfigError(f"min_size: expected 1 or more, got {min_size}")
    if max_size < min_size:
        raise ConfigError(f"max_size: expected at least min_size = {min_size}, got {max_size}")
