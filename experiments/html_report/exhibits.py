"""Training images with the weights that a run gave its teachers, as cards of a page."""

import base64
from io import BytesIO
from typing import Any

import matplotlib.image
import numpy as np

from experiments.gallery import Array, Gallery, read_gallery
from experiments.html_report.naming import Group
from mtkd_env.types import UNKNOWN

# Cards of a run, and pixels of an image's side that the page has room for.
MOST_CARDS, LARGEST_SIDE = 12, 96


def make_exhibit(group: Group) -> dict[str, Any] | None:
    """Images of the last training batch of the first seed that has recorded any; none if none has.

    Returns:
        `method`, `seed`, agent `score` and `cards`: of each the `source`, a data URI, its position
        `index` among the dataset's training images, its class as `target`, and of the `teachers`
        name, whether it has the class right (None where there is no label), weights in the logit
        and in the feature term.
    """
    for run in group.runs:
        if (gallery := read_gallery(run.folder)) is not None:
            return {
                "method": group.method,
                "seed": run.result.seed,
                "score": getattr(run.result, "score", 0.0),
                "cards": [_card(gallery, place, group) for place in telling(gallery.correct)],
            }
    return None


def telling(correct: Array) -> list[int]:
    """Positions of the images to show: first those on which some teachers are wrong, but not all.

    Of these, the more are wrong the sooner.
    """
    wrong = (~correct).sum(1)
    wrong[wrong == correct.shape[1]] = 0
    return [int(place) for place in np.argsort(-wrong, kind="stable")[:MOST_CARDS]]


def _card(gallery: Gallery, place: int, group: Group) -> dict[str, Any]:
    heads = (gallery.logit[place].tolist(), gallery.feature[place].tolist())
    labelled = gallery.targets[place] != UNKNOWN
    right = gallery.correct[place].tolist() if labelled else [None] * len(group.teachers)
    return {
        "source": data_uri(gallery.images[place]),
        "index": int(gallery.index[place]),
        "target": f"{'class ' if labelled else ''}{gallery.names[place]}",
        "teachers": list(zip(group.teachers, right, *heads, strict=True)),
    }


def data_uri(image: Array) -> str:
    """A PNG of an image (K, H, W); of other than three channels the first is shown in grey."""
    step = -(-max(image.shape[1:]) // LARGEST_SIDE)
    image = image[:, ::step, ::step]
    pixels = np.moveaxis(image if len(image) == 3 else np.repeat(image[:1], 3, axis=0), 0, -1)
    buffer = BytesIO()
    matplotlib.image.imsave(buffer, np.ascontiguousarray(pixels), format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
