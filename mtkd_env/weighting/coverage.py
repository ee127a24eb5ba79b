"""COVERAGE: a teacher counts more for the classes that it names more often than others do."""

import torch
from jaxtyping import Float
from torch import Tensor

from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting.base import Weighting


def coverage_weights(
    logits: Float[Tensor, "M B C"], class_probabilities: Float[Tensor, "M C"]
) -> Float[Tensor, "B M"]:
    """w_i^m ∝ Σ_c P_m(c) p̄_i(c), p̄ the mean of the teachers' probabilities.

    Args:
        logits: The teachers' logits.
        class_probabilities: P_m, each teacher's mean probabilities over many images.
    """
    mean = logits.float().softmax(-1).mean(0)
    shares = mean @ class_probabilities.T
    return shares / shares.sum(1, keepdim=True)


class Coverage(Weighting):
    """Weights by where each teacher was raised, which its mean probabilities show, in both heads.

    Needs no label: P_m is taken over all of the student's images, once.
    """

    @torch.no_grad()
    def __call__(self, state: DistillState) -> TeacherWeights:
        """Weights by coverage, the same in both heads."""
        known = self.distiller.reference.class_probabilities
        weights = coverage_weights(state.teachers.logits, known)
        return TeacherWeights(logit=weights, feature=weights)
