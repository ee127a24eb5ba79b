"""Teachers that look at several batches at once, ahead of the student.

They depend on the images alone, so they need not wait for it. On a GPU a call for many images
costs little more to launch than one for a few, and runs while the student learns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from mtkd_env.data.stream import EpochPlan
from mtkd_env.teachers.ensemble import TeacherEnsemble
from mtkd_env.types import Batch, TeacherOutputs

# Images in a call of the teachers on a GPU, if nothing else was said.
IMAGES_AT_ONCE = 512


def batches_ahead(asked: int | None, batch_size: int, device: torch.device) -> int:
    """How many batches the teachers look at together.

    Args:
        asked: What the user wants; None for what suits the device: on a CPU larger calls save
            nothing.
        batch_size: Images in a batch.
        device: Where the teachers are.
    """
    if asked is not None:
        return asked
    return max(1, IMAGES_AT_ONCE // batch_size) if device.type == "cuda" else 1


class TeachersAhead:
    """Lets the batches of a stream bring the teachers' outputs along, computed for several at once.

    On a GPU the teachers work on a stream of their own, one call ahead of the student.

    Args:
        teachers: The teachers.
        batches: Batches in a call.
    """

    def __init__(self, teachers: TeacherEnsemble, batches: int) -> None:
        self._teachers = teachers
        self._batches = batches

    def __call__(self, batches: Iterator[Batch], plan: EpochPlan) -> Iterator[Batch]:
        """The batches, each with the outputs on it."""
        del plan
        calls = self._calls(batches)
        call = next(calls, None)
        while call is not None:
            # Begun before the student gets what is ready, so that it runs meanwhile.
            following = next(calls, None) if call.device.type == "cuda" else None
            yield from call.finish()
            call = following or next(calls, None)

    def _calls(self, batches: Iterator[Batch]) -> Iterator["_Call"]:
        side: torch.cuda.Stream | None = None
        while group := list(islice(batches, self._batches)):
            device = group[0].inputs.device
            if device.type == "cuda" and side is None:
                side = torch.cuda.Stream(device)
            yield _Call(self._teachers, group, side)


class _Call:
    """One call of the teachers, begun when it is made."""

    def __init__(
        self, teachers: TeacherEnsemble, group: Sequence[Batch], side: torch.cuda.Stream | None
    ) -> None:
        self._group = group
        self._side = side
        self.device = group[0].inputs.device
        inputs = torch.cat([batch.inputs for batch in group])
        if side is None:
            self._outputs = teachers(inputs)
            return
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self._outputs = teachers(inputs)
        self._done = side.record_event()
        # The memory of the images must not be used again before the teachers have read them.
        inputs.record_stream(side)

    def finish(self) -> Iterator[Batch]:
        """The batches, once the device has done the call."""
        outputs = self._outputs
        if self._side is not None:
            # Not for the stream as a whole, which is at the following call already.
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self._done)
            for tensor in (outputs.logits, *outputs.features, *outputs.feature_maps):
                tensor.record_stream(current)
        sizes = [len(batch.targets) for batch in self._group]
        parts = _split(outputs, sizes)
        return (
            replace(batch, teachers=part) for batch, part in zip(self._group, parts, strict=True)
        )


def _split(outputs: TeacherOutputs, sizes: Sequence[int]) -> list[TeacherOutputs]:
    """The outputs on each of several batches, as views."""

    def pieces(many: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        return list(zip(*(one.split(list(sizes)) for one in many), strict=True))

    logits = outputs.logits.split(list(sizes), dim=1)
    columns = zip(logits, pieces(outputs.features), pieces(outputs.feature_maps), strict=True)
    return [TeacherOutputs(*column) for column in columns]
