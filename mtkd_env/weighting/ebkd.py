"""EB-KD: teachers with low predictive entropy count more."""

import torch
from jaxtyping import Float
from torch import Tensor

from mtkd_env.action import complement
from mtkd_env.distiller import Distiller
from mtkd_env.losses import predictive_entropy
from mtkd_env.types import DistillState, Known, TeacherWeights
from mtkd_env.weighting.base import Weighting, scale_of


def entropy_weights(logits: Float[Tensor, "M B C"], known: Known = None) -> Float[Tensor, "B M"]:
    """(1 − H_i^m / Σ_k H_i^k) / (M − 1); 1/M where no teacher has any doubt."""
    entropy = predictive_entropy(logits, known)
    total = entropy.sum(1, keepdim=True)
    shares = torch.where(total > 0, entropy / total, 1 / entropy.shape[1])
    return complement(shares)


class EBKD(Weighting):
    """Weights by the entropy of the teachers' predictions, in both heads.

    Kwon et al., "Adaptive Knowledge Distillation Based on Entropy" (ICASSP 2020), as the code of
    CA-MKD has it.

    Deviations: the weights sum to 1 (`simplex`); the code that later papers compare with has
    (M − 1)/M (`official`). That paper distils logits only; here the same weights also serve the
    feature terms, if there are any.

    Args:
        weight_norm: `simplex` or `official`.

    Raises:
        ConfigError: Unknown `weight_norm`.
    """

    def __init__(
        self, distiller: Distiller, *, seed: int = 0, weight_norm: str = "simplex"
    ) -> None:
        super().__init__(distiller, seed=seed)
        teachers = len(distiller.teachers)
        self._scale = scale_of(weight_norm, official=(teachers - 1) / teachers)

    @torch.no_grad()
    def __call__(self, state: DistillState) -> TeacherWeights:
        """Weights by entropy, the same in both heads."""
        weights = self._scale * entropy_weights(state.teachers.logits, state.teachers.known)
        return TeacherWeights(logit=weights, feature=weights)
