"""Teachers that are asked about several batches in one call.

They depend on the images alone, so they need not wait for the student. On a GPU a call for many
images costs little more than one for a few.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch

from mtkd_env.data.stream import EpochPlan
from mtkd_env.teachers.ensemble import TeacherEnsemble
from mtkd_env.types import Batch

# Images in a call of the teachers on a GPU, if nothing else was said.
IMAGES_AT_ONCE = 512


def batches_at_once(prefetch: int | None, batch_size: int, device: torch.device) -> int:
    """How many batches the teachers are asked about together.

    Args:
        prefetch: What the user wants; None for what suits the device: on a CPU only calls for small
            images gain by being larger.
        batch_size: Images in a batch.
        device: Where the teachers are.
    """
    if prefetch is not None:
        return prefetch
    return max(1, IMAGES_AT_ONCE // batch_size) if device.type == "cuda" else 1


def ask_together(
    teachers: TeacherEnsemble, count: int, batches: Iterator[Batch], _plan: EpochPlan
) -> Iterator[Batch]:
    """The batches of an epoch, each with the teachers' outputs on it, asked for so many at once."""
    while group := list(islice(batches, count)):
        known = teachers(torch.cat([batch.inputs for batch in group]))
        size = len(group[0].targets)
        for place, batch in enumerate(group):
            yield replace(batch, teachers=known.take(slice(place * size, (place + 1) * size)))
