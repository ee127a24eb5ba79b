"""Classical weightings as agents, so that they share every other part of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from agents.base import Agent
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.files import save_checkpoint
from mtkd_env.types import map_tensors
from mtkd_env.weighting import Weighting


class WeightingAgent(Agent):
    """Weights by the state instead of an action.

    Args:
        env: The environment.
        weighting: The method, made for the environment's distiller.
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

    def step(self) -> None:
        """Trains the student under the weighting, without any fusion."""
        state = self.env.state
        self.env.distill(self.weighting(state))
        self.weighting.after_update(state)

    def state_dict(self) -> dict[str, Any]:
        """What the weighting has learned."""
        return self.weighting.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        # Bytes stay on the host: they are the states of generators, which are set from there.
        moved = map_tensors(lambda t: t if t.dtype == torch.uint8 else t.to(self.env.device), state)
        self.weighting.load_state_dict(moved)

    def save(self, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
        """Writes `agent.pt`, or a note that there is nothing to load."""
        if learned := self.state_dict():
            save_checkpoint(folder / "agent.pt", learned)
        else:
            super().save(folder, notes)

    @property
    def name(self) -> str:
        """That of the weighting."""
        return type(self.weighting).__name__
