"""A network's accuracy on a split, for students and teachers alike."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from mtkd_env import distributed
from mtkd_env.losses import cross_entropy as cross_entropy_per_sample
from mtkd_env.precision import FULL, autocast
from mtkd_env.types import Batch


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A network's result on a split.

    Attributes:
        accuracy: Share of images whose class has the largest logit.
        cross_entropy: Mean cross-entropy of those that have a label [nats].
        labelled: Share of images that have a label, for a teacher one that it knows.
    """

    accuracy: float
    cross_entropy: float
    labelled: float = 1.0


def evaluation_of(
    correct: float, cross_entropy: float, samples: float, labelled: float
) -> Evaluation:
    """A result from sums over a split: right answers, cross-entropy, images, those with a label."""
    return Evaluation(correct / samples, cross_entropy / max(labelled, 1), labelled / samples)


@torch.no_grad()
def evaluate(network: nn.Module, batches: Iterable[Batch], precision: str = FULL) -> Evaluation:
    """Evaluates a network on a finite iterable of batches on its device; leaves its mode as it was.

    Several processes each give a share of the split and get the result of the whole, so all of them
    have to call this.
    """
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    totals = [torch.zeros(4, dtype=torch.float64, device=device)]
    for batch in batches:
        with autocast(precision, batch.inputs.device):
            logits = network(batch.inputs).logits
        hits = (logits.argmax(1) == batch.targets).sum()
        loss = cross_entropy_per_sample(logits, batch.targets).sum()
        count = torch.full_like(hits, len(batch.targets))
        labelled = batch.labelled.sum()
        totals.append(torch.stack([one.double() for one in (hits, loss, count, labelled)]))
    sums = distributed.total(torch.stack(totals).sum(0))
    correct, cross_entropy, samples, labelled_samples = sums.tolist()
    network.train(was_training)
    return evaluation_of(correct, cross_entropy, samples, labelled_samples)
