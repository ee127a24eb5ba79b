"""Classical weightings as agents, so that they share every other part of a run."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from agents.base import Agent, EpochEnd
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.files import write_text
from mtkd_env.weighting import Weighting


class WeightingAgent(Agent):
    """Weights by a formula of the state instead of an action.

    Args:
        env: The environment.
        weighting: The formula.
    """

    def __init__(self, env: MTKDVectorEnv, weighting: Weighting) -> None:
        super().__init__(env)
        self.weighting = weighting

    def act(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """Logits whose softmax are the weights of the batch that waits in the environment."""
        del observation
        weights = self.weighting(self.env.state)
        joined = torch.cat([weights.logit, weights.feature], dim=1)
        return joined.detach().clamp(min=1e-12).log()

    def learn(self, epochs: int, on_epoch_end: EpochEnd) -> None:
        """Trains the student under the formula's weights, without any fusion."""
        for _ in range(epochs):
            for _ in range(self.env.steps_per_epoch):
                self.env.distill(self.weighting(self.env.state))
            on_epoch_end()

    def save(self, folder: Path) -> None:
        """Writes the formula's name."""
        write_text(folder / "agent.txt", f"{type(self.weighting).__name__}: nothing was learned\n")
