"""The student's side: forward of a batch, one SGD step under given teacher weights, evaluation.

The distiller neither knows nor cares who chose the weights; every method runs through it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mtkd_env import losses
from mtkd_env.errors import ConfigError
from mtkd_env.evaluation import Evaluation, evaluate
from mtkd_env.networks.base import Network
from mtkd_env.networks.regressor import FeatureProjection, Regressor
from mtkd_env.optimization import SGDRecipe
from mtkd_env.seeding import seeded
from mtkd_env.teachers.ensemble import TeacherEnsemble
from mtkd_env.terms import (
    FEATURE_TERMS,
    LOGIT_TERMS,
    Comparison,
    Terms,
    combine,
    needs_directions,
    parse_terms,
)
from mtkd_env.types import (
    Batch,
    DistillState,
    LossTerms,
    NetworkOutput,
    TeacherOutputs,
    TeacherWeights,
)


class StudentView(NamedTuple):
    """What the student makes of a batch.

    Attributes:
        output: Its own output.
        projected: Its feature map in the space of every teacher's, r_m(F).
        embedded: Its feature in the space of every teacher's; empty unless a loss needs it.
    """

    output: NetworkOutput
    projected: tuple[Tensor, ...]
    embedded: tuple[Tensor, ...]


class StudentModule(nn.Module):
    """The student and what maps it to each teacher's space: all that the distillation trains."""

    def __init__(
        self,
        student: Network,
        regressors: Iterable[Regressor],
        projections: Iterable[FeatureProjection] = (),
    ) -> None:
        super().__init__()
        self.student = student
        self.regressors = nn.ModuleList(regressors)
        self.projections = nn.ModuleList(projections)

    def forward(self, inputs: Float[Tensor, "B K H W"]) -> StudentView:
        """The student's output, and its map and feature in every teacher's space."""
        output: NetworkOutput = self.student(inputs)
        return StudentView(
            output,
            tuple(regressor(output.feature_map) for regressor in self.regressors),
            tuple(projection(output.feature) for projection in self.projections),
        )


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
        logit: Losses of the logit terms: a name in `LOGIT_TERMS`, `none`, or names with
            coefficients.
        feature: Losses of the feature terms, likewise in `FEATURE_TERMS`.
        directions: Mean feature (C, D_m) of every class, for each teacher; needed by `nd`. See
            `mtkd_env.teachers.class_means`.
        seed: Seed of the first student's initialisation.

    Raises:
        ConfigError: The temperature is not positive, an unknown loss, or missing directions.
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
        logit: Terms = "kd",
        feature: Terms = "mse",
        directions: tuple[Tensor, ...] = (),
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if not temperature > 0:
            raise ConfigError(f"temperature: expected a number > 0, got {temperature}")
        self.logit_terms = parse_terms(logit, LOGIT_TERMS, "logit")
        self.feature_terms = parse_terms(feature, FEATURE_TERMS, "feature")
        self._embeds = needs_directions(self.feature_terms)
        if self._embeds and len(directions) != len(teachers):
            raise ConfigError(
                f"directions: {feature!r} needs the class means of each of the "
                f"{len(teachers)} teachers, got {len(directions)}"
            )
        self.device = torch.device(device)
        self.teachers = teachers.to(self.device)
        self.recipe = recipe or SGDRecipe()
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.directions = tuple(means.to(self.device) for means in directions)
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
            widths = self.teachers.feature_dims if self._embeds else ()
            projections = [FeatureProjection(student.feature_dim, width) for width in widths]
        self.module = StudentModule(student, regressors, projections).to(self.device)
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
        view = self._imagine(batch.inputs, {}) if again else self.module(batch.inputs)
        return self._state(batch, view, self.teachers(batch.inputs))

    @torch.no_grad()
    def revisit(self, state: DistillState) -> DistillState:
        """The batch of `state` as the student sees it now; the teachers are not asked again.

        The student is in training mode, as in `forward`, but its running statistics stay as they
        are.
        """
        return self.imagine(state.batch, state.teachers, {})

    def imagine(
        self, batch: Batch, teachers: TeacherOutputs, parameters: Mapping[str, Tensor]
    ) -> DistillState:
        """A batch as a student with other parameters would see it; nothing is changed.

        Args:
            batch: The batch.
            teachers: The teachers' outputs on it.
            parameters: Replacements for any of `module.named_parameters()`; they may carry a graph.
        """
        return self._state(batch, self._imagine(batch.inputs, parameters), teachers)

    def distillation(self, state: DistillState, weights: TeacherWeights) -> Float[Tensor, " B"]:
        """α Σ_m w_l kd + β Σ_m w_f feature: what the teachers add to the loss of each sample."""
        logit = (weights.logit * state.kd).sum(1)
        return self.alpha * logit + self.beta * (weights.feature * state.feature).sum(1)

    @torch.enable_grad()
    def update(self, state: DistillState, weights: TeacherWeights) -> LossTerms:
        """One SGD step of the student on the batch of `state`.

        Minimises the mean over the batch of CE + α Σ_m w_l kd + β Σ_m w_f feature (Equ. 2).

        Args:
            state: What `forward` gave for the batch; its graph is used up.
            weights: Weights of the teachers; gradients flow into them if they carry a graph.

        Returns:
            The terms of the loss before the step.
        """
        total = state.cross_entropy + self.distillation(state, weights)
        self.optimizer.zero_grad(set_to_none=True)
        total.mean().backward()
        self.optimizer.step()
        self.schedule.step()
        return LossTerms(
            cross_entropy=state.cross_entropy.detach(),
            kd=state.kd.detach(),
            feature=state.feature.detach(),
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

    def _imagine(self, inputs: Tensor, parameters: Mapping[str, Tensor]) -> StudentView:
        """The module's view in training mode; running statistics are written to copies."""
        copies = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        view: StudentView = functional_call(self.module, {**copies, **parameters}, (inputs,))
        return view

    def _state(self, batch: Batch, view: StudentView, teachers: TeacherOutputs) -> DistillState:
        logits = view.output.logits
        kd = losses.kd_divergence(logits, teachers.logits, self.temperature)
        mse = losses.feature_mse(view.projected, teachers.feature_maps)
        with torch.no_grad():
            similarity = losses.feature_cosine(view.projected, teachers.feature_maps)
        comparison = Comparison(
            logits=logits,
            projected=view.projected,
            embedded=view.embedded,
            teachers=teachers,
            targets=batch.targets,
            temperature=self.temperature,
            directions=self.directions,
        )
        # The evidence of Equ. 3-6 is needed in any case, whatever the student is trained by.
        known = {"kd": kd, "mse": mse}
        return DistillState(
            batch=batch,
            student=view.output,
            teachers=teachers,
            projected=view.projected,
            cross_entropy=losses.cross_entropy(logits, batch.labels),
            kd=combine(self.logit_terms, LOGIT_TERMS, comparison, known),
            feature=combine(self.feature_terms, FEATURE_TERMS, comparison, known),
            teacher_cross_entropy=losses.teacher_cross_entropy(teachers.logits, batch.labels),
            divergence=kd.detach(),
            distance=mse.detach(),
            similarity=similarity,
        )
