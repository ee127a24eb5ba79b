"""Stochastic gradient descent with the field's step schedule, for students and teachers alike."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from mtkd_env.errors import ConfigError


@dataclass(frozen=True)
class SGDRecipe:
    """SGD whose learning rate falls by a factor at fixed fractions of the training.

    The defaults are the CIFAR-100 student's of the paper: 240 epochs, lr 0.05, divided by ten
    after epochs 150, 180 and 210 (the paper prints "multiplied by 10"; its code divides).

    Attributes:
        epochs: Passes over the training images.
        lr: Initial learning rate.
        momentum: Momentum.
        weight_decay: L2 coefficient.
        nesterov: Whether the momentum is Nesterov's; ignored at momentum 0.
        milestones: Fractions of the training at which the learning rate falls.
        decay: Factor of each fall.

    Raises:
        ConfigError: No epoch, a negative rate, momentum or decay of the weights, or a milestone
            that is not a fraction.
    """

    epochs: int = 240
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = True
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    decay: float = 0.1

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"epochs: expected at least 1, got {self.epochs}")
        for name in ("lr", "momentum", "weight_decay"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"{name}: expected a number >= 0, got {value}")
        if any(not 0 < fraction <= 1 for fraction in self.milestones):
            raise ConfigError(
                f"milestones: expected fractions of the training in (0, 1], got {self.milestones}"
            )

    def build(self, parameters: Iterable[Tensor], steps_per_epoch: int) -> tuple[SGD, MultiStepLR]:
        """The optimiser and its schedule, which is to be stepped after every update."""
        optimizer = SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov and self.momentum > 0,
        )
        # At the end of an epoch, as published schedules have it; never before the first has ended.
        ends = [max(1, round(fraction * self.epochs)) for fraction in self.milestones]
        steps = [end * steps_per_epoch for end in ends]
        return optimizer, MultiStepLR(optimizer, milestones=steps, gamma=self.decay)
