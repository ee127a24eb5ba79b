"""Trains one teacher by cross-entropy; interrupted training goes on where it stopped."""

import math
from collections.abc import Callable, Iterator
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
from mtkd_env.files import load_checkpoint, save_checkpoint
from mtkd_env.networks.base import Network
from mtkd_env.optimization import Recipe
from mtkd_env.types import UNKNOWN, Batch

# Only speed and memory depend on it: nothing is trained.
EVALUATION_BATCH = 512

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


def train_teacher(
    network: Network,
    stream: BatchStream,
    recipe: Recipe,
    *,
    relabel: Tensor | None = None,
    partial: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Trains `network` in place by cross-entropy.

    Several processes train it together, each on its part of every batch.

    Args:
        network: The teacher, on the device of the stream.
        stream: Training batches from their beginning.
        recipe: Optimiser, schedule and number of epochs.
        relabel: New label (C,) of every class, for teachers that are wrong on purpose.
        partial: File that holds the state after every epoch, found there again after an
            interruption and removed at the end.
        progress: Called after every epoch with epochs done, epochs in all and the mean
            training cross-entropy [nats].

    Raises:
        FloatingPointError: That became NaN or infinite; what was kept is of the epoch before.
    """
    # A copy where norms are synchronised, which the teacher is to be without.
    learner = distributed.synchronize_norms(deepcopy(network)) if distributed.active() else network
    optimizer, schedule = recipe.build(learner, stream.steps_per_epoch)
    parts: dict[str, Any] = {
        "network": learner,
        "optimizer": optimizer,
        "schedule": schedule,
        "stream": stream,
    }
    if partial is not None and distributed.agree(partial.exists()):
        saved = load_checkpoint(partial)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    if relabel is not None:
        relabel = relabel.to(next(network.parameters()).device)
    parallel = distributed.data_parallel(learner.train())
    while stream.epoch < recipe.epochs:
        mean = _train_epoch(parallel, stream, optimizer, schedule, relabel, recipe.label_smoothing)
        if partial is not None and distributed.rank() == 0:
            save_checkpoint(partial, {name: part.state_dict() for name, part in parts.items()})
        if progress is not None:
            progress(stream.epoch, recipe.epochs, mean)
    network.load_state_dict(learner.state_dict())
    network.eval()
    if partial is not None and distributed.rank() == 0:
        partial.unlink(missing_ok=True)


def _train_epoch(
    network: nn.Module,
    stream: BatchStream,
    optimizer: Any,
    schedule: Any,
    relabel: Tensor | None,
    smoothing: float,
) -> float:
    terms = []
    for _ in range(stream.steps_per_epoch):
        batch = next(stream)
        targets = batch.targets if relabel is None else relabel[batch.targets]
        loss = losses.cross_entropy(network(batch.inputs).logits, targets, smoothing).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not optimizer.state:
            distributed.check_gradients(network)
        optimizer.step()
        schedule.step()
        terms.append(loss.detach())
    mean = float(distributed.mean(torch.stack(terms).mean()))
    if not math.isfinite(mean):
        raise FloatingPointError(
            f"the training cross-entropy became {mean} in epoch {stream.epoch}; a lower "
            "teachers.recipe.lr may help"
        )
    return mean
