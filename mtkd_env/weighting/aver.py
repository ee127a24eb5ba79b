"""AVER: every teacher counts the same for every sample."""

from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting.base import Weighting


class Aver(Weighting):
    """w = 1/M in both heads: AVER(KD+FitNet); with β = 0, AVER(KD) (Table 1 of the paper)."""

    def __call__(self, state: DistillState) -> TeacherWeights:
        """Weights 1/M on the device of the state."""
        return TeacherWeights.uniform(state.divergence)
