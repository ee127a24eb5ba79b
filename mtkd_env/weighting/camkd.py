"""CA-MKD: teachers that are sure of the true class count more."""

import torch

from mtkd_env import losses
from mtkd_env.action import confidence_weights
from mtkd_env.distiller import Distiller
from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting.base import Weighting, scale_of


class CAMKD(Weighting):
    """Weights by cross-entropy with the true class: (1 − softmax_m(CE^m)) / (M − 1).

    Zhang et al., "Confidence-Aware Multi-Teacher Knowledge Distillation" (ICASSP 2022). For the
    logit head, CE^m is the teacher's own. For the feature head it is that of teacher m's
    classifier on the student's map in the teacher's space, r_m(F).

    Deviations: the weights sum to 1 (`simplex`); the official code divides both terms by M once
    more (`official`). No gradient flows through the feature weights, and the feature term is
    there from the first epoch. The published α, β, T are 1, 50, 4.

    Args:
        weight_norm: `simplex` or `official`.

    Raises:
        ConfigError: Unknown `weight_norm`.
    """

    needs_label = True

    def __init__(
        self, distiller: Distiller, *, seed: int = 0, weight_norm: str = "simplex"
    ) -> None:
        super().__init__(distiller, seed=seed)
        self._scale = scale_of(weight_norm, official=1 / len(distiller.teachers))

    @torch.no_grad()
    def __call__(self, state: DistillState) -> TeacherWeights:
        """Weights by the teachers' confidence, and by that of their classifiers in the student."""
        logits = self.distiller.teachers.classify(state.projected)
        projected = losses.teacher_cross_entropy(logits, state.batch.labels, state.teachers.known)
        return TeacherWeights(
            logit=self._scale * confidence_weights(state.teacher_cross_entropy).logit,
            feature=self._scale * confidence_weights(projected).feature,
        )
