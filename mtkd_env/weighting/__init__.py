"""Classical weightings: formulas from what is known of a batch to teacher weights.

To add one: a file with the formula, and a line in `WEIGHTINGS`.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting.aver import Aver


class Weighting(Protocol):
    """Weights every teacher of every sample; rows of both heads lie on the simplex."""

    def __call__(self, state: DistillState) -> TeacherWeights:
        """Weights (B, M) of both heads."""
        ...


WEIGHTINGS: Mapping[str, Callable[..., Weighting]] = {
    "aver": Aver,
}
