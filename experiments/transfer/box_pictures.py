"""Pictures of what a detector has found beside what is to be seen."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import UInt8
from matplotlib.colors import TABLEAU_COLORS
from torch import Tensor
from torch.nn import functional
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

# Height and width [pixels] of a panel, and the stripe between two.
PANEL = 320
STRIPE = 4

# From what score on a detection is drawn, and from what probability on a pixel of its mask.
SCORE = 0.5
SURE = 0.5

# How much of a mask's colour is mixed into the image.
OPACITY = 0.5

COLORS = tuple(TABLEAU_COLORS.values())


def beside_truth(
    image: UInt8[Tensor, "3 H W"],
    found: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    class_names: Sequence[str],
) -> UInt8[Tensor, "3 P Q"]:
    """Detections on the left, the truth on the right; of one size for all images.

    Args:
        image: The image.
        found: Boxes, labels and scores; and masks (N, 1, H, W) of probabilities, if there are.
        truth: Boxes and labels; and masks (N, H, W).
        class_names: Name of each label.
    """
    kept = {name: values[found["scores"] >= SCORE] for name, values in found.items()}
    if "masks" in kept:
        kept["masks"] = kept["masks"][:, 0] > SURE
    names = [class_names[label] for label in kept["labels"].tolist()]
    scores = kept["scores"].tolist()
    captions = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
    left = _panel(image, kept, captions)
    right = _panel(image, truth, [class_names[label] for label in truth["labels"].tolist()])
    stripe = torch.full((3, PANEL, STRIPE), 255, dtype=torch.uint8)
    return torch.cat([left, stripe, right], dim=2)


def _panel(image: Tensor, objects: Mapping[str, Tensor], captions: list[str]) -> Tensor:
    """The image in the upper left corner of a black square, with boxes and masks on it."""
    scale = PANEL / max(image.shape[1:])
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    drawn = _resized(image[None], size)[0]
    if captions:
        colors = [COLORS[label % len(COLORS)] for label in objects["labels"].tolist()]
        if "masks" in objects:
            masks = _resized(objects["masks"][:, None].byte(), size)[:, 0].bool()
            drawn = draw_segmentation_masks(drawn, masks, alpha=OPACITY, colors=colors)
        boxes = objects["boxes"] * scale
        drawn = draw_bounding_boxes(
            drawn,
            boxes,
            labels=captions,
            colors=colors,
            width=2,
            label_colors="white",
            label_background_colors=colors,
            fill_labels=True,
        )
    height, width = size
    panel: Tensor = functional.pad(drawn, (0, PANEL - width, 0, PANEL - height))
    return panel


def _resized(images: Tensor, size: list[int]) -> Tensor:
    """Images (N, K, H, W) in another size, without values that they do not have."""
    return functional.interpolate(images, size=size, mode="nearest")
