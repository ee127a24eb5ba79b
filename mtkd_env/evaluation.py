"""A network's accuracy on a split, and whether it says anything at all."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtkd_env import distributed
from mtkd_env.errors import ConfigError
from mtkd_env.losses import cross_entropy as cross_entropy_per_sample
from mtkd_env.precision import FULL, autocast
from mtkd_env.types import Batch

# What is looked at, in words, and its name in an output.
OUTPUTS: Mapping[str, str] = {
    "logits": "logits",
    "features": "feature",
    "feature maps": "feature_map",
}


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
    """Evaluates a network on a finite iterable of batches; leaves its mode as it was.

    Several processes each give a share of the split and get the result of the whole, so all of them
    have to call this.

    Args:
        network: The network.
        batches: Unaugmented batches on its device.
        precision: What it computes in; see `mtkd_env.precision`.
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


@torch.no_grad()
def check_outputs(
    network: nn.Module, batches: Sequence[Batch], precision: str, source: str
) -> None:
    """Checks that outputs are numbers that depend on the image.

    Args:
        network: The teacher.
        batches: Some images; of several processes, each has its own, or none.
        precision: What the teacher computes in.
        source: Where its weights are from, for the message.

    Raises:
        ConfigError: NaN or infinity came out, or the same logits for different images; in all
            processes.
    """
    network.eval()
    counts = [_counts(network, batch.inputs, precision) for batch in batches]
    device = next(network.parameters()).device
    none = torch.zeros(len(OUTPUTS) + 3, dtype=torch.int64, device=device)
    *bad, answers, images, size = distributed.total(sum(counts, none)).tolist()
    for name, count in zip(OUTPUTS, bad, strict=True):
        if count:
            raise ConfigError(
                f"{source} gives NaN or infinite {name} in {precision} for {count} of {size} images"
            )
    if images and not answers:
        raise ConfigError(f"{source} gives the same logits for {size} different images")


def _counts(network: nn.Module, inputs: Tensor, precision: str) -> Tensor:
    """How many images have a part that is not finite; other logits, or pixels, than the first."""
    with autocast(precision, inputs.device):
        output = network(inputs)
    finite = [getattr(output, name).flatten(1).isfinite().all(1) for name in OUTPUTS.values()]
    rows = [~one for one in finite] + [_differs(output.logits), _differs(inputs)]
    return torch.stack([*rows, torch.ones_like(rows[0])]).sum(1)


def _differs(rows: Tensor) -> Tensor:
    return (rows != rows[:1]).flatten(1).any(1)
