"""The student's step as two CUDA graphs, which the host launches as a whole.

At a batch of 64 small images a GPU computes kernels faster than the host can launch them, one by
one. A graph's kernels are launched together. There are two of them, because between them the agent
decides: the look of the student at a batch with all losses, and what it learns from it.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtkd_env import distributed
from mtkd_env.errors import ConfigError
from mtkd_env.types import (
    Batch,
    DistillState,
    LossTerms,
    NetworkOutput,
    TeacherOutputs,
    TeacherWeights,
)

Result = TypeVar("Result")

# Steps that are taken as usual first, in which libraries and the optimiser set themselves up.
USUAL_STEPS = 3

Look = Callable[[Batch, TeacherOutputs], DistillState]
Learn = Callable[[DistillState, TeacherWeights], LossTerms]

# Records work without doing it: gives its result, and what fills the result's tensors anew.
Recorder = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]


class GraphRecorder:
    """Records work on a GPU without doing it; all that one recorder records shares its memory.

    Memory that earlier work has no more use for is given to later work, so that all is to be
    replayed in the order in which it was recorded.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """The result of the work, and what fills its tensors, each time anew."""
        graph = torch.cuda.CUDAGraph()
        # The outer context is for a failure, after which torch stays on the stream of the graph.
        # Threads that read images ahead go on to take memory meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            result = work()
        return result, graph.replay


# By the type of device, what makes one of them.
RECORDERS: Mapping[str, Callable[[], Recorder]] = {"cuda": GraphRecorder}


def check_capture(precision: str, device: torch.device | str) -> None:
    """Checks that a step can be captured.

    Raises:
        ConfigError: No such device, gradients that are scaled, or several processes.
    """
    kind = torch.device(device).type
    if kind not in RECORDERS:
        raise ConfigError(f"capture: expected false on a device without graphs, '{kind}'")
    if precision == "fp16":
        raise ConfigError(
            "capture: expected false with precision fp16, whose steps may be left out"
        )
    if distributed.active():
        raise ConfigError("capture: expected false with several processes")


class CapturedStep:
    """A student's look at a batch and what it learns from it, recorded once and replayed.

    The first steps are taken as usual. So are all if recording fails, after a warning.

    Args:
        look: Computes the state of a batch, with its graph.
        learn: Changes the student by such a state and weights; never waits for the device.
        optimizer: What `learn` changes the student with.
        recorder: Records work without doing it.
    """

    def __init__(self, look: Look, learn: Learn, optimizer: Optimizer, recorder: Recorder) -> None:
        self._look = look
        self._learn = learn
        self._optimizer = optimizer
        self._recorder = recorder
        self._usual_steps = 0
        self._recording: _Recording | None = None
        self._last: DistillState | None = None

    def look(self, batch: Batch, teachers: TeacherOutputs) -> DistillState:
        """The state of a batch.

        Once recorded, it has no graph, and its `student` and `projected` are overwritten by the
        next look.
        """
        if self._usual_steps == USUAL_STEPS:
            self._record(batch, teachers)
        self._usual_steps += 1
        if self._recording is None:
            return self._look(batch, teachers)
        self._last = self._recording.look(batch, teachers)
        return self._last

    def learn(self, state: DistillState, weights: TeacherWeights) -> LossTerms:
        """Changes the student by a state and weights.

        Raises:
            RuntimeError: The state is not the last one, or the weights have a graph, which once
                recorded nothing flows into.
        """
        if state.cross_entropy.requires_grad:
            return self._learn(state, weights)
        if state is not self._last or self._recording is None:
            raise RuntimeError("capture: a student learns only from the batch it looked at last")
        if weights.logit.requires_grad or weights.feature.requires_grad:
            raise RuntimeError("capture: no gradient flows into the weights; detach them")
        self._last = None
        return self._recording.learn(weights)

    def _record(self, batch: Batch, teachers: TeacherOutputs) -> None:
        try:
            with _capturable(self._optimizer):
                self._recording = _Recording(
                    self._look, self._learn, batch, teachers, self._recorder
                )
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"the student's step is not captured: {reason}", stacklevel=4)


class _Recording:
    """The recorded work and the tensors that it reads and fills."""

    def __init__(
        self,
        look: Look,
        learn: Learn,
        batch: Batch,
        teachers: TeacherOutputs,
        recorder: Recorder,
    ) -> None:
        self._batch, self._teachers = _copied(batch, teachers)
        state, self._replay_look = recorder(lambda: look(self._batch, self._teachers))
        weights = TeacherWeights.uniform(state.divergence)
        self._weights = weights.logit, weights.feature.clone()
        self._losses, self._replay_learn = recorder(
            lambda: learn(state, TeacherWeights(*self._weights))
        )
        self._state = _without_graph(state)

    def look(self, batch: Batch, teachers: TeacherOutputs) -> DistillState:
        _overwrite(_tensors(self._batch, self._teachers), _tensors(batch, teachers))
        self._replay_look()
        own = {name: getattr(self._state, name).clone() for name in PER_SAMPLE}
        return replace(self._state, batch=batch, teachers=teachers, **own)

    def learn(self, weights: TeacherWeights) -> LossTerms:
        _overwrite(self._weights, (weights.logit, weights.feature))
        self._replay_learn()
        losses = self._losses
        return LossTerms(**{one.name: getattr(losses, one.name).clone() for one in fields(losses)})


# What a state says of every sample.
PER_SAMPLE = (
    "cross_entropy",
    "kd",
    "feature",
    "teacher_cross_entropy",
    "divergence",
    "distance",
    "similarity",
)


def _without_graph(state: DistillState) -> DistillState:
    output = state.student
    return replace(
        state,
        student=NetworkOutput(
            logits=output.logits.detach(),
            feature=output.feature.detach(),
            feature_map=output.feature_map.detach(),
        ),
        projected=tuple(one.detach() for one in state.projected),
        **{name: getattr(state, name).detach() for name in PER_SAMPLE},
    )


def _copied(batch: Batch, teachers: TeacherOutputs) -> tuple[Batch, TeacherOutputs]:
    """Copies of all that `_tensors` gives, in the layouts that it has."""
    mixture = batch.mixture
    return (
        Batch(
            inputs=batch.inputs.clone(),
            targets=batch.targets.clone(),
            index=batch.index,
            mixture=None if mixture is None else mixture.clone(),
        ),
        TeacherOutputs(
            logits=teachers.logits.clone(),
            features=tuple(one.clone() for one in teachers.features),
            feature_maps=tuple(one.clone() for one in teachers.feature_maps),
        ),
    )


def _tensors(batch: Batch, teachers: TeacherOutputs) -> list[Tensor]:
    """All that a student is trained by."""
    mixture = [] if batch.mixture is None else [batch.mixture]
    of_teachers = [teachers.logits, *teachers.features, *teachers.feature_maps]
    return [batch.inputs, batch.targets, *mixture, *of_teachers]


@torch.no_grad()
def _overwrite(kept: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for one, value in zip(kept, values, strict=True):
        one.copy_(value)


@contextmanager
def _capturable(optimizer: Optimizer) -> Iterator[None]:
    """Tells an optimiser that it is being recorded; some refuse otherwise, or warn when not."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, capturable in zip(groups, before, strict=True):
            group["capturable"] = capturable
