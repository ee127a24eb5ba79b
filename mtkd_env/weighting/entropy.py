"""ENTROPY: teachers that have little doubt count more, as sharply as wanted."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from mtkd_env.distiller import Distiller
from mtkd_env.errors import check_positive
from mtkd_env.losses import predictive_entropy
from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting.base import Weighting


class Doubt(Weighting):
    """softmax over the teachers of −s times how much each is doubted, in both heads.

    Args:
        sharpness: s.

    Raises:
        ConfigError: A sharpness that is not positive.
    """

    def __init__(self, distiller: Distiller, *, seed: int = 0, sharpness: float = 1.0) -> None:
        super().__init__(distiller, seed=seed)
        check_positive(sharpness=sharpness)
        self._sharpness = sharpness

    @abstractmethod
    def doubts(self, state: DistillState) -> Float[Tensor, "B M"]:
        """How much each teacher is doubted, of every sample [nats]."""

    @torch.no_grad()
    def __call__(self, state: DistillState) -> TeacherWeights:
        """The weights, the same in both heads."""
        weights = (-self._sharpness * self.doubts(state)).softmax(1)
        return TeacherWeights(logit=weights, feature=weights)


class Entropy(Doubt):
    """softmax over the teachers of −s H, with the entropy H of their predictions, in both heads.

    What ensembles of teachers that know different things are often weighted by; needs no label.
    `ebkd` is the published rule of the same kind, nearly flat for many teachers. See `Doubt`.
    """

    def doubts(self, state: DistillState) -> Float[Tensor, "B M"]:
        """The entropies."""
        return predictive_entropy(state.teachers.logits, state.teachers.known)
