"""What the learning agents of this package are made of, beside the algorithms."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, optim

from mtkd_env import distributed
from mtkd_env.optimization import forget_gradients

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


def descend(optimizer: optim.Optimizer, losses: Iterable[Float[Tensor, ""]]) -> None:
    """One step of an optimiser by the sum of some losses.

    If the losses are made one by one, one graph is in memory at a time.
    """
    forget_gradients(optimizer)
    for loss in losses:
        loss.backward()
    follow_gradients(optimizer)


def follow_gradients(optimizer: optim.Optimizer) -> None:
    """One step of an optimiser by the gradients that are there; their mean of several processes."""
    distributed.average_gradients(p for group in optimizer.param_groups for p in group["params"])
    optimizer.step()
