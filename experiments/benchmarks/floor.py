"""What no step can do without: the reader's measure of what is left to save."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.benchmarks.contestant import make_env
from experiments.config import ExperimentConfig
from mtkd_env import Assembly
from mtkd_env.losses import cross_entropy
from mtkd_env.precision import autocast, widen
from mtkd_env.terms import Distillation
from mtkd_env.types import TeacherOutputs

FLOOR, STUDENT, MAPPED, STORED = "floor", "student", "mapped", "stored"

ABOUT: Mapping[str, str] = {
    FLOOR: "forward of all teachers; forward, backward and optimiser of the student alone",
    STUDENT: f"the {FLOOR} without the teachers, as if their outputs were free",
    MAPPED: f"the {STUDENT} and what maps it to the teachers, without the losses of the maps; the "
    f"{STUDENT} alone where no map is compared",
    STORED: "a bare loop of equal weights with the teachers' outputs in tensors: forward, the "
    "losses, backward and optimiser of the student and what maps it to the teachers",
}


def floor(
    assembly: Assembly, config: ExperimentConfig, steps: int, *, teachers: bool = True
) -> Callable[[], None]:
    """What no step can do without, on one batch again and again.

    A forward of all teachers; a forward of the student, its backward from the cross-entropy, and
    its optimiser, all in the configured precision; the gradients of fp16 are not scaled. No batch
    is made, no map is compared, nothing is weighted or rewarded.

    Args:
        assembly: Images and teachers.
        config: Student and optimiser.
        steps: Steps of a call.
        teachers: Whether the teachers are asked.
    """
    env = assembly.env
    ensemble, batch = env.distiller.teachers, next(env.stream)
    student = make_env(assembly, config).distiller.student.train()

    def loss() -> Tensor:
        if teachers:
            ensemble(batch.inputs)
        with autocast(config.precision, env.device):
            logits = student(batch.inputs).logits
        return cross_entropy(logits, batch.targets).mean()

    return _training(student, loss, config, env.steps_per_epoch, steps)


def stored(
    assembly: Assembly, config: ExperimentConfig, steps: int, *, compared: bool = True
) -> Callable[[], None]:
    """Equ. 2 at equal weights as one would write it by hand, on one batch again and again.

    Args:
        assembly: Images and teachers, which are asked once.
        config: Student, distillation and optimiser; the losses are those of the paper.
        steps: Steps of a call.
        compared: Whether there are losses; else maps are only made, and gradients sent through.
    """
    env = assembly.env
    batch = next(env.stream)
    known = env.distiller.teachers(batch.inputs)
    module = make_env(assembly, config).distiller.module.train()
    # Without feature terms a bare loop has no use for maps.
    trained = module if config.distillation.beta else module.student

    def loss() -> Tensor:
        with autocast(config.precision, env.device):
            found = trained(batch.inputs)
        output, maps = (found.output, found.projected) if trained is module else (found, ())
        logits = widen(output.logits)
        own = cross_entropy(logits, batch.targets).mean()
        if compared:
            return own + _teachers_terms(logits, maps, known, config.distillation)
        return own + sum(one.sum() / one.numel() for one in maps)

    return _training(trained, loss, config, env.steps_per_epoch, steps)


def _teachers_terms(
    logits: Tensor, maps: tuple[Tensor, ...], known: TeacherOutputs, distillation: Distillation
) -> Tensor:
    temperature = distillation.temperature
    ours = functional.log_softmax(logits / temperature, dim=1).expand_as(known.logits)
    theirs = functional.log_softmax(known.logits / temperature, dim=2)
    divergence = functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    count = len(known.logits)
    total = distillation.alpha * temperature**2 / (count * len(logits)) * divergence
    for one, other in zip(maps, known.feature_maps, strict=False):
        total = total + distillation.beta / count * functional.mse_loss(widen(one), widen(other))
    return total


def _training(
    trained: nn.Module,
    loss: Callable[[], Tensor],
    config: ExperimentConfig,
    steps_per_epoch: int,
    steps: int,
) -> Callable[[], None]:
    optimizer, _ = config.optimizer.build(trained, steps_per_epoch)

    def work() -> None:
        for _ in range(steps):
            found = loss()
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(found)
            optimizer.step()

    return work


# What is always measured too, made of the assembly, the configuration and the steps of a call.
BOUNDS: Mapping[str, Callable[[Assembly, ExperimentConfig, int], Callable[[], None]]] = {
    STUDENT: partial(floor, teachers=False),
    FLOOR: floor,
    MAPPED: partial(stored, compared=False),
    STORED: stored,
}
