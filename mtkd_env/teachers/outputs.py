"""A first look at what a teacher says, before anything is trained by it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtkd_env import distributed
from mtkd_env.errors import ConfigError
from mtkd_env.networks.base import Network
from mtkd_env.precision import autocast
from mtkd_env.types import Batch

# What is looked at, in words, and its name in an output.
PARTS: Mapping[str, str] = {
    "logits": "logits",
    "features": "feature",
    "feature maps": "feature_map",
}


@torch.no_grad()
def check_outputs(network: Network, batches: Sequence[Batch], precision: str, source: str) -> None:
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
    none = torch.zeros(len(PARTS) + 3, dtype=torch.int64, device=device)
    *bad, answers, images, size = distributed.total(sum(counts, none)).tolist()
    for name, count in zip(PARTS, bad, strict=True):
        if count:
            raise ConfigError(
                f"{source} gives NaN or infinite {name} in {precision} for {count} of {size} images"
            )
    if images and not answers:
        raise ConfigError(f"{source} gives the same logits for {size} different images")


def _counts(network: Network, inputs: Tensor, precision: str) -> Tensor:
    """How many images have a part that is not finite; other logits, or pixels, than the first."""
    with autocast(precision, inputs.device):
        output = network(inputs)
    finite = [getattr(output, name).flatten(1).isfinite().all(1) for name in PARTS.values()]
    rows = [~one for one in finite] + [_differs(output.logits), _differs(inputs)]
    return torch.stack([*rows, torch.ones_like(rows[0])]).sum(1)


def _differs(rows: Tensor) -> Tensor:
    return (rows != rows[:1]).flatten(1).any(1)
