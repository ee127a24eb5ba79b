"""Pictures of a batch: every image, and how much each teacher counts for it."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from mtkd_env.types import UNKNOWN, TeacherWeights

# Pixels: width of a frame, height of a line of text, and where its columns begin: a teacher's name,
# its weight in the logit terms and in the feature terms; and how long the bar of weight 1 is.
WIDTH, LINE = 192, 14
COLUMNS, BAR = (4, 80, 138), 50

# Sides of the image in a frame [pixels], and characters of a name.
SIDE, NAME = 184, 12

PAPER, INK, RIGHT, WRONG = (255, 255, 255), (40, 40, 40), (0, 130, 60), (190, 40, 40)
SHADE, LOGIT, FEATURE = (235, 235, 235), (110, 165, 225), (240, 175, 95)


def draw_batch(
    images: Float[Tensor, "B K H W"],
    targets: Int64[Tensor, " B"],
    teachers: Sequence[str],
    weights: TeacherWeights | None = None,
    correct: Bool[Tensor, "B M"] | None = None,
) -> tuple[NDArray[np.uint8], ...]:
    """A frame (height, width, 3) for each image of a batch, all of one size.

    Below the image stand its class and a line for each teacher, in green if it is right and in red
    if it is wrong, with its weights in the logit and in the feature terms as bars.

    Args:
        images: The images, normalised; each channel is spread from its least to its largest value.
        targets: Their classes.
        teachers: Names of the M teachers.
        weights: How much they count; without them there are no bars.
        correct: Whether each has the class right; means nothing where there is no label.
    """
    pictures = _pictures(images.detach().float().cpu())
    classes = targets.tolist()
    shares = [[[0.0, 0.0]] * len(teachers)] * len(classes)
    if weights is not None:
        shares = torch.stack([weights.logit, weights.feature], dim=-1).tolist()
    nobody: list[bool | None] = [None] * len(teachers)
    right = [
        nobody if correct is None or label == UNKNOWN else correct[place].tolist()
        for place, label in enumerate(classes)
    ]
    return tuple(
        _frame(picture, label, list(zip(teachers, row, marks, strict=True)))
        for picture, label, row, marks in zip(pictures, classes, shares, right, strict=True)
    )


def _pictures(images: Float[Tensor, "B K H W"]) -> list[Image.Image]:
    """Images in colours; of other than three channels, their mean in grey."""
    least, largest = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
    spread = (images - least) / (largest - least).clamp_min(1e-6)
    if spread.shape[1] != 3:
        spread = spread.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    levels = (255 * spread).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(one) for one in levels.numpy()]


def _frame(
    picture: Image.Image, label: int, lines: list[tuple[str, list[float], bool | None]]
) -> NDArray[np.uint8]:
    """One image with its class, and name, weights and correctness of each teacher."""
    margin = (WIDTH - SIDE) // 2
    frame = Image.new("RGB", (WIDTH, SIDE + 2 * margin + (len(lines) + 1) * LINE), PAPER)
    # What is enlarged shows its pixels.
    small = max(picture.size) <= SIDE
    method = Image.Resampling.NEAREST if small else Image.Resampling.BILINEAR
    fitted = ImageOps.pad(picture, (SIDE, SIDE), method, color=PAPER)
    frame.paste(fitted, (margin, margin))
    draw, top = ImageDraw.Draw(frame), SIDE + 2 * margin - 2
    heading = "no label" if label == UNKNOWN else f"class {label}"
    for left, text in zip(COLUMNS, (heading, "logit", "feature"), strict=True):
        draw.text((left, top), text, fill=INK)
    for name, shares, right in lines:
        top += LINE
        ink = INK if right is None else RIGHT if right else WRONG
        draw.text((COLUMNS[0], top), name[:NAME], fill=ink)
        for left, share, color in zip(COLUMNS[1:], shares, (LOGIT, FEATURE), strict=True):
            draw.rectangle((left, top + 2, left + BAR, top + LINE - 3), fill=SHADE)
            if share > 0:
                end = left + round(BAR * min(share, 1))
                draw.rectangle((left, top + 2, end, top + LINE - 3), fill=color)
                draw.text((left + 2, top), f"{share:.2f}", fill=INK)
    return np.asarray(frame)
