"""Optimiser and learning rate over a training, for students and teachers alike."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mtkd_env.errors import ConfigError
from mtkd_env.options import Options

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Recipe(Options):
    """How a network is trained: optimiser, and a learning rate that depends on the time alone.

    The defaults are the CIFAR-100 student's of the paper in an eighth of its 240 epochs, enough for
    the digits: lr 0.05, divided by ten at the same fractions, which are epochs 150, 180 and 210 of
    240 (the paper prints "multiplied by 10"; its code divides).

    Attributes:
        epochs: Passes over the training images.
        lr: Learning rate, before any of its falls.
        momentum: Momentum; of sgd only.
        weight_decay: L2 coefficient of sgd; decoupled coefficient of adamw.
        nesterov: Whether the momentum is Nesterov's; ignored at momentum 0.
        milestones: Fractions of the training at which the learning rate of step falls.
        decay: Factor of each fall.
        optimizer: sgd or adamw.
        betas: Decay rates of adamw's two averages.
        schedule: step, cosine, poly or constant.
        min_lr: Learning rate that cosine and poly end at.
        power: Exponent of poly's share of the training that is left.
        warmup_epochs: Epochs in which the learning rate rises linearly to where it begins.
        warmup_lr: Learning rate that it rises from.
        decay_norm_and_bias: Whether weight decay acts on parameters with a single axis, such as
            norms and biases, and on those that a network names in its no_weight_decay().
        label_smoothing: Part of every label that is spread evenly over all classes.
        clip_norm: Largest norm of the gradient of all parameters together; no limit by default.

    Raises:
        ConfigError: A value out of its range, or an unknown optimiser or schedule.
    """

    epochs: int = 30
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = True
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    decay: float = 0.1
    optimizer: str = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "step"
    min_lr: float = 0.0
    power: float = 0.9
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    decay_norm_and_bias: bool = True
    label_smoothing: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (fits, expected) in self._ranges().items():
            # Written so that NaN fails.
            if not fits:
                raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name)}")

    def _ranges(self) -> dict[str, tuple[bool, str]]:
        """Whether each value is in its range, and the range in words."""
        clip = 1.0 if self.clip_norm is None else self.clip_norm
        return {
            "optimizer": (self.optimizer in OPTIMIZERS, " or ".join(sorted(OPTIMIZERS))),
            "schedule": (self.schedule in SCHEDULES, ", ".join(sorted(SCHEDULES))),
            "epochs": (self.epochs >= 1, "at least 1"),
            **{
                name: (0 <= getattr(self, name) < math.inf, "a number >= 0")
                for name in ("lr", "momentum", "weight_decay", "decay", "power")
            },
            "milestones": (
                all(0 < fraction <= 1 for fraction in self.milestones),
                "fractions of the training in (0, 1]",
            ),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            "min_lr": (0 <= self.min_lr <= self.lr, f"0 to lr = {self.lr}"),
            "warmup_epochs": (
                0 <= self.warmup_epochs <= self.epochs,
                f"0 to epochs = {self.epochs}",
            ),
            "warmup_lr": (0 <= self.warmup_lr <= self.lr, f"0 to lr = {self.lr}"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "a share in [0, 1)"),
            "clip_norm": (0 < clip < math.inf, "a finite number > 0"),
        }

    def share(self, epoch: float) -> float:
        """The learning rate at a time, as a share of `lr`.

        Args:
            epoch: Time since the beginning [epochs]; from the end on, all stays as it is there.
        """
        if epoch < self.warmup_epochs:
            start = self.relative(self.warmup_lr)
            return start + (1 - start) * epoch / self.warmup_epochs
        return SCHEDULES[self.schedule](self, min(epoch, float(self.epochs)))

    def relative(self, lr: float) -> float:
        """A learning rate as a share of `lr`; 0 where that is zero itself."""
        return lr / self.lr if self.lr else 0.0

    def build(self, module: nn.Module, steps_per_epoch: int) -> tuple[Optimizer, LambdaLR]:
        """The optimiser of a module's parameters, and its schedule.

        The schedule is to be stepped after every batch. Its learning rates are functions of the
        number of batches alone, so it does not matter whether the optimiser left one out, as under
        fp16. Neither makes the host wait.
        """
        optimizer = OPTIMIZERS[self.optimizer](self, self._groups(module))
        if (limit := self.clip_norm) is not None:
            optimizer.register_step_pre_hook(lambda one, *_: _clip(one, limit))
        schedule = LambdaLR(optimizer, lambda step: self.share(step / steps_per_epoch))
        optimizer.register_load_state_dict_post_hook(_settle)
        # Without gradients it changes nothing; but torch takes the schedule to be ahead of its
        # optimiser if that leaves out the very first batch.
        optimizer.step()
        return optimizer, schedule

    def _groups(self, module: nn.Module) -> Groups:
        """The parameters in groups of one weight decay each."""
        if self.decay_norm_and_bias:
            return [{"params": list(module.parameters())}]
        exempt = set(_exempt(module))
        named = list(module.named_parameters())
        return [
            {"params": [one for name, one in named if name not in exempt]},
            {"params": [one for name, one in named if name in exempt], "weight_decay": 0.0},
        ]


def _exempt(module: nn.Module) -> Iterator[str]:
    """Names of parameters that DeiT's practice, like timm's, spares the weight decay."""
    for name, parameter in module.named_parameters():
        if parameter.ndim <= 1:
            yield name
    for prefix, part in module.named_modules():
        if callable(spared := getattr(part, "no_weight_decay", None)):
            yield from (f"{prefix}.{name}".removeprefix(".") for name in spared())


def _clip(optimizer: Optimizer, limit: float) -> None:
    clip_grad_norm_([one for group in optimizer.param_groups for one in group["params"]], limit)


def _settle(optimizer: Optimizer) -> None:
    """Puts the numbers that a fused step reads in the order of the parameters' own."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            # The kernels do not look at strides, which a parameter may have had others of.
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(value)


def _begin_momentum(optimizer: Optimizer, *_: Any) -> None:
    """Zeros as the momentum of parameters that have a gradient for the first time.

    Torch's fused SGD expects all of a group to begin in the same step, and leaves the momentum
    undefined if fp16's scaler rejects that one.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and not optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _sgd(recipe: Recipe, groups: Groups) -> Optimizer:
    optimizer = SGD(
        groups,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        fused=True,
    )
    if recipe.momentum > 0:
        optimizer.register_step_pre_hook(_begin_momentum)
    return optimizer


def _adamw(recipe: Recipe, groups: Groups) -> Optimizer:
    weight_decay = recipe.weight_decay
    return AdamW(groups, lr=recipe.lr, betas=recipe.betas, weight_decay=weight_decay, fused=True)


OPTIMIZERS: Mapping[str, Callable[[Recipe, Groups], Optimizer]] = {"sgd": _sgd, "adamw": _adamw}


def _step(recipe: Recipe, epoch: float) -> float:
    # At the end of an epoch, as published schedules have it; never before the first has ended.
    ends = [max(1, round(fraction * recipe.epochs)) for fraction in recipe.milestones]
    return recipe.decay ** sum(end <= epoch for end in ends)


def _cosine(recipe: Recipe, epoch: float) -> float:
    return _to_min_lr(recipe, (1 + math.cos(math.pi * _done(recipe, epoch))) / 2)


def _poly(recipe: Recipe, epoch: float) -> float:
    return _to_min_lr(recipe, (1 - _done(recipe, epoch)) ** recipe.power)


def _done(recipe: Recipe, epoch: float) -> float:
    """The share of the training after the warm-up that is over, from 0 to 1."""
    length = recipe.epochs - recipe.warmup_epochs
    return (epoch - recipe.warmup_epochs) / length if length else 1.0


def _to_min_lr(recipe: Recipe, share: float) -> float:
    """A share that falls from 1 to 0, so that the learning rate ends at `min_lr`."""
    floor = recipe.relative(recipe.min_lr)
    return floor + (1 - floor) * share


# The share of `lr` after the warm-up, at a time [epochs] since the beginning of the training.
SCHEDULES: Mapping[str, Callable[[Recipe, float], float]] = {
    "step": _step,
    "cosine": _cosine,
    "poly": _poly,
    "constant": lambda *_: 1.0,
}
