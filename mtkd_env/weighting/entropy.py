"""ENTROPY: teachers that have little doubt count more, as sharply as wanted."""

import torch

from mtkd_env.distiller import Distiller
from mtkd_env.errors import check_positive
from mtkd_env.losses import predictive_entropy
from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting.base import Weighting


class Entropy(Weighting):
    """softmax over the teachers of −s H, with the entropy H of their predictions, in both heads.

    What ensembles of teachers that know different things are often weighted by; needs no label.
    `ebkd` is the published rule of the same kind, nearly flat for many teachers.

    Args:
        distiller: See `Weighting`.
        seed: Unused.
        sharpness: s.

    Raises:
        ConfigError: A sharpness that is not positive.
    """

    def __init__(self, distiller: Distiller, *, seed: int = 0, sharpness: float = 1.0) -> None:
        super().__init__(distiller, seed=seed)
        check_positive(sharpness=sharpness)
        self._sharpness = sharpness

    @torch.no_grad()
    def __call__(self, state: DistillState) -> TeacherWeights:
        """Weights by entropy, the same in both heads."""
        entropy = predictive_entropy(state.teachers.logits, state.teachers.known)
        weights = (-self._sharpness * entropy).softmax(1)
        return TeacherWeights(logit=weights, feature=weights)
