"""The student's side: forward of a batch, one SGD step under given teacher weights, evaluation.

The distiller neither knows nor cares who chose the weights; every method runs through it.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.func import functional_call

from mtkd_env import distributed, losses
from mtkd_env.compilation import compiled
from mtkd_env.computing import Computing
from mtkd_env.errors import ConfigError
from mtkd_env.evaluation import Evaluation, evaluate
from mtkd_env.inference import as_under_no_grad
from mtkd_env.networks.base import Network, strides_safely
from mtkd_env.networks.regressor import FeatureProjection, Regressors
from mtkd_env.optimization import Recipe, forget_gradients
from mtkd_env.precision import autocast, check_precision, widened
from mtkd_env.reference import ReferenceImages
from mtkd_env.seeding import derive_seed, seeded
from mtkd_env.teachers.ensemble import TeacherEnsemble
from mtkd_env.terms import (
    FEATURE_TERM,
    LOGIT_TERM,
    Distillation,
    TermInputs,
    combine,
)
from mtkd_env.types import (
    Batch,
    BatchEvidence,
    DistillState,
    LossTerms,
    NetworkOutput,
    TeacherOutputs,
    TeacherWeights,
)

Maps = tuple[Tensor, ...]


class StudentView(NamedTuple):
    """What the student makes of a batch.

    Attributes:
        output: Its own output.
        projected: Its feature map in the space of every teacher's, r_m(F); empty unless a loss
            needs it.
        embedded: Its feature in the space of every teacher's; empty unless a loss needs it.
    """

    output: NetworkOutput
    projected: tuple[Tensor, ...]
    embedded: tuple[Tensor, ...]


class StudentModule(nn.Module):
    """The student and what maps it to each teacher's space: all that the distillation trains.

    Args:
        student: The student.
        regressors: Map its feature map.
        projections: Map its feature.

    Attributes:
        projects: Whether its forward maps the map, which is of use where a loss needs it.
    """

    def __init__(
        self,
        student: Network,
        regressors: Regressors,
        projections: Iterable[FeatureProjection] = (),
    ) -> None:
        super().__init__()
        self.projects = True
        self.student = student
        self.regressors = regressors
        self.projections = nn.ModuleList(projections)

    def forward(self, inputs: Float[Tensor, "B K H W"]) -> StudentView:
        """The student's output, and its map and feature in every teacher's space."""
        output: NetworkOutput = self.student(inputs)
        return StudentView(
            output,
            self.regressors(output.feature_map) if self.projects else (),
            tuple(projection(output.feature) for projection in self.projections),
        )


class _Evidence(BatchEvidence):
    """Evidence that is made when it is first asked for.

    Args:
        batch: The batch.
        teachers: The teachers' outputs on it.
        project: Makes the student's map in the space of every teacher's; nothing of a batch whose
            maps nobody compares.
        mse: The mean squared distances, where the loss has needed them.
    """

    def __init__(
        self,
        batch: Batch,
        teachers: TeacherOutputs,
        project: Callable[[], Maps],
        mse: Tensor | None,
    ) -> None:
        self._batch, self._teachers, self._project, self._mse = batch, teachers, project, mse

    @cached_property
    def projected(self) -> Maps:
        return self._project()

    @cached_property
    @as_under_no_grad
    def teacher_cross_entropy(self) -> Tensor:
        known = self._teachers
        return losses.teacher_cross_entropy(known.logits, self._batch.labels, known.known)

    @cached_property
    def distance(self) -> Tensor:
        if self._mse is not None:
            return self._mse.detach()
        return self._compared(losses.feature_mse, lambda teachers: teachers.whole_maps)

    @cached_property
    def similarity(self) -> Tensor:
        return self._compared(losses.feature_cosine, lambda teachers: teachers.feature_maps)

    @as_under_no_grad
    @torch.no_grad()
    def _compared(
        self, compare: Callable[[Maps, Maps], Tensor], maps: Callable[[TeacherOutputs], Maps]
    ) -> Tensor:
        if self.projected:
            return compare(self.projected, maps(self._teachers))
        logits = self._teachers.logits
        return logits.new_zeros(logits.shape[1], logits.shape[0], dtype=torch.float32)


class Distiller:
    """Trains a student by M teachers under weights that come from elsewhere (Equ. 2).

    Args:
        student: Makes a new, randomly initialised student.
        teachers: The frozen teachers, on the device of all.
        image_shape: (K, H, W) of the images.
        steps_per_epoch: Batches in one epoch, which the schedule counts in.
        distillation: What the teachers add to the loss.
        recipe: Optimiser and schedule of the student and the regressors.
        computing: In what precision the student and the regressors compute, and how their training
            step is compiled. The gradients of fp16 are scaled.
        reference: Images beside the batches, for those who learn from labels or are paid by them,
            and for `nd`.

    The first student is that of seed 0.

    Attributes:
        skipped: Batches that were left out because something of them was NaN or infinite.

    Raises:
        ConfigError: Missing reference images, or a precision that the device does not have.
    """

    def __init__(
        self,
        student: Callable[[], Network],
        teachers: TeacherEnsemble,
        *,
        image_shape: tuple[int, int, int],
        steps_per_epoch: int,
        distillation: Distillation,
        recipe: Recipe,
        computing: Computing | None = None,
        reference: ReferenceImages | None = None,
    ) -> None:
        self.distillation = distillation
        self._terms = distillation.logit_terms, distillation.feature_terms
        self.device = next(teachers.parameters()).device
        computing = computing or Computing()
        check_precision(computing.precision, self.device)
        self.precision = computing.precision
        self._compile = computing.compile
        self.teachers = teachers
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self._make_student = student
        self._reference = reference
        self.directions = self.reference.class_means if distillation.needs_directions else ()
        self.skipped = 0
        # Two images, because of one all layouts are the same.
        self._probe = torch.zeros(2, *image_shape, device=self.device)
        maps = self.teachers(self._probe).feature_maps
        self._map_sizes = [(one.shape[2], one.shape[3]) for one in maps]
        self.reinitialize(derive_seed(0, "student"))

    def reinitialize(self, seed: int) -> None:
        """Starts over with a new student, new regressors, a new optimiser and schedule."""
        with seeded(seed):
            student = self._make_student()
            known = self.teachers
            regressors = Regressors(
                student.map_channels, known.map_channels, self._map_sizes, known.signed_maps
            )
            widths = known.feature_dims if self.distillation.needs_directions else ()
            projections = [FeatureProjection(student.feature_dim, width) for width in widths]
        module = StudentModule(student, regressors, projections).to(self.device)
        _prefer_channels_last(module, self._probe)
        module.projects = self.distillation.needs_maps
        # What no loss reaches gets no gradient, for which several processes would wait.
        module.regressors.requires_grad_(module.projects)
        self.module = distributed.synchronize_norms(module)
        self._parallel = distributed.data_parallel(self.module)
        self._compiled = compiled(self._parallel, self._compile)
        self.optimizer, self.schedule = self.recipe.build(self.module, self.steps_per_epoch)
        self.scaler = GradScaler(self.device.type, enabled=self.precision == "fp16")

    @property
    def reference(self) -> ReferenceImages:
        """Images beside the batches.

        Raises:
            ConfigError: It was made without.
        """
        if self._reference is None:
            raise ConfigError("reference: expected reference images, the distiller was given none")
        return self._reference

    @property
    def complete(self) -> bool:
        """Whether every image that the student learns from has a label."""
        return self._reference is None or self._reference.complete

    @property
    def student(self) -> Network:
        """The network that is being trained."""
        student: Network = self.module.student
        return student

    @torch.enable_grad()
    def forward(self, batch: Batch, *, again: bool = False) -> DistillState:
        """Student and teachers on a batch: the student once with its graph, the teachers once.

        Teachers that the batch brings the outputs of are not asked again.

        Args:
            batch: The batch.
            again: Whether the student's running statistics know the batch already; they then stay
                as they are.
        """
        teachers = batch.teachers or self.teachers(batch.inputs)
        if again:
            view = self._view(self._parallel, batch.inputs, _copied_buffers(self._parallel))
        else:
            view = self._view(self._compiled, batch.inputs, {})
        return self._state(batch, view, teachers)

    def forward_if_finite(self, batch: Batch) -> DistillState | None:
        """`forward`; nothing if NaN or infinity came out, after which the student is as before.

        The host waits for the device. Of several processes, all or none get a state.
        """
        before = _copied_buffers(self.module)
        state = self.forward(batch)
        losses = [state.cross_entropy, state.kd, state.feature, state.teacher_cross_entropy]
        if self.distillation.beta:
            losses.append(state.distance)
        if _finite([*losses, state.divergence, state.similarity]):
            return state
        self.skipped += 1
        for name, buffer in self.module.named_buffers():
            buffer.copy_(before[name])
        return None

    @torch.no_grad()
    def predict(self, inputs: Float[Tensor, "B K H W"]) -> NetworkOutput:
        """What the student in evaluation mode makes of images, without graph or trace."""
        student = self.student
        was_training = student.training
        _set_mode(student, training=False)
        with autocast(self.precision, self.device):
            output: NetworkOutput = student(inputs)
        _set_mode(student, training=was_training)
        return output

    @torch.no_grad()
    def examine(self, batch: Batch) -> DistillState:
        """A batch as the student sees it in evaluation mode, beside its teachers; see `predict`.

        Args:
            batch: The batch; it brings the teachers' outputs, feature maps or not.
        """
        assert batch.teachers is not None
        view = StudentView(self.predict(batch.inputs), (), ())
        return self._state(batch, view, batch.teachers, compared=False)

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
        replaced = {**_copied_buffers(self.module), **parameters}
        return self._state(batch, self._view(self.module, batch.inputs, replaced), teachers)

    def teacher_loss(self, state: DistillState, weights: TeacherWeights) -> Float[Tensor, " B"]:
        """α Σ_m w_l kd + β Σ_m w_f feature: what the teachers add to the loss of each sample."""
        logit = (weights.logit * state.kd).sum(1)
        feature = (weights.feature * state.feature).sum(1)
        return self.distillation.alpha * logit + self.distillation.beta * feature

    @torch.enable_grad()
    def update(
        self, state: DistillState, weights: TeacherWeights, *, if_finite: bool = False
    ) -> LossTerms:
        """One SGD step of the student on the batch of `state`.

        Minimises the mean over the batch of CE + α Σ_m w_l kd + β Σ_m w_f feature (Equ. 2).

        Args:
            state: What `forward` gave for the batch; its graph is used up.
            weights: Weights of the teachers; gradients flow into them if they carry a graph, under
                fp16 times the scale of `scaler`.
            if_finite: Whether the step is left out, and counted, if its gradient is NaN or
                infinite; the host then waits for the device. Under fp16 that is the scaler's
                business in any case.

        Returns:
            The terms of the loss before the step.
        """
        total = state.cross_entropy + self.teacher_loss(state, weights)
        forget_gradients(self.optimizer)
        # Under any precision but fp16 the scaler does nothing.
        self.scaler.scale(total.mean()).backward()
        if not self.optimizer.state:  # In the first step, since the others use the same.
            distributed.check_gradients(self.module)
        # Not by the optimiser itself, so that what clips gradients sees their true size.
        self.scaler.unscale_(self.optimizer)
        if if_finite and not self.scaler.is_enabled() and not self._gradient_is_finite():
            self.skipped += 1
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.schedule.step()
        return LossTerms(
            cross_entropy=state.cross_entropy.detach(),
            kd=state.kd.detach(),
            feature=state.feature.detach(),
            total=total.detach(),
        )

    def _gradient_is_finite(self) -> bool:
        return _finite([p.grad for p in self.module.parameters() if p.grad is not None])

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """The student's result on a finite iterable of batches."""
        return evaluate(self.student, batches, self.precision)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training has changed."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state.get("skipped", 0)  # Earlier versions skipped nothing.

    def _view(
        self, module: nn.Module, inputs: Tensor, replaced: Mapping[str, Tensor]
    ) -> StudentView:
        """What a module makes of images with some of its tensors replaced by others."""
        view: StudentView
        with autocast(self.precision, self.device):
            if replaced:
                view = functional_call(module, dict(replaced), (inputs,))
            else:  # To replace nothing would still go through all tensors, in every step.
                view = module(inputs)
        return view

    def _state(
        self, batch: Batch, view: StudentView, teachers: TeacherOutputs, *, compared: bool = True
    ) -> DistillState:
        """A batch as it was seen.

        Args:
            batch: The batch.
            view: What the student made of it.
            teachers: What the teachers made of it.
            compared: Whether the student's features and maps are compared with the teachers'.
        """
        output = widened(view.output)
        logits = output.logits
        logit_terms, feature_terms = self._terms
        temperature = self.distillation.temperature
        kd = losses.kd_divergence(logits, teachers.logits, temperature, teachers.known)
        known = {"kd": kd}
        if view.projected and "mse" in feature_terms:
            known["mse"] = losses.feature_mse(view.projected, teachers.whole_maps)
        inputs = TermInputs(
            logits=logits,
            projected=view.projected,
            embedded=view.embedded,
            teachers=teachers,
            targets=batch.targets,
            temperature=temperature,
            directions=self.directions,
        )

        def project() -> Maps:
            if view.projected or not compared:
                return view.projected
            return self._projected(view.output.feature_map)

        return DistillState(
            batch=batch,
            student=output,
            teachers=teachers,
            cross_entropy=losses.cross_entropy(logits, batch.labels, self.recipe.label_smoothing),
            kd=combine(logit_terms, LOGIT_TERM, inputs, known),
            feature=combine(feature_terms if compared else {}, FEATURE_TERM, inputs, known),
            # The evidence of Equ. 3-6 may be asked for, whatever the student is trained by.
            divergence=kd.detach(),
            evidence=_Evidence(batch, teachers, project, known.get("mse")),
        )

    def _projected(self, feature_map: Tensor) -> Maps:
        """A map in every teacher's space, by regressors that no loss trains; they stay as is."""
        regressors = self.module.regressors
        with (
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            autocast(self.precision, self.device),
        ):
            maps: Maps = functional_call(regressors, _copied_buffers(regressors), (feature_map,))
        return maps


@torch.no_grad()
def _prefer_channels_last(module: nn.Module, inputs: Tensor) -> None:
    """Lays convolutions out channels-last, in place, unless the network cannot compute like that.

    On a CPU students are a fifth faster in it, and on a GPU it is what tensor cores take. A network
    that flattens a map by `view` does not take it, nor one with layers that torch fails at.
    """
    if inputs.device.type == "cpu" and not all(map(strides_safely, module.modules())):
        return
    modes = [(part, part.training) for part in module.modules()]
    module.to(memory_format=torch.channels_last).eval()
    try:
        module(inputs)
    except RuntimeError:
        module.to(memory_format=torch.contiguous_format)
    for part, training in modes:
        part.training = training


def _set_mode(module: nn.Module, *, training: bool) -> None:
    """Does what `module.train` does, which checks every assignment, as a step has no time for."""
    parts = [*module.modules()]
    if all(type(part).train is nn.Module.train and "training" in vars(part) for part in parts):
        for part in parts:
            vars(part)["training"] = training
    else:
        module.train(training)


def _copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies that a forward may write running statistics into."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@torch.no_grad()
def _finite(tensors: Iterable[Tensor]) -> bool:
    """Whether nothing is NaN or infinite, here and in all other processes."""
    bad = torch.stack([(~tensor.isfinite()).sum() for tensor in tensors]).sum()
    return int(distributed.total(bad)) == 0
