"""One network for all teachers: what any number of them, in any order, can be weighted by."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env.observation import RelativeObserver

# K + 1 of the observation `relative`.
FEATURES = RelativeObserver.features_per_teacher

# Logit of a teacher that is not there: its weight is exactly 0.
ABSENT_LOGIT = -1e4


def split_teachers(
    observation: Float[Tensor, "B F"],
) -> tuple[Float[Tensor, "B M K"], Float[Tensor, "B M 1"]]:
    """What is seen of every teacher, and whether it is there, of an observation `relative`."""
    rows = observation.float().unflatten(1, (-1, FEATURES))
    return rows[..., :-1], rows[..., -1:]


def mean_of_present(
    values: Float[Tensor, "B M H"], there: Float[Tensor, "B M 1"]
) -> Float[Tensor, "B H"]:
    """Mean over the teachers that are there."""
    return (values * there).sum(1) / there.sum(1).clamp(min=1)


class SharedTrunk(nn.Module):
    """What becomes of each teacher's numbers beside those of the others.

    The same layers for each teacher, the mean of what they give over the teachers beside it, and
    one more layer. Reordering the teachers reorders the result (Zaheer et al., "Deep Sets", 2017).

    Args:
        inputs: Numbers of each teacher.
        widths: Widths of the layers; the last is that of the result, H.
        activation: Makes what follows each layer.
    """

    def __init__(
        self, inputs: int, widths: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        each = [
            part
            for before, after in pairwise([inputs, *widths])
            for part in (nn.Linear(before, after), activation())
        ]
        self.each = nn.Sequential(*each)
        self.together = nn.Sequential(nn.Linear(2 * widths[-1], widths[-1]), activation())

    def forward(
        self, rows: Float[Tensor, "B M K"], there: Float[Tensor, "B M 1"]
    ) -> Float[Tensor, "B M H"]:
        """What is known of each teacher."""
        own = self.each(rows)
        mean = mean_of_present(own, there).unsqueeze(1).expand_as(own)
        return self.together(torch.cat([own, mean], dim=2))


class SharedPolicy(nn.Module):
    """Scores every teacher by one network that they share, so that any M can be weighted.

    A `SharedTrunk` and a linear layer with one output for the logit-level and one for the
    feature-level weights. Reordering the teachers reorders the logits.

    Args:
        hidden: Width of the hidden layers.
        layers: Number of those of each teacher by itself.
    """

    def __init__(self, hidden: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.trunk = SharedTrunk(FEATURES - 1, [hidden] * layers)
        self.heads = nn.Linear(hidden, 2)

    def forward(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """Logits (B, 2·M) of both heads; `ABSENT_LOGIT` for teachers that are not there."""
        rows, there = split_teachers(observation)
        scores: Tensor = self.heads(self.trunk(rows, there))
        return scores.masked_fill(there == 0, ABSENT_LOGIT).transpose(1, 2).flatten(1)


class SharedCritic(nn.Module):
    """What actions are worth: Q(s, a), by one network that all teachers share, so that M is free.

    A `SharedTrunk` over each teacher's numbers and its two actions, the mean over the teachers, and
    a linear layer. Reordering the teachers changes nothing.

    Args:
        widths: Widths of the layers.
        activation: Makes what follows each layer.
    """

    def __init__(
        self, widths: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.trunk = SharedTrunk(FEATURES + 1, widths, activation)
        self.head = nn.Linear(widths[-1], 1)

    def forward(
        self, observation: Float[Tensor, "B F"], actions: Float[Tensor, "B A"]
    ) -> Float[Tensor, "B 1"]:
        """The value of each sample's actions, one a teacher and head as of `SharedPolicy`."""
        rows, there = split_teachers(observation)
        acted = actions.unflatten(1, (2, -1)).transpose(1, 2)
        known = self.trunk(torch.cat([rows, acted], dim=2), there)
        return self.head(mean_of_present(known, there))
