"""Between the classes of a data set and those that a teacher has outputs for."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mtkd_env.types import UNKNOWN, UNKNOWN_LOGIT


def over_all_classes(
    logits: Float[Tensor, "B own"], classes: Int64[Tensor, " own"] | None, num_classes: int
) -> Float[Tensor, "B C"]:
    """A teacher's logits, with `UNKNOWN_LOGIT` for the classes that it does not know.

    Args:
        logits: One for each of its outputs.
        classes: The class that each output is of; None if they are those of the data set.
        num_classes: C.
    """
    if classes is None:
        return logits
    everywhere = logits.new_full((len(logits), num_classes), UNKNOWN_LOGIT)
    return everywhere.index_copy(1, classes, logits)


def own_targets(
    targets: Int64[Tensor, " N"], classes: Sequence[int] | None, num_classes: int
) -> Int64[Tensor, " N"]:
    """Which of a teacher's outputs is of each image's class; `UNKNOWN` where none is.

    Args:
        targets: Classes of the images, `UNKNOWN` without a label.
        classes: The class that each output is of; None if they are those of the data set.
        num_classes: C.
    """
    if classes is None:
        return targets
    # One class more, at -1, which is that of images without a label.
    outputs = torch.full((num_classes + 1,), UNKNOWN)
    outputs[list(classes)] = torch.arange(len(classes))
    return outputs.to(targets.device)[targets]
