"""Pictures of what a detector has found beside what is to be seen."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import UInt8
from matplotlib.colors import TABLEAU_COLORS
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from experiments.transfer.label_views import fitted

# Height and width [pixels] of a panel, and the stripe between two.
PANEL = 320
STRIPE = 4

# From what score on a detection is drawn.
SCORE = 0.5

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
        found: Boxes, labels and scores; and masks (N, H, W), if there are.
        truth: Boxes and labels; and masks (N, H, W).
        class_names: Name of each label.
    """
    kept = {name: values[found["scores"] >= SCORE] for name, values in found.items()}
    names = [class_names[label] for label in kept["labels"].tolist()]
    scores = kept["scores"].tolist()
    captions = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
    left = _panel(image, kept, captions)
    right = _panel(image, truth, [class_names[label] for label in truth["labels"].tolist()])
    stripe = torch.full((3, PANEL, STRIPE), 255, dtype=torch.uint8)
    return torch.cat([left, stripe, right], dim=2)


def _panel(image: Tensor, objects: Mapping[str, Tensor], captions: list[str]) -> Tensor:
    """The image in the upper left corner of a black square, with boxes and masks on it."""
    square = (PANEL, PANEL)
    # Without values that images and masks do not have.
    panel = fitted(image, square, InterpolationMode.NEAREST, fill=0)
    if not captions:
        return panel
    colors = [COLORS[label % len(COLORS)] for label in objects["labels"].tolist()]
    if "masks" in objects:
        masks = fitted(objects["masks"].byte(), square, InterpolationMode.NEAREST, fill=0).bool()
        panel = draw_segmentation_masks(panel, masks, alpha=OPACITY, colors=colors)
    return draw_bounding_boxes(
        panel,
        objects["boxes"] * PANEL / max(image.shape[1:]),
        labels=captions,
        colors=colors,
        width=2,
        label_colors="white",
        fill_labels=True,
    )
