"""The student's training under an agent: from its beginning, or from a checkpoint, to its end."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from agents import Agent
from agents.base import steps_left
from agents.isolation import random_states, set_random_states
from experiments.config import ExperimentConfig
from experiments.metrics import BreakdownMeter, EpochMeter, fusion_coefficients
from experiments.running.checkpoint import Checkpoints, Timetable, packed_random, unpacked_random
from experiments.running.finite import FiniteWatch, check_module, check_row
from experiments.running.log import MetricsLog
from experiments.running.signals import Stopped, StopRequest
from mtkd_env import distributed
from mtkd_env.env import StepRecord

# Splits that are evaluated every epoch; a pass over the training images would cost too much.
EVALUATED = frozenset({"val", "test"})

# Steps after which several processes agree anew on whether to stop or to write a checkpoint.
AGREEMENT = 20


class Progress(Protocol):
    """What a run tells while it goes on."""

    def teacher(self, name: str, epoch: int, epochs: int, loss: float) -> None:
        """A teacher has been trained for another epoch."""

    def note(self, text: str) -> None:
        """Something about the teachers is worth a line."""

    def training(self, config: ExperimentConfig, steps: int) -> AbstractContextManager[Any]:
        """The student's training of so many steps begins, or goes on; ends with the context."""

    def step(self, record: StepRecord) -> None:
        """The student made a step."""

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """An epoch ended, with its row of metrics."""


class Recorder:
    """Evaluates the student and writes a row at the end of every epoch.

    Args:
        agent: The agent, in its environment.
        log: What the rows are written to.
        progress: What is told of them.

    Attributes:
        watch: Finds the first step in which anything went wrong.
    """

    def __init__(self, agent: Agent, log: MetricsLog, progress: Progress) -> None:
        env = agent.env
        self._agent = agent
        self._env = env
        self._log = log
        self._progress = progress
        self.watch = FiniteWatch()
        self._meter = EpochMeter(env.teacher_names)
        classes = env.distiller.teachers.num_classes
        self._breakdown = BreakdownMeter(env.teacher_names, classes, env.device)
        for subscriber in (self.watch, self._meter, self._breakdown):
            env.subscribe(subscriber)
        self._begin()

    def _begin(self) -> None:
        self._lr = float(self._env.distiller.optimizer.param_groups[0]["lr"])
        self._skipped = self._env.distiller.skipped
        self._started = time.perf_counter()

    def end_epoch(self) -> None:
        """Reads the meter, evaluates the student, writes.

        Raises:
            FloatingPointError: Something is NaN or infinite.
        """
        env = self._env
        self.check_finite()
        row = {"epoch": len(self._log.rows) + 1, "lr": self._lr, "seconds": self._seconds()}
        row |= self._meter.read() | fusion_coefficients(env.fusion)
        row["agent/updates"] = self._agent.updates
        if env.skips:
            row["skipped"] = env.distiller.skipped - self._skipped
        for split in sorted(EVALUATED.intersection(env.splits)):
            evaluation = env.evaluate(split)
            row[f"{split}/accuracy"] = evaluation.accuracy
            row[f"{split}/cross_entropy"] = evaluation.cross_entropy
        check_row(row, env.steps)
        self._log.write(row)
        self._log.write_breakdown({"epoch": row["epoch"], **self._breakdown.read()})
        self._progress.epoch(row, env.distiller.recipe.epochs)
        self._begin()

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def check_finite(self) -> None:
        """Checks all steps since the last check, and the student as it is.

        Raises:
            FloatingPointError: Something is NaN or infinite.
        """
        self.watch.check()
        check_module(self._env.distiller.module, self._env.steps)

    def state_dict(self) -> dict[str, Any]:
        """What is known of the epoch that is under way."""
        return {
            "lr": self._lr,
            "seconds": self._seconds(),
            "skipped": self._skipped,
            "meter": self._meter.state_dict(),
            "breakdown": self._breakdown.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._lr = state["lr"]
        self._skipped = state.get("skipped", 0)  # Earlier versions skipped nothing.
        self._started = time.perf_counter() - state["seconds"]
        self._meter.load_state_dict(state["meter"], self._env.device)
        self._breakdown.load_state_dict(state["breakdown"], self._env.device)


class Training:
    """Trains the student under equal weights, then under the agent's; keeps checkpoints.

    Args:
        config: The run.
        agent: The agent, in its environment.
        log: The run's log, as far as it is written.
        progress: What is told how it goes.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        agent: Agent,
        log: MetricsLog,
        progress: Progress,
    ) -> None:
        self._config = config
        self._agent = agent
        self._env = agent.env
        self._log = log
        self._stop = StopRequest()
        self._recorder = Recorder(agent, log, progress)
        agent.env.subscribe(progress.step)
        self._checkpoints = Checkpoints(log.folder)
        self._timetable = Timetable(config.checkpoint, epochs=len(log.rows))
        self._saved: int | None = None
        self._agreed = 0
        self._random: dict[str, Any] | None = None
        self._about: Mapping[str, Any] = {}
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the beginning, without those between an interruption and going on."""
        return time.perf_counter() - self._began

    def run(self, about: Mapping[str, Any]) -> None:
        """Trains to the end.

        Args:
            about: What every checkpoint is to say of the run beside its state.

        Raises:
            FloatingPointError: Something became NaN or infinite.
            Stopped: A signal came; there is a checkpoint to go on from.
            ConfigError: No checkpoint can hold the agent.
        """
        self._about = about
        if distributed.rank() == 0:
            self._agent.log_to(self._log.folder / "tensorboard" / "agent")
        try:
            self._train_kept()
        except FloatingPointError as error:
            raise FloatingPointError(f"{self._cause(error)}{self._way_back()}") from error

    def _train_kept(self) -> None:
        """Trains; keeps checkpoints if there are to be any."""
        if not self._config.checkpoint.enabled:
            self._train()
            return
        # An agent that no checkpoint can hold says so now, not after the first epoch.
        self._agent.state_dict()
        with self._stop:
            self._train()

    def _cause(self, error: FloatingPointError) -> FloatingPointError:
        """The error, or what went wrong before whoever raised it noticed."""
        try:
            self._recorder.watch.check()
        except FloatingPointError as earlier:
            return earlier
        return error

    def _way_back(self) -> str:
        if self._saved is None:
            return ""
        return f"; there is a checkpoint from before it, after step {self._saved}"

    def _train(self) -> None:
        config, warmup = self._config, self._config.warmup
        while len(self._log.rows) < warmup.epochs:
            self._agent.warm_up(steps_left(self._env), warmup.weights, self._at_rest)
            self._recorder.end_epoch()
        if left := config.optimizer.epochs - len(self._log.rows):
            self._agent.learn(left, self._recorder.end_epoch, self._at_rest)

    def _at_rest(self) -> None:
        """Between two steps, where all that the rest depends on is known."""
        if self._random is not None:
            set_random_states(unpacked_random(self._random))
            self._random = None
        if distributed.active() and 0 < self._env.steps - self._agreed < AGREEMENT:
            return
        self._agreed = self._env.steps
        number, due = distributed.agree(
            (self._stop.number, self._timetable.due(len(self._log.rows)))
        )
        if number is not None or due:
            self._save()
        if number is not None:
            raise Stopped(number, str(self._log.folder), self._env.steps)

    def _save(self) -> None:
        """Writes a checkpoint of all processes, unless this is where the last one was taken.

        Raises:
            FloatingPointError: Something is NaN or infinite; the checkpoints are those before it.
        """
        started = time.perf_counter()
        steps = self._env.steps
        if steps == self._saved:
            return
        self._recorder.check_finite()
        content = {"about": dict(self._about), "training": self.state_dict()}
        if distributed.rank() == 0:
            self._checkpoints.save(steps, content)
        self._saved = steps
        self._timetable.written(len(self._log.rows), time.perf_counter() - started)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, in tensors, numbers and strings."""
        return {
            "env": self._env.state_dict(),
            "agent": self._agent.state_dict(),
            "epoch": self._recorder.state_dict(),
            "log": self._log.state_dict(),
            "random": packed_random(random_states()),
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; the log must have been cut to it before."""
        self._env.load_state_dict(state["env"])
        self._agent.load_state_dict(state["agent"])
        self._recorder.load_state_dict(state["epoch"])
        # Set where the state was taken, since the way there draws as well.
        self._random = state["random"]
        self._saved = self._env.steps
        self._began = time.perf_counter() - state["seconds"]
