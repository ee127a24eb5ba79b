"""Finds the first step, term or tensor that is NaN or infinite."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtkd_env.vector import StepRecord

# Steps between two looks at what is on the device, for which the host has to wait.
WINDOW = 100


# Samples that a message names; there may be a whole batch of them.
NAMED = 8


HINT = "a lower optimizer.lr, distillation.alpha or distillation.beta may help"


@torch.no_grad()
def watched_terms(record: StepRecord) -> dict[str, Tensor]:
    """What has to be finite in a step, as columns (B, ...), causes before what they bring about."""
    return {
        "loss/cross_entropy": record.losses.cross_entropy.unsqueeze(1),
        "loss/kd": record.losses.kd,
        "loss/feature": record.losses.feature,
        "weights/logit": record.weights.logit,
        "weights/feature": record.weights.feature,
        "loss/total": record.losses.total.unsqueeze(1),
        "teacher_rewards": record.rewards.teacher,
        "reward": record.rewards.scalar.unsqueeze(1),
    }


class FiniteWatch:
    """Finds the first step in which a loss, a weight or a reward is NaN or infinite.

    Subscribes to an environment; the host waits for the device only every so many steps.

    Args:
        window: Steps between two checks.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        # Of every step since the last check: its number, what is finite (B, K), and the samples.
        self._steps: list[tuple[int, Tensor, Tensor]] = []
        self._widths: dict[str, int] = {}

    def __call__(self, record: StepRecord) -> None:
        """Takes a step into account.

        Raises:
            FloatingPointError: See `check`.
        """
        terms = watched_terms(record)
        self._widths = {name: values.shape[1] for name, values in terms.items()}
        finite = torch.cat([values.float() for values in terms.values()], dim=1).isfinite()
        self._steps.append((record.step + 1, finite, record.index))
        if len(self._steps) == self._window:
            self.check()

    def check(self) -> None:
        """Looks at the steps since the last check.

        Raises:
            FloatingPointError: In one of them something was NaN or infinite. Names the steps that
                were looked at, the first bad one, the terms, and the samples' positions in the
                training split.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        fine = torch.stack([finite.all() for _, finite, _ in steps]).tolist()
        if all(fine):
            return
        number, finite, index = steps[fine.index(False)]
        samples = index[~finite.all(1)].tolist()
        raise FloatingPointError(
            f"{', '.join(self._bad_terms(finite))} became NaN or infinite in step {number} (of "
            f"steps {steps[0][0]} to {steps[-1][0]}, the first) for {_some(samples)} of "
            f"{len(index)} samples; {HINT}"
        )

    def _bad_terms(self, finite: Tensor) -> list[str]:
        columns = finite.all(0).split(list(self._widths.values()))
        pairs = zip(self._widths, columns, strict=True)
        return [name for name, fine in pairs if not bool(fine.all())]


def _some(samples: Sequence[int]) -> str:
    """`sample 3, 17, 24 and 5 more`."""
    named = ", ".join(str(sample) for sample in samples[:NAMED])
    more = len(samples) - NAMED
    return f"sample {named} and {more} more" if more > 0 else f"sample {named}"


def check_row(row: Mapping[str, Any], steps: int) -> None:
    """Checks a row of metrics.

    Args:
        row: The row.
        steps: SGD steps so far, for the message.

    Raises:
        FloatingPointError: A value is NaN or infinite; names the first.
    """
    for name, value in row.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} became NaN or infinite in epoch {row['epoch']} (up to step {steps}); "
                f"{HINT}"
            )
