"""Segmenters of segmentation-models-pytorch, built so that their whole backbone is used.

The package is optional. Its encoders are torchvision's ResNets without `fc`, with the same names of
tensors, so that an exported backbone fills them as it is.
"""

from collections.abc import Callable, Mapping

from torch import nn

from mtkd_env.errors import check_name, lookup
from mtkd_env.imports import optional
from mtkd_env.seeding import seeded

# Takes seconds to import.
LIBRARY = "segmentation_models_pytorch"

# Networks that a segmenter can stand on.
BACKBONES = ("resnet18", "resnet34", "resnet50")

# How much smaller the last feature map is than the image; heights and widths are multiples of it.
STRIDE = 8


def deeplabv3(backbone: str, classes: int) -> nn.Module:
    """DeepLabV3 (Chen et al., 2017) on a backbone whose last two stages are dilated."""
    model: nn.Module = optional(LIBRARY).DeepLabV3(
        backbone, encoder_weights=None, encoder_output_stride=STRIDE, classes=classes
    )
    return model


def pspnet(backbone: str, classes: int) -> nn.Module:
    """PSPNet (Zhao et al., 2017) on a backbone whose last two stages are dilated.

    The library's default depth of 3 would leave these two stages out.
    """
    model: nn.Module = optional(LIBRARY).PSPNet(
        backbone, encoder_weights=None, encoder_depth=5, output_stride=STRIDE, classes=classes
    )
    return model


# Makers of untrained segmenters from the backbone's name and the number of classes.
SEGMENTERS: Mapping[str, Callable[[str, int], nn.Module]] = {
    "deeplabv3": deeplabv3,
    "pspnet": pspnet,
}


def build_segmenter(name: str, backbone: str, classes: int, seed: int) -> nn.Module:
    """An untrained segmenter, the same for the same seed; its `encoder` is the backbone.

    Args:
        name: Name in `SEGMENTERS`.
        backbone: Name in `BACKBONES`.
        classes: K.
        seed: Seed of all its tensors.

    Returns:
        A module from images (B, 3, H, W), H and W multiples of `STRIDE`, to logits (B, K, H, W).

    Raises:
        ConfigError: An unknown name, or the library is not installed.
    """
    build = lookup(SEGMENTERS, name, "segmenter")
    check_name(BACKBONES, backbone, "backbone")
    with seeded(seed):
        return build(backbone, classes)
