"""Lets a training go to its end: it goes on from checkpoints, keeps them, and stops on signals."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mtkd_env import distributed
from mtkd_env.keeping.checkpoint import CheckpointConfig, Checkpoints, Timetable
from mtkd_env.keeping.signals import Stopped, StopRequest
from mtkd_env.seeding import random_states, set_random_states

# Steps after which several processes agree anew on whether to stop or to write a checkpoint.
AGREEMENT = 20

AtRest = Callable[[], None]


class Trainable(ABC):
    """What trains step by step, and can be put back to where it was between two steps."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """SGD steps so far; the same in all processes."""

    @property
    @abstractmethod
    def epochs(self) -> int:
        """Epochs that are over."""

    @abstractmethod
    def train(self, at_rest: AtRest) -> None:
        """Trains to the end, from wherever it is.

        Args:
            at_rest: To be called between two steps, wherever `state_dict` and the global random
                generators together hold all that the rest depends on.

        Raises:
            FloatingPointError: Something became NaN or infinite.
        """

    @abstractmethod
    def check_finite(self) -> None:
        """Checks what a checkpoint would hold.

        Raises:
            FloatingPointError: Something is NaN or infinite.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, in tensors, numbers and strings."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""


class Keeper:
    """Lets something train to its end; keeps checkpoints, and stops on signals.

    Args:
        trained: What trains.
        checkpoints: Where they are kept.
        config: When.
        stop: Takes note of signals.
        state: The checkpoint to go on from, if there is one.
        to_go_on: How to go on once it has stopped.
        beside: What a checkpoint is to hold beside where the training is.
    """

    def __init__(
        self,
        trained: Trainable,
        checkpoints: Checkpoints,
        config: CheckpointConfig,
        stop: StopRequest,
        state: Mapping[str, Any] | None,
        *,
        to_go_on: str,
        beside: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._trained, self._checkpoints, self._stop = trained, checkpoints, stop
        self._to_go_on, self._beside = to_go_on, beside
        self._saved: int | None = None
        self._agreed = 0
        self._random: dict[str, Any] | None = None
        if state is not None:
            trained.load_state_dict(state["training"])
            # Set where the state was taken, since the way there draws as well.
            self._random = state["random"]
            self._saved = trained.steps
        self._timetable = Timetable(config, epochs=trained.epochs)

    def train(self) -> None:
        """Trains to the end.

        Raises:
            FloatingPointError: Something became NaN or infinite; says which checkpoint is left.
            Stopped: A signal came; there is a checkpoint to go on from.
        """
        try:
            self._trained.train(self._at_rest)
        except FloatingPointError as error:
            before = f"; there is a checkpoint from before it, after step {self._saved}"
            raise FloatingPointError(f"{error}{before * (self._saved is not None)}") from error

    def _at_rest(self) -> None:
        if self._random is not None:
            set_random_states(self._random)
            self._random = None
        if distributed.active() and 0 < self._trained.steps - self._agreed < AGREEMENT:
            return
        self._agreed = self._trained.steps
        due = self._timetable.due(self._trained.epochs)
        asked, due = distributed.agree((self._stop.number is not None, due))
        if asked or due:
            self._save()
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Ends the program if a signal has asked for it.

        Raises:
            Stopped: It has.
        """
        number = distributed.agree(self._stop.number)
        if number is not None:
            raise Stopped(number, self._trained.steps, self._to_go_on)

    def _save(self) -> None:
        """Writes a checkpoint of all processes, unless this is where the last one was taken.

        Raises:
            FloatingPointError: Something is NaN or infinite; the checkpoints are those before it.
        """
        started = time.perf_counter()
        steps = self._trained.steps
        if steps == self._saved:
            return
        self._trained.check_finite()
        content = {
            "training": self._trained.state_dict(),
            "random": random_states(),
            **self._beside(),
        }
        if distributed.rank() == 0:
            self._checkpoints.save(steps, content)
        self._saved = steps
        self._timetable.written(self._trained.epochs, time.perf_counter() - started)


@torch.no_grad()
def check_module(module: nn.Module, steps: int, hint: str) -> None:
    """Checks parameters and running statistics.

    Args:
        module: What is trained.
        steps: SGD steps so far, for the message.
        hint: What may help, for the message.

    Raises:
        FloatingPointError: One holds NaN or infinity; names the first.
    """
    tensors = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
    fine = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    for name, good in zip(tensors, fine, strict=True):
        if not good:
            raise FloatingPointError(f"{name} became NaN or infinite by step {steps}; {hint}")
