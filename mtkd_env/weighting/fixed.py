"""FIXED: the same weights for every sample, chosen by hand."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError, check_name
from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting.base import Weighting

# What users write, checked when it is read.
Shares = Mapping[str, Any] | Sequence[Any]


class Fixed(Weighting):
    """Constant weights: what an agent that tells samples apart has to be better than.

    An agent can gain by leaving out a bad teacher, for which it need not look at the samples. Run
    with the mean weights that an agent came to, this says what of its gain is left for the rest.

    Args:
        weights: Share of each teacher in both heads: a number each in the teachers' order, or by
            name, where those left out get nothing. They are divided by their sum; by default all
            count the same.
        feature_weights: Shares in the feature head, if others.

    Raises:
        ConfigError: An unknown teacher, another number of shares than there are teachers, a share
            that is negative or not finite, or no positive share.
    """

    def __init__(
        self,
        distiller: Distiller,
        *,
        seed: int = 0,
        weights: Shares | None = None,
        feature_weights: Shares | None = None,
    ) -> None:
        super().__init__(distiller, seed=seed)
        logit = self._row(weights, "weights")
        feature = (
            logit if feature_weights is None else self._row(feature_weights, "feature_weights")
        )
        self._rows = logit, feature

    def __call__(self, state: DistillState) -> TeacherWeights:
        """The same row for every sample."""
        logit, feature = (
            row.to(state.divergence).expand_as(state.divergence) for row in self._rows
        )
        return TeacherWeights(logit=logit, feature=feature)

    def _row(self, shares: Shares | None, key: str) -> Float[Tensor, " M"]:
        names = self.distiller.teachers.names
        row = [1.0] * len(names) if shares is None else _in_order(shares, names, key)
        if len(row) != len(names):
            raise ConfigError(
                f"{key}: expected {len(names)} shares, one for each of {', '.join(names)}, "
                f"got {len(row)}"
            )
        total = sum(row)
        if not all(0 <= share < math.inf for share in row) or not 0 < total < math.inf:
            raise ConfigError(f"{key}: expected finite shares >= 0 that are not all 0, got {row}")
        return torch.tensor([share / total for share in row], device=self.distiller.device)


def _in_order(shares: Shares, names: Sequence[str], key: str) -> list[float]:
    """The shares in the order of the teachers."""
    if isinstance(shares, Mapping):
        for name in shares:
            check_name(names, name, key)
        shares = [shares.get(name, 0.0) for name in names]
    if isinstance(shares, str) or not all(isinstance(share, int | float) for share in shares):
        raise ConfigError(f"{key}: expected numbers, one for each teacher, got {shares!r}")
    return [float(share) for share in shares]
