"""What all classical weightings have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError, lookup
from mtkd_env.inference import leave_inference
from mtkd_env.types import DistillState, TeacherWeights


class Weighting(ABC):
    """Weights every teacher of every sample; rows of both heads lie on the simplex.

    A weighting with parameters of its own learns in `after_update`; the student is trained by
    `Distiller.update` in any case, so at equal weights all weightings train it equally.

    Args:
        distiller: The distillation that is weighted: its teachers, its student, its constants.
        seed: Seed of everything the weighting draws.

    Attributes:
        needs_label: Whether it looks at the label of the sample that it weights the teachers of.
        needs_maps: Whether it looks at the teachers' whole feature maps.

    Raises:
        ConfigError: It does, and labels are missing.
    """

    needs_label = False
    needs_maps = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        leave_inference(cls, "__call__", "after_update")

    def __init__(self, distiller: Distiller, *, seed: int = 0) -> None:
        if self.needs_label and not distiller.complete:
            name = type(self).__name__
            raise ConfigError(f"{name}: needs the label of every sample, and some are missing")
        self.distiller = distiller
        self.seed = seed

    @abstractmethod
    def __call__(self, state: DistillState) -> TeacherWeights:
        """Weights (B, M) of both heads, without a graph; the state's graph stays usable."""

    def after_update(self, state: DistillState) -> None:
        """Learns from a batch once the student has: does nothing without parameters.

        Args:
            state: What the weights were computed from; its graph has been used up.
        """
        del state

    def state_dict(self) -> dict[str, Any]:
        """Everything that learning has changed; empty for weightings that do not learn."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        del state


def scale_of(weight_norm: str, *, official: float) -> float:
    """What the rows of a method's weights sum to.

    Published codes hide factors such as 1/M in their weights, which makes methods that only
    weight teachers differently distil more or less strongly as well.

    Args:
        weight_norm: `simplex` for 1, the same for all methods, or `official`.
        official: The factor of the method's published code.

    Raises:
        ConfigError: Any other value.
    """
    return lookup({"simplex": 1.0, "official": official}, weight_norm, "weight_norm")
