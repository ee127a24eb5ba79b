"""The student's side: forward of a batch, one SGD step under given teacher weights, evaluation.

The distiller neither knows nor cares who chose the weights; every method runs through it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mtkd_env import losses
from mtkd_env.errors import ConfigError
from mtkd_env.evaluation import Evaluation, evaluate
from mtkd_env.networks.base import Network
from mtkd_env.networks.regressor import Regressor
from mtkd_env.optimization import SGDRecipe
from mtkd_env.seeding import seeded
from mtkd_env.teachers.ensemble import TeacherEnsemble
from mtkd_env.types import (
    Batch,
    DistillState,
    LossTerms,
    NetworkOutput,
    TeacherOutputs,
    TeacherWeights,
)


class StudentModule(nn.Module):
    """The student and one regressor per teacher: all that the distillation trains."""

    def __init__(self, student: Network, regressors: Iterable[Regressor]) -> None:
        super().__init__()
        self.student = student
        self.regressors = nn.ModuleList(regressors)

    def forward(self, inputs: Float[Tensor, "B K H W"]) -> tuple[NetworkOutput, tuple[Tensor, ...]]:
        """The student's output and its map in every teacher's space."""
        output: NetworkOutput = self.student(inputs)
        return output, tuple(regressor(output.feature_map) for regressor in self.regressors)


class Distiller:
    """Trains a student by M teachers under weights that come from elsewhere (Equ. 2).

    Args:
        student: Makes a new, randomly initialised student.
        teachers: The frozen teachers; they decide the device.
        image_shape: (K, H, W) of the images.
        steps_per_epoch: Batches in one epoch, which the schedule counts in.
        recipe: Optimiser and schedule of the student and the regressors.
        alpha: α, weight of the logit terms.
        beta: β, weight of the feature terms.
        temperature: T of the logit terms; the paper never states it, its code has 4.
        seed: Seed of the first student's initialisation.

    Raises:
        ConfigError: The temperature is not positive.
    """

    def __init__(
        self,
        student: Callable[[], Network],
        teachers: TeacherEnsemble,
        *,
        image_shape: tuple[int, int, int],
        steps_per_epoch: int,
        recipe: SGDRecipe | None = None,
        alpha: float = 1.0,
        beta: float = 5.0,
        temperature: float = 4.0,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if not temperature > 0:
            raise ConfigError(f"temperature: expected a number > 0, got {temperature}")
        self.device = torch.device(device)
        self.teachers = teachers.to(self.device)
        self.recipe = recipe or SGDRecipe()
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.steps_per_epoch = steps_per_epoch
        self._make_student = student
        probe = torch.zeros(1, *image_shape, device=self.device)
        self._map_sizes = [tuple(m.shape[2:]) for m in self.teachers(probe).feature_maps]
        self.reinitialize(seed)

    def reinitialize(self, seed: int) -> None:
        """Starts over with a new student, new regressors, a new optimiser and schedule."""
        with seeded(seed):
            student = self._make_student()
            regressors = [
                Regressor(student.map_channels, channels, (size[0], size[1]), signed=signed)
                for channels, size, signed in zip(
                    self.teachers.map_channels,
                    self._map_sizes,
                    self.teachers.signed_maps,
                    strict=True,
                )
            ]
        self.module = StudentModule(student, regressors).to(self.device)
        self.optimizer, self.schedule = self.recipe.build(
            self.module.parameters(), self.steps_per_epoch
        )

    @property
    def student(self) -> Network:
        """The network that is being trained."""
        student: Network = self.module.student
        return student

    @torch.enable_grad()
    def forward(self, batch: Batch, *, again: bool = False) -> DistillState:
        """Student and teachers on a batch: the student once with its graph, the teachers once.

        Args:
            batch: The batch.
            again: Whether the student's running statistics know the batch already; they then stay
                as they are.
        """
        student = self._without_statistics if again else self.module
        output, projected = student(batch.inputs)
        return self._state(batch, output, projected, self.teachers(batch.inputs))

    @torch.no_grad()
    def revisit(self, state: DistillState) -> DistillState:
        """The batch of `state` as the student sees it now; the teachers are not asked again.

        The student is in training mode, as in `forward`, but its running statistics stay as they
        are.
        """
        output, projected = self._without_statistics(state.batch.inputs)
        return self._state(state.batch, output, projected, state.teachers)

    @torch.enable_grad()
    def update(self, state: DistillState, weights: TeacherWeights) -> LossTerms:
        """One SGD step of the student on the batch of `state`.

        Minimises the mean over the batch of CE + α Σ_m w_l kd + β Σ_m w_f distance (Equ. 2).

        Args:
            state: What `forward` gave for the batch; its graph is used up.
            weights: Weights of the teachers; gradients flow into them if they carry a graph.

        Returns:
            The terms of the loss before the step.
        """
        total = (
            state.cross_entropy
            + self.alpha * (weights.logit * state.kd).sum(1)
            + self.beta * (weights.feature * state.feature_distance).sum(1)
        )
        self.optimizer.zero_grad(set_to_none=True)
        total.mean().backward()
        self.optimizer.step()
        self.schedule.step()
        return LossTerms(
            cross_entropy=state.cross_entropy.detach(),
            kd=state.kd.detach(),
            feature=state.feature_distance.detach(),
            total=total.detach(),
        )

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """The student's result on a finite iterable of batches."""
        return evaluate(self.student, batches)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training has changed."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def _without_statistics(self, inputs: Tensor) -> tuple[NetworkOutput, tuple[Tensor, ...]]:
        """The module's output in training mode; running statistics are written to copies."""
        copies = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        output: tuple[NetworkOutput, tuple[Tensor, ...]]
        output = functional_call(self.module, copies, (inputs,))
        return output

    def _state(
        self,
        batch: Batch,
        output: NetworkOutput,
        projected: tuple[Tensor, ...],
        teachers: TeacherOutputs,
    ) -> DistillState:
        kd = losses.kd_divergence(output.logits, teachers.logits, self.temperature)
        with torch.no_grad():
            similarity = losses.feature_cosine(projected, teachers.feature_maps)
        return DistillState(
            batch=batch,
            student=output,
            teachers=teachers,
            projected=projected,
            cross_entropy=losses.cross_entropy(output.logits, batch.targets),
            kd=kd,
            feature_distance=losses.feature_mse(projected, teachers.feature_maps),
            teacher_cross_entropy=losses.teacher_cross_entropy(teachers.logits, batch.targets),
            divergence=kd.detach(),
            similarity=similarity,
        )
