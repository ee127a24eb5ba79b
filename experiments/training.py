"""The student's training under an agent: from its beginning, or from a checkpoint, to its end."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from agents import Agent
from agents.base import steps_left
from experiments.config import ExperimentConfig
from experiments.metrics import (
    EpochMeter,
    accuracy_by_class,
    fusion_coefficients,
)
from experiments.running.finite import HINT, FiniteWatch, check_row
from experiments.running.kept import Found, KeptRun
from mtkd_env import distributed
from mtkd_env.keeping import AtRest, check_module
from mtkd_env.vector import StepRecord

# Splits that are evaluated every epoch; a pass over the training images would cost too much.
EVALUATED = frozenset({"val", "test"})

# What the best student is chosen by, where there are validation images.
CHOSEN_BY = "val/accuracy"

# What the mean weights of every epoch are made of, a line each.
BREAKDOWN = "breakdown.jsonl"


class Progress:
    """What a run tells while it goes on: nothing, if no method is another."""

    def teacher(self, name: str, epoch: int, epochs: int, loss: float) -> None:
        """A teacher has been trained for another epoch."""

    def note(self, text: str) -> None:
        """Something about the teachers is worth a line."""

    def training(self, config: ExperimentConfig, steps: int) -> AbstractContextManager[Any]:
        """The student's training of so many steps begins, or goes on; ends with the context."""
        del config, steps
        return nullcontext()

    def step(self, record: StepRecord) -> None:
        """The student made a step."""

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """An epoch ended, with its row of metrics."""


class BestStudent:
    """The student of the epoch with the highest accuracy on validation images, the first of such.

    Attributes:
        row: The epoch's row; none before there was one, and without validation images.
        tensors: The student's `state_dict`, on the CPU.
    """

    def __init__(self) -> None:
        self.row: dict[str, Any] | None = None
        self.tensors: dict[str, Tensor] = {}

    def see(self, row: dict[str, Any], student: nn.Module) -> None:
        """Takes a copy of the student, if it is better than those before."""
        if CHOSEN_BY in row and (self.row is None or row[CHOSEN_BY] > self.row[CHOSEN_BY]):
            self.row = row
            self.tensors = {
                name: tensor.detach().to("cpu", copy=True)
                for name, tensor in student.state_dict().items()
            }

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"row": self.row, "tensors": self.tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.row, self.tensors = state["row"], state["tensors"]


class Training(KeptRun[ExperimentConfig, Found]):
    """Trains the student under equal weights, then under the agent's; a subclass makes both.

    At the end of every epoch the student is evaluated and a row written.

    Args:
        config: The run.
        progress: What it tells while it goes on.

    Attributes:
        agent: The agent, in its environment; `prepare` makes it, and says the two that follow.
        teacher_seconds: Seconds that the teachers took, in the run's first part.
        classes: Names of the classes; empty if they have none.
        best: The student of the epoch that is best on validation images.
    """

    agent: Agent
    teacher_seconds: float
    classes: Sequence[str]

    def __init__(self, config: ExperimentConfig, progress: Progress) -> None:
        super().__init__(config)
        self._progress = progress
        self.best = BestStudent()

    def begin(self) -> None:
        """Watches the student, from its beginning."""
        self._env = env = self.agent.env
        # Finds the first step in which anything went wrong.
        self._watch = FiniteWatch()
        self._num_classes = env.distiller.teachers.num_classes
        self._meter = EpochMeter(env.teacher_names, self._num_classes)
        for subscriber in (self._watch, self._meter, self._progress.step):
            env.subscribe(subscriber)
        self._begin_epoch()

    @property
    def steps(self) -> int:
        """SGD steps of the student so far."""
        return self._env.steps

    @property
    def epochs(self) -> int:
        """Epochs that are over."""
        return len(self.log.rows)

    def train(self, at_rest: AtRest) -> None:
        """Trains to the end.

        Raises:
            FloatingPointError: Something became NaN or infinite.
            ConfigError: No checkpoint can hold the agent.
        """
        if distributed.rank() == 0:
            self.agent.log_to(self.log.folder / "tensorboard" / "agent")
        if self.config.checkpoint.enabled:
            # An agent that no checkpoint can hold says so now, not after the first epoch.
            self.agent.state_dict()
        steps = self.config.optimizer.epochs * self._env.steps_per_epoch - self._env.steps
        try:
            with self._progress.training(self.config, steps):
                self._train(at_rest)
        except FloatingPointError:
            # Something may have gone wrong before whoever raised it noticed.
            self._watch.check()
            raise

    def _train(self, at_rest: AtRest) -> None:
        warmup = self.config.warmup
        while self.epochs < warmup.epochs:
            self.agent.warm_up(steps_left(self._env), warmup.weights, at_rest)
            self._end_epoch()
        if epochs := self.config.optimizer.epochs - self.epochs:
            self.agent.learn(epochs, self._end_epoch, at_rest)

    def _begin_epoch(self) -> None:
        self._lr = float(self._env.distiller.optimizer.param_groups[0]["lr"])
        self._skipped = self._env.distiller.skipped
        self._started = time.perf_counter()

    def _end_epoch(self) -> None:
        """Reads the meters, evaluates the student, writes.

        Raises:
            FloatingPointError: Something is NaN or infinite.
        """
        env = self._env
        self.check_finite()
        row = {"epoch": self.epochs + 1, "lr": self._lr, "seconds": self._seconds()}
        means, breakdown = self._meter.read()
        row |= means | fusion_coefficients(env.fusion)
        row["agent/updates"] = self.agent.updates
        if env.skips:
            row["skipped"] = env.distiller.skipped - self._skipped
        for split in sorted(EVALUATED.intersection(env.splits)):
            evaluation = env.evaluate(split)
            row[f"{split}/accuracy"] = evaluation.accuracy
            row[f"{split}/cross_entropy"] = evaluation.cross_entropy
        check_row(row, env.steps)
        self.best.see(row, env.distiller.student)
        self.log.write(row)
        line = {"epoch": row["epoch"], **breakdown}
        if row["epoch"] == env.distiller.recipe.epochs and "test" in env.splits:
            accuracy = accuracy_by_class(env, self._num_classes)
            line |= {"classes": list(self.classes), "accuracy": accuracy}
        self.log.write_line(BREAKDOWN, line)
        self._progress.epoch(row, env.distiller.recipe.epochs)
        self._begin_epoch()

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def check_finite(self) -> None:
        """Checks all steps since the last check, and the student as it is.

        Raises:
            FloatingPointError: Something is NaN or infinite.
        """
        self._watch.check()
        check_module(self._env.distiller.module, self._env.steps, HINT)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, in tensors, numbers and strings."""
        return {
            "env": self._env.state_dict(),
            "agent": self.agent.state_dict(),
            "lr": self._lr,
            "seconds": self._seconds(),
            "skipped": self._skipped,
            "meter": self._meter.state_dict(),
            "best": self.best.state_dict(),
            "teacher_seconds": self.teacher_seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; the log has been cut to it before."""
        self._env.load_state_dict(state["env"])
        self.agent.load_state_dict(state["agent"])
        self._lr = state["lr"]
        self._skipped = state["skipped"]
        self._started = time.perf_counter() - state["seconds"]
        self._meter.load_state_dict(state["meter"], self._env.device)
        self.best.load_state_dict(state["best"])
        self.teacher_seconds = state["teacher_seconds"]
