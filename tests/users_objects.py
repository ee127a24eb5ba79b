"""Objects as a user might have them, which the tests name as `users_objects:Name`."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting import Weighting

SIZE = 8


class Squares(Dataset[Any]):
    """Images of one brightness for each of three classes, in any form."""

    classes = ("dark", "grey", "bright")

    def __init__(
        self, count: int = 12, make: Callable[[np.ndarray], Any] = Image.fromarray
    ) -> None:
        self.make = make
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> tuple[Any, int]:
        label = position % 3
        return self.make(np.full((SIZE, SIZE, 3), 100 * label, dtype=np.uint8)), label


def squares(count: int = 12) -> dict[str, Squares]:
    return {"train": Squares(count), "test": Squares(6), "val": Squares(3)}


class Confident(Weighting):
    """Weights by the largest probability; takes no seed."""

    def __init__(self, distiller: Any, power: float = 1.0) -> None:
        super().__init__(distiller)
        self.power = power

    def __call__(self, state: DistillState) -> TeacherWeights:
        weights = (self.power * state.teachers.logits.softmax(-1).amax(-1).T).softmax(1)
        return TeacherWeights(logit=weights, feature=weights)


def pays(state: Any, distillation: Any) -> Tensor:
    return -distillation.alpha * state.teacher_cross_entropy


def gap(comparison: Any) -> Tensor:
    return (comparison.logits - comparison.teachers.logits).square().mean(-1).T


def sure(state: DistillState) -> Tensor:
    return state.teachers.logits.softmax(-1).amax(-1).T
