"""Segmenters of segmentation-models-pytorch, built so that their whole backbone is used.

The package is optional. Its encoders are torchvision's ResNets without `fc`, with the same names of
tensors, so that an exported backbone fills them as it is.
"""

from collections.abc import Mapping

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


# Classes of the library, and their arguments; the last two stages of the backbone are dilated.
SEGMENTERS: Mapping[str, tuple[str, Mapping[str, int]]] = {
    # Chen et al., 2017.
    "deeplabv3": ("DeepLabV3", {"encoder_output_stride": STRIDE}),
    # Zhao et al., 2017. The library's default depth of 3 would leave these two stages out.
    "pspnet": ("PSPNet", {"encoder_depth": 5, "output_stride": STRIDE}),
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
    kind, arguments = lookup(SEGMENTERS, name, "segmenter")
    check_name(BACKBONES, backbone, "backbone")
    make = getattr(optional(LIBRARY), kind)
    with seeded(seed):
        model: nn.Module = make(backbone, encoder_weights=None, classes=classes, **arguments)
    return model
