"""What is known of images beside the batches: the few that have labels, and all of the student's.

Nothing here is augmented. Who learns from these images, or is paid by them, spends the same labels
as everybody else.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mtkd_env import distributed
from mtkd_env.errors import ConfigError
from mtkd_env.seeding import RandomNumbers
from mtkd_env.teachers.ensemble import TeacherEnsemble, class_means
from mtkd_env.teachers.store import RowLayout
from mtkd_env.types import Batch, TeacherOutputs

# With every label there, so many are enough to learn or to be paid by, and fit into memory.
MOST_LABELLED = 4096

Pass = Callable[[], Iterable[Batch]]


class ReferenceImages:
    """Images to learn from or to be paid by, with what the teachers say of them.

    Args:
        teachers: The teachers, which are asked when an answer is first needed.
        labelled: Makes a pass over the images with labels; of several processes, each over all.
        student: Makes a pass over all of the student's images; of several processes, each over a
            share.
        complete: Whether every image that the student learns from has a label.

    Attributes:
        complete: Whether every image that the student learns from has a label.
    """

    def __init__(
        self, teachers: TeacherEnsemble, *, labelled: Pass, student: Pass, complete: bool = True
    ) -> None:
        self.complete = complete
        self._teachers = teachers
        self._labelled = labelled
        self._student = student

    @cached_property
    def labelled(self) -> Batch:
        """The labelled images as one batch, up to `MOST_LABELLED`, with the teachers' outputs.

        These are without feature maps.

        Raises:
            ConfigError: No image has a label.
        """
        parts: list[Batch] = []
        for batch in self._labelled():
            parts.append(batch)
            if sum(len(part.targets) for part in parts) >= MOST_LABELLED:
                break
        if not parts:
            raise ConfigError("data.labelled: expected at least one image with a label, got none")
        # Without maps as they come: all of them together could take gigabytes.
        outputs = [replace(self._teachers(part.inputs), feature_maps=()) for part in parts]
        return Batch(
            inputs=torch.cat([part.inputs for part in parts]),
            targets=torch.cat([part.targets for part in parts]),
            index=torch.cat([part.index for part in parts]),
            teachers=TeacherOutputs(
                logits=torch.cat([one.logits for one in outputs], dim=1),
                features=tuple(map(torch.cat, zip(*(o.features for o in outputs), strict=True))),
                feature_maps=(),
                known=outputs[0].known,
            ),
        )

    @cached_property
    def _rows(self) -> tuple[RowLayout, Tensor]:
        """What the teachers say of the labelled images, side by side."""
        teachers = self.labelled.teachers
        assert teachers is not None
        layout = RowLayout(teachers)
        return layout, layout.pack(teachers)

    def take(self, positions: Int64[Tensor, " N"]) -> Batch:
        """Some of the labelled images."""
        known, (layout, rows) = self.labelled, self._rows
        inputs, targets, index, outputs = (
            part.index_select(0, positions)
            for part in (known.inputs, known.targets, known.index, rows)
        )
        return Batch(inputs, targets, index, teachers=layout.unpack(outputs))

    @property
    def class_probabilities(self) -> Float[Tensor, "M C"]:
        """P_m: every teacher's mean probabilities over all of the student's images."""
        return self._opinions[0]

    @property
    def agreement(self) -> Float[Tensor, "M M C"]:
        """Mean over the same images of p_m(c) p_n(c): how often two teachers say the same class."""
        return self._opinions[1]

    @cached_property
    def class_means(self) -> tuple[Float[Tensor, "C D"], ...]:
        """Mean feature of every class over the same images, for each teacher."""
        return class_means(self._teachers, self._student())

    @cached_property
    def _opinions(self) -> tuple[Float[Tensor, "M C"], Float[Tensor, "M M C"]]:
        device = next(self._teachers.parameters()).device
        teachers, classes = len(self._teachers), self._teachers.num_classes
        named = torch.zeros(teachers, classes, dtype=torch.float64, device=device)
        agreed = torch.zeros(teachers, teachers, classes, dtype=torch.float64, device=device)
        count = torch.zeros((), dtype=torch.float64, device=device)
        for batch in self._student():
            probabilities = self._teachers(batch.inputs).logits.softmax(-1).double()
            named += probabilities.sum(1)
            agreed += torch.einsum("mbc,nbc->mnc", probabilities, probabilities)
            count += len(batch.targets)
        count = distributed.total(count)
        named, agreed = (distributed.total(part) / count for part in (named, agreed))
        return named.float(), agreed.float()


class LabelledDraws(RandomNumbers):
    """Draws labelled images again and again, the same ones in each of several processes."""

    def __init__(self, reference: ReferenceImages, seed: int = 0) -> None:
        super().__init__(seed)
        self._reference = reference

    def draw(self, size: int) -> Batch:
        """So many different images, or all where there are fewer, with the teachers' outputs."""
        known = self._reference.labelled
        count = len(known.targets)
        if count <= size:
            return known
        drawn = torch.randperm(count, generator=self.generator)[:size]
        return self._reference.take(drawn.to(known.targets.device, non_blocking=True))
