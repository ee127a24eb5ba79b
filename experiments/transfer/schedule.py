"""Optimiser and learning rate of a task's training."""

from dataclasses import dataclass
from typing import Literal

from mtkd_env.errors import ConfigError, check_at_least_1, check_choice, check_not_negative
from mtkd_env.optimization import Recipe
from mtkd_env.options import Options

# What has the same name and meaning in a `Recipe`.
SHARED = ("lr", "momentum", "weight_decay", "decay", "min_lr", "power")


@dataclass(frozen=True)
class Schedule(Options):
    """How a network is trained: SGD with a learning rate that depends on the step alone.

    Attributes:
        lr: Learning rate after the warm-up.
        momentum: Momentum.
        weight_decay: L2 coefficient.
        kind: step falls at the milestones; poly is lr (1 - t)^power at the share t of the training.
        milestones: Epochs, or iterations if these are given, after which the rate of step falls.
        decay: Factor of each fall.
        power: Exponent of poly.
        min_lr: Learning rate that poly ends at.
        warmup_steps: Steps in which the learning rate rises linearly to lr.
        warmup_factor: Share of lr that it rises from.
        epochs: Length of the training in passes over the images; or else
        iterations: in steps.
        clip: Largest norm of the gradient of all parameters together; no limit by default.

    Raises:
        ConfigError: A value out of its range, or not exactly one length.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    kind: Literal["step", "poly"] = "step"
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    power: float = 0.9
    min_lr: float = 0.0
    warmup_steps: int = 0
    warmup_factor: float = 0.001
    epochs: int | None = None
    iterations: int | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.epochs is None) == (self.iterations is None):
            raise ConfigError(
                "expected either epochs or iterations, got "
                f"epochs {self.epochs} and iterations {self.iterations}"
            )
        check_choice(("step", "poly"), kind=self.kind)
        for length in ("epochs", "iterations"):
            if (count := getattr(self, length)) is not None:
                check_at_least_1(**{length: count})
        for end in self.milestones:
            check_at_least_1(milestones=end)
        check_not_negative(warmup_steps=self.warmup_steps)
        if not 0 <= self.warmup_factor <= 1:
            raise ConfigError(
                f"warmup_factor: expected a share in [0, 1], got {self.warmup_factor}"
            )
        self.recipe(1 + self.warmup_steps)

    def recipe(self, steps_per_epoch: int) -> Recipe:
        """The same with steps in place of epochs.

        Raises:
            ConfigError: The warm-up is longer than the training.
        """
        steps = self.iterations or (self.epochs or 0) * steps_per_epoch
        if self.warmup_steps > steps:
            raise ConfigError(
                f"warmup_steps: expected 0 to {steps}, all steps of the training, got "
                f"{self.warmup_steps}"
            )
        unit = 1 if self.iterations is not None else steps_per_epoch
        try:
            return Recipe(
                **{name: getattr(self, name) for name in SHARED},
                epochs=steps,
                nesterov=False,
                milestones=tuple(e * unit / steps for e in self.milestones if e * unit <= steps),
                schedule=self.kind,
                warmup_epochs=float(self.warmup_steps),
                warmup_lr=self.warmup_factor * self.lr,
                clip_norm=self.clip,
            )
        except ConfigError as error:
            raise ConfigError(str(error).replace("clip_norm", "clip")) from None
