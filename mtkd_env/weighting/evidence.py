"""The parts of the paper's weights that need no agent, alone and fused (Equ. 9-12)."""

import torch

from mtkd_env.action import PARTS, WeightFusion, fusion_coefficients
from mtkd_env.distiller import Distiller
from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting.base import Weighting


class Evidence(Weighting):
    """The fusion of Equ. 9-14 around equal generated weights.

    Confidence-aware weights are large for teachers that are sure of the true class,
    divergence-aware weights for teachers that are far from the student in the logits, and near it
    in the features.

    Args:
        fusion: A name in `FUSIONS`, such as `confidence`, `divergence`, `confidence+divergence`.

    Raises:
        ConfigError: Unknown fusion.
    """

    def __init__(self, distiller: Distiller, *, seed: int = 0, fusion: str) -> None:
        self.needs_label = fusion_coefficients(fusion)[PARTS.index("confidence")] > 0
        super().__init__(distiller, seed=seed)
        self._fusion = WeightFusion(fusion).to(distiller.device)

    @torch.no_grad()
    def __call__(self, state: DistillState) -> TeacherWeights:
        """The fused weights, with their parts."""
        size, teachers = state.divergence.shape
        return self._fusion(state.divergence.new_zeros(size, 2 * teachers), state)
