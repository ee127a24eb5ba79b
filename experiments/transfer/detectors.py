"""Detectors of torchvision on a ResNet's feature pyramid, and Cascade R-CNN.

What they are trained on and how is the business of `detection`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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

from experiments.transfer.backbones import BACKBONES
from experiments.transfer.cascade import cascade_rcnn
from mtkd_env.errors import ConfigError, check_name
from mtkd_env.options import Options
from mtkd_env.precision import widen

# Frozen ones normalise by the statistics that the distilled network has, and leave them alone.
NORMS: Mapping[str, type[nn.Module]] = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d}

# Parts of a body, from the last one, that can be trained: layer4, ..., layer1, conv1.
MOST_LAYERS = 5

# Channels of every map of a feature pyramid.
CHANNELS = 256

# What a detector is given otherwise than by `arguments`.
GIVEN = {"self", "kwargs", "backbone", "num_classes", "min_size", "max_size"}

# The layers that boxes, classes and masks are read from.
HEADS = (RPNHead, FastRCNNPredictor, MaskRCNNPredictor, RetinaNetHead)


class Detector(NamedTuple):
    """A kind of detector.

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


DETECTORS: Mapping[str, Detector] = {
    "faster_rcnn": Detector(FasterRCNN, FasterRCNN),
    "mask_rcnn": Detector(MaskRCNN, MaskRCNN, masks=True),
    "retinanet": Detector(RetinaNet, RetinaNet, focal=True),
    "cascade_rcnn": Detector(cascade_rcnn, FasterRCNN),
}


@dataclass(frozen=True, kw_only=True)
class DetectorSpec(Options):
    """A detector.

    Attributes:
        model: faster_rcnn, mask_rcnn, retinanet or cascade_rcnn.
        backbone: resnet18, resnet34 or resnet50.
        min_size: Shorter side [pixels] that images are resized to.
        max_size: Longest side [pixels] that they may get by that.
        trainable_layers: Parts of the backbone, from the last one, that are trained: 0 to 5.
        norm: frozen leaves the backbone's batch norms as they are; batch trains them.
        arguments: Further arguments of torchvision's detector, such as box_score_thresh.

    Raises:
        ConfigError: An unknown name, or a value that cannot be used.
    """

    model: str = "mask_rcnn"
    backbone: str = "resnet18"
    min_size: int = 800
    max_size: int = 1333
    trainable_layers: int = 3
    norm: str = "frozen"
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(DETECTORS, self.model, "detector")
        check_name(BACKBONES, self.backbone, "backbone")
        check_name(NORMS, self.norm, "norm")
        for name, low, high in (
            ("min_size", 1, self.max_size),
            ("trainable_layers", 0, MOST_LAYERS),
        ):
            if not low <= (value := getattr(self, name)) <= high:
                raise ConfigError(f"{name}: expected {low} to {high}, got {value}")
        # Torchvision itself ignores keys that it does not know.
        known = inspect.signature(self.kind.options).parameters.keys()
        for name in self.arguments:
            check_name(known - GIVEN, name, "key of arguments")

    @property
    def kind(self) -> Detector:
        """Its kind."""
        return DETECTORS[self.model]

    def build(self, num_classes: int) -> nn.Module:
        """A freshly initialised one.

        Args:
            num_classes: Classes, the background, which is class 0, included.

        Raises:
            ConfigError: Torchvision cannot make it.
        """
        focal = self.kind.focal
        pyramid: nn.Module = resnet_fpn_backbone(
            backbone_name=self.backbone,
            weights=None,
            norm_layer=NORMS[self.norm],
            trainable_layers=self.trainable_layers,
            returned_layers=[2, 3, 4] if focal else None,
            # P6 from P5, as torchvision's own RetinaNet has it; the paper takes it from the body.
            extra_blocks=LastLevelP6P7(CHANNELS, CHANNELS) if focal else None,
        )
        sizes = {"min_size": self.min_size, "max_size": self.max_size}
        try:
            model = self.kind.make(pyramid, num_classes, **sizes, **self.arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"arguments: {error}") from error
        _widen_heads(model)
        return model


def body(detector: nn.Module) -> nn.Module:
    """The ResNet inside a detector, whose tensors have the names that a classifier's have."""
    return detector.get_submodule("backbone.body")


def _widen_heads(model: nn.Module) -> None:
    """Makes heads give float32 whatever they compute in, so that boxes have all their digits.

    A corner at 800 pixels would be rounded to a multiple of 4 in bfloat16.
    """
    for module in model.modules():
        if isinstance(module, HEADS):
            module.register_forward_hook(lambda *call: tree_map(widen, call[-1]))
