"""Optimiser and learning rate over a training, for students and teachers alike."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn, optim
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mtkd_env import distributed
from mtkd_env.errors import (
    ConfigError,
    check_arguments,
    check_at_least_1,
    check_not_negative,
    check_positive,
)
from mtkd_env.imports import Kind, Named, is_a, takes
from mtkd_env.options import Options, typed

Groups = list[dict[str, Any]]

# Fields of a recipe that only SGD knows.
MOMENTUM = ("momentum", "nesterov")


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
        weight_decay: L2 coefficient of sgd; decoupled coefficient of adamw; what others call so.
        nesterov: Whether the momentum is Nesterov's; ignored at momentum 0.
        milestones: Fractions of the training at which the learning rate of step falls.
        decay: Factor of each fall.
        optimizer: sgd, adamw, or another of torch.optim, such as nadam. Or one's own: a class of
            torch's Optimizer, or a function of (recipe, groups) that makes one, as `module:name` or
            as an object.
        betas: Decay rates of adamw's two averages, and of others that have two.
        arguments: Further keyword arguments of the optimiser, such as eps.
        schedule: step, cosine, poly or constant. Or one's own: a function of (recipe, epoch) that
            gives the learning rate as a share of lr, as `module:name` or as an object.
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
    optimizer: Named = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    arguments: dict[str, Any] = field(default_factory=dict)
    schedule: Named = "step"
    min_lr: float = 0.0
    power: float = 0.9
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    decay_norm_and_bias: bool = True
    label_smoothing: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_1(epochs=self.epochs)
        signless = ("lr", "momentum", "weight_decay", "decay", "power")
        check_not_negative(**{name: getattr(self, name) for name in signless})
        if self.clip_norm is not None:
            check_positive(clip_norm=self.clip_norm)
        for name, fits, expected in self._ranges():
            # Written so that NaN fails.
            if not fits:
                raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name)}")
        SCHEDULE.find(self.schedule)
        made = OPTIMIZER.find(self.optimizer)
        if isinstance(made, OfClass):
            made.check(self.arguments)
        elif self.arguments:
            raise ConfigError("arguments: expected none, because a function makes the optimizer")

    def _ranges(self) -> Iterator[tuple[str, bool, str]]:
        """Of some values, whether each is in its range, and the range in words."""
        fractions = all(0 < one <= 1 for one in self.milestones)
        yield "milestones", fractions, "fractions of the training in (0, 1]"
        yield "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"
        for name in ("min_lr", "warmup_lr"):
            yield name, 0 <= getattr(self, name) <= self.lr, f"0 to lr = {self.lr}"
        within = 0 <= self.warmup_epochs <= self.epochs
        yield "warmup_epochs", within, f"0 to epochs = {self.epochs}"
        yield "label_smoothing", 0 <= self.label_smoothing < 1, "a share in [0, 1)"

    def share(self, epoch: float) -> float:
        """The learning rate at a time, as a share of `lr`.

        Args:
            epoch: Time since the beginning [epochs]; from the end on, all stays as it is there.
        """
        if epoch < self.warmup_epochs:
            start = self.relative(self.warmup_lr)
            return start + (1 - start) * epoch / self.warmup_epochs
        return SCHEDULE.find(self.schedule)(self, min(epoch, float(self.epochs)))

    def relative(self, lr: float) -> float:
        """A learning rate as a share of `lr`; 0 where that is zero itself."""
        return lr / self.lr if self.lr else 0.0

    def build(self, module: nn.Module, steps_per_epoch: int) -> tuple[Optimizer, LambdaLR]:
        """The optimiser of a module's parameters, and its schedule.

        The schedule is to be stepped after every batch. Its learning rates are functions of the
        number of batches alone, so it does not matter whether the optimiser left one out, as under
        fp16. Neither makes the host wait.
        """
        optimizer = OPTIMIZER.find(self.optimizer)(self, self._groups(module))
        if isinstance(optimizer, SGD):
            optimizer.register_step_pre_hook(_begin_momentum)
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


def forget_gradients(optimizer: Optimizer) -> None:
    """Does what `zero_grad` does, without its records, which take longer than a small step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def descend(optimizer: Optimizer, losses: Iterable[Float[Tensor, ""]]) -> None:
    """One step of an optimiser by the sum of some losses.

    If the losses are made one by one, one graph is in memory at a time.
    """
    forget_gradients(optimizer)
    for loss in losses:
        loss.backward()
    follow_gradients(optimizer)


def follow_gradients(optimizer: Optimizer) -> None:
    """One step of an optimiser by the gradients that are there; their mean of several processes."""
    distributed.average_gradients(p for group in optimizer.param_groups for p in group["params"])
    optimizer.step()


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
            same = isinstance(value, Tensor) and value.shape == parameter.shape
            if same and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(value)


def _begin_momentum(optimizer: Optimizer, *_: Any) -> None:
    """Zeros as the momentum of parameters that have a gradient for the first time.

    Torch's fused SGD expects all of a group to begin in the same step, and leaves the momentum
    undefined if fp16's scaler rejects that one.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] > 0 else ():
            if parameter.grad is not None and not optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@dataclass(frozen=True)
class OfClass:
    """Makes an optimiser of a class, with those values of a recipe that it has arguments for."""

    kind: Any
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, recipe: Recipe, groups: Groups) -> Optimizer:
        """The optimiser of groups of parameters."""
        given = {name: getattr(recipe, name) for name in self._fields()}
        if "nesterov" in given:
            given["nesterov"] = recipe.nesterov and recipe.momentum > 0
        return self.kind(groups, **{**given, **self.fixed, **recipe.arguments})

    def _fields(self) -> list[str]:
        """The fields of a recipe that are arguments."""
        known = inspect.signature(self.kind).parameters
        # Elsewhere a momentum is something else, and nothing by default.
        own = MOMENTUM if is_a(self.kind, SGD) else ()
        return [name for name in ("lr", "weight_decay", "betas", *own) if name in known]

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Checks further arguments.

        Raises:
            ConfigError: One that it does not have, or that is a field of the recipe.
        """
        for name in arguments:
            if name in (*self._fields(), "params"):
                raise ConfigError(f"arguments.{name}: cannot be given here")
        check_arguments(self.kind, arguments, "arguments")
        typed(self.kind, arguments, "arguments")


# LBFGS asks for the loss again and again, Rprop for all images at once, SparseAdam for gradients of
# another kind, and Muon for nothing but matrices; what ASGD averages, nobody would read.
UNFIT = ("ASGD", "LBFGS", "Muon", "Optimizer", "Rprop", "SparseAdam")


# Those of torch that train any network by its gradient; some with what makes them faster.
OPTIMIZERS: Mapping[str, Callable[[Recipe, Groups], Optimizer]] = {
    **{
        kind.__name__.lower(): OfClass(kind)
        for kind in vars(optim).values()
        if is_a(kind, Optimizer) and kind.__name__ not in UNFIT
    },
    "sgd": OfClass(SGD, {"fused": True}),
    "adamw": OfClass(AdamW, {"fused": True}),
}

OPTIMIZER: Kind[Callable[[Recipe, Groups], Optimizer]] = Kind(
    OPTIMIZERS,
    "optimizer",
    lambda found: is_a(found, Optimizer) or takes(2)(found),
    "a class of torch.optim.Optimizer, or a function of (recipe, groups) that makes one",
    lambda found: OfClass(found) if is_a(found, Optimizer) else found,
)


def _step(recipe: Recipe, epoch: float) -> float:
    # At the end of an epoch, as published schedules have it; never before the first has ended.
    ends = [max(1, round(fraction * recipe.epochs)) for fraction in recipe.milestones]
    return recipe.decay ** sum(end <= epoch for end in ends)


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
    "cosine": lambda recipe, epoch: _to_min_lr(
        recipe, (1 + math.cos(math.pi * _done(recipe, epoch))) / 2
    ),
    "poly": lambda recipe, epoch: _to_min_lr(recipe, (1 - _done(recipe, epoch)) ** recipe.power),
    "constant": lambda *_: 1.0,
}

SCHEDULE: Kind[Callable[[Recipe, float], float]] = Kind(
    SCHEDULES,
    "schedule",
    takes(2),
    "a function of (recipe, epoch) that gives a share of lr",
)
