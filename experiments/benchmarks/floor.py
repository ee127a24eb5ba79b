"""What no step can do without: the reader's measure of what is left to save."""

from collections.abc import Callable

import torch
from torch import nn

from experiments.benchmarks.shared import make_env
from experiments.config import ExperimentConfig
from mtkd_env import Assembly
from mtkd_env.precision import autocast, widen

FLOOR, STUDENT = "floor", "student"

ABOUT_FLOOR = (
    f"{FLOOR}: forward of all teachers; forward, backward and optimiser of the student alone"
)

ABOUT_STUDENT = f"{STUDENT}: the {FLOOR} without the teachers, as if their outputs were free"


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
    optimizer, _ = config.optimizer.build(student, env.steps_per_epoch)

    def work() -> None:
        for _ in range(steps):
            if teachers:
                ensemble(batch.inputs)
            with autocast(config.precision, env.device):
                logits = student(batch.inputs).logits
            loss = nn.functional.cross_entropy(widen(logits), batch.targets)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()

    return work
