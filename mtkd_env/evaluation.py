"""A network's accuracy on a split, for students and teachers alike."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtkd_env.losses import cross_entropy as cross_entropy_per_sample
from mtkd_env.types import Batch


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A network's result on a split.

    Attributes:
        accuracy: Share of images whose class has the largest logit.
        cross_entropy: Mean cross-entropy [nats].
    """

    accuracy: float
    cross_entropy: float


@torch.no_grad()
def evaluate(network: nn.Module, batches: Iterable[Batch]) -> Evaluation:
    """Evaluates a network on a finite iterable of batches; leaves its mode as it was."""
    was_training = network.training
    network.eval()
    samples = 0
    totals: list[Tensor] = []
    for batch in batches:
        logits = network(batch.inputs).logits
        hits = (logits.argmax(1) == batch.targets).sum()
        totals.append(torch.stack([hits, cross_entropy_per_sample(logits, batch.targets).sum()]))
        samples += len(batch.targets)
    correct, cross_entropy = torch.stack(totals).double().sum(0).tolist()
    network.train(was_training)
    return Evaluation(correct / samples, cross_entropy / samples)
