"""HELDOUT_CONSTANT: the teacher that is best on the labelled images, for every sample."""

import torch

from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting.base import Weighting


class HeldOutConstant(Weighting):
    """All weight on the teacher with the highest accuracy on the labelled images, in both heads.

    The control of everything that tells samples apart: what a few labels are worth to somebody who
    only asks which teacher is the best. Equally good ones share it.
    """

    @torch.no_grad()
    def __call__(self, state: DistillState) -> TeacherWeights:
        """The same row for every sample."""
        known = self.distiller.reference.labelled
        assert known.teachers is not None
        right = (known.teachers.logits.argmax(-1) == known.targets).sum(1)
        best = (right == right.max()).to(state.divergence)
        weights = (best / best.sum()).expand_as(state.divergence)
        return TeacherWeights(logit=weights, feature=weights)
