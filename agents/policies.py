"""Networks of the on-device agents."""

from jaxtyping import Float
from torch import Tensor, nn


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
