"""Networks of the on-device agents."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env.types import TeacherWeights


class TeacherPolicy(nn.Module):
    """The paper's agent: one network over the observations of all teachers (its appendix).

    Linear(F, hidden) without bias, ReLU, and one linear head of M logits each for the logit-level
    and the feature-level weights.

    Args:
        observation_width: F.
        teachers: M.
        hidden: Width of the hidden layer; the paper's is 128.
    """

    def __init__(self, observation_width: int, teachers: int, hidden: int = 128) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(observation_width, hidden, bias=False), nn.ReLU())
        # Both heads in one layer: the first M outputs are the logit head's.
        self.heads = nn.Linear(hidden, 2 * teachers)

    def forward(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """Logits (B, 2·M) of both heads."""
        logits: Tensor = self.heads(self.trunk(observation.float()))
        return logits


class TeacherCritic(nn.Module):
    """What weights are worth: Q(s, w), one network over the observation and both heads' weights.

    Linear(F, hidden) and ReLU of the observation, joined with the 2·M weights, then
    Linear(hidden + 2·M, hidden), ReLU, Linear(hidden, 1). As in DDPG (Lillicrap et al., 2016), the
    action comes in behind the first layer.

    Args:
        observation_width: F.
        teachers: M.
        hidden: Width of both hidden layers.
    """

    def __init__(self, observation_width: int, teachers: int, hidden: int = 128) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(observation_width, hidden), nn.ReLU())
        self.head = nn.Sequential(
            nn.Linear(hidden + 2 * teachers, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(
        self, observation: Float[Tensor, "B F"], weights: TeacherWeights
    ) -> Float[Tensor, " B"]:
        """The value of each sample's weights."""
        seen = self.trunk(observation.float())
        values: Tensor = self.head(torch.cat([seen, weights.logit, weights.feature], dim=1))
        return values.squeeze(1)
