"""Trains one teacher by cross-entropy; interrupted training goes on where it stopped."""

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtkd_env import distributed, losses
from mtkd_env.data.dataset import ImageSet
from mtkd_env.data.split import Splits
from mtkd_env.data.stream import BatchStream
from mtkd_env.keeping import (
    AtRest,
    CheckpointConfig,
    Checkpoints,
    Keeper,
    StopRequest,
    Trainable,
    check_module,
)
from mtkd_env.networks.base import Network
from mtkd_env.optimization import Recipe
from mtkd_env.seeding import isolated
from mtkd_env.types import UNKNOWN, Batch

# Only speed and memory depend on it: nothing is trained.
EVALUATION_BATCH = 512

HINT = "a lower teachers.recipe.lr may help"

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """What teachers learn from and are measured on.

    Attributes:
        data: The dataset, for its normalisation and augmentation.
        splits: Its parts; teachers are trained on `train` and measured on `test`.
    """

    data: ImageSet[Any]
    splits: Splits[Any]

    @property
    def complete(self) -> bool:
        """Whether every image that the student learns from has a label."""
        return bool((self.splits.train.targets != UNKNOWN).all())

    def stream(
        self, batch_size: int, device: torch.device, seed: int, **keywords: Any
    ) -> BatchStream:
        """Endless augmented batches of the training images; further keywords of `ImageSet.stream`.

        Of several processes, each gets its part of every batch.
        """
        own = {"seed": seed, "shard": distributed.shard(), **keywords}
        return self.data.stream(self.splits.train, batch_size=batch_size, device=device, **own)

    def evaluation_batches(self, split: Any, device: torch.device | str) -> Iterator[Batch]:
        """One unaugmented pass over a part; each of several processes has its share of it."""
        return self.data.evaluation_batches(
            split, EVALUATION_BATCH, device=device, shard=distributed.shard()
        )


def class_cycle(num_classes: int, seed: int) -> Tensor:
    """A permutation of the classes, one cycle long, so that no class keeps its label."""
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
    permutation = torch.empty_like(order)
    permutation[order] = order.roll(-1)
    return permutation


class TeacherTraining(Trainable):
    """The training of a teacher by cross-entropy, from its beginning.

    Several processes train it together, each on its part of every batch.

    Args:
        network: The teacher, on the device of the stream.
        stream: Training batches from their beginning.
        recipe: Optimiser, schedule and number of epochs.
        relabel: New label (C,) of every class, for teachers that are wrong on purpose.
        progress: Called after every epoch with epochs done, epochs in all and the mean
            training cross-entropy [nats].
    """

    def __init__(
        self,
        network: Network,
        stream: BatchStream,
        recipe: Recipe,
        *,
        relabel: Tensor | None = None,
        progress: Progress | None = None,
    ) -> None:
        device = next(network.parameters()).device
        self._network, self._stream, self._recipe = network, stream, recipe
        self._relabel = None if relabel is None else relabel.to(device)
        self._progress = progress
        # A copy where norms are synchronised, which the teacher is to be without.
        learner = (
            distributed.synchronize_norms(deepcopy(network)) if distributed.active() else network
        )
        self._learner = learner
        self._optimizer, self._schedule = recipe.build(learner, stream.steps_per_epoch)
        # Of every step of the epoch so far.
        self._losses: list[Tensor] = []

    @property
    def steps(self) -> int:
        """SGD steps so far."""
        return self._stream.epoch * self._stream.steps_per_epoch + self._stream.step

    @property
    def epochs(self) -> int:
        """Epochs that are over."""
        return self._stream.epoch

    def train(self, at_rest: AtRest) -> None:
        """Trains to the end; leaves the network in evaluation mode.

        Raises:
            FloatingPointError: The training cross-entropy became NaN or infinite.
        """
        parallel = distributed.data_parallel(self._learner.train())
        while self._stream.epoch < self._recipe.epochs:
            at_rest()
            self._step(parallel)
            if self._stream.step == 0:
                self._end_epoch()
        self._network.load_state_dict(self._learner.state_dict())
        self._network.eval()

    def _step(self, parallel: nn.Module) -> None:
        batch, smoothing = next(self._stream), self._recipe.label_smoothing
        targets = batch.targets if self._relabel is None else self._relabel[batch.targets]
        loss = losses.cross_entropy(parallel(batch.inputs).logits, targets, smoothing).mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not self._optimizer.state:
            distributed.check_gradients(parallel)
        self._optimizer.step()
        self._schedule.step()
        self._losses.append(loss.detach())

    def _end_epoch(self) -> None:
        mean = float(distributed.mean(torch.stack(self._losses).mean()))
        self._losses = []
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the training cross-entropy became {mean} in epoch {self.epochs}; {HINT}"
            )
        if self._progress is not None:
            self._progress(self.epochs, self._recipe.epochs, mean)

    def check_finite(self) -> None:
        """Checks the network.

        Raises:
            FloatingPointError: A tensor of it holds NaN or infinity.
        """
        check_module(self._learner, self.steps, HINT)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, in tensors, numbers and strings."""
        own = [distributed.mean(loss) for loss in self._losses]
        return {**{name: part.state_dict() for name, part in self._parts.items()}, "losses": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        device = next(self._learner.parameters()).device
        self._losses = [loss.to(device) for loss in state["losses"]]

    @property
    def _parts(self) -> dict[str, Any]:
        return {
            "network": self._learner,
            "optimizer": self._optimizer,
            "schedule": self._schedule,
            "stream": self._stream,
        }


def train_teacher(
    training: TeacherTraining, kept: Path, seed: int, keep: Callable[[], None]
) -> None:
    """Trains a teacher to the end, or on from where it was interrupted, and keeps it.

    Args:
        training: Its training, from its beginning.
        kept: Folder of the checkpoints, which is removed at the end.
        seed: Of what its network draws, of dropout.
        keep: Keeps the trained network; called in process 0.

    Raises:
        FloatingPointError: Something became NaN or infinite; what was kept is from before it.
        Stopped: A signal came; there is a checkpoint to go on from.
    """
    checkpoints, stop = Checkpoints(kept), StopRequest()
    found = distributed.agree(checkpoints.load() if distributed.rank() == 0 else None)
    way = "to go on, ask for the same teachers again"
    with isolated(), stop:
        torch.manual_seed(seed)
        keeper = Keeper(training, checkpoints, CheckpointConfig(), stop, found, to_go_on=way)
        keeper.train()
        if distributed.rank() == 0:
            keep()
            checkpoints.clear()
        keeper.stop_if_asked()
