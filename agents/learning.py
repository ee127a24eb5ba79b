"""What the learning agents of this package are made of, beside the algorithms."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import optim

# Fused: of networks this small, a step is as many calls as there are operations.
OPTIMIZERS: Mapping[str, Callable[..., optim.Optimizer]] = {
    "adam": partial(optim.Adam, fused=True),
    "sgd": partial(optim.SGD, fused=True),
}


class StepCount:
    """Counts the steps of an optimiser from now on.

    Attributes:
        steps: How many there were.
    """

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.steps = 0
        optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The number."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Goes on from what `state_dict` gave."""
        self.steps = int(state["steps"])
