"""Agents that do not learn: references for those that do."""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from agents.arguments import Check, above_0, check_values
from agents.base import Agent, AtRest, EpochEnd, nothing, steps_left
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.files import write_text
from mtkd_env.reward import minmax_center


class _FixedAgent(Agent):
    def learn(self, epochs: int, on_epoch_end: EpochEnd, at_rest: AtRest = nothing) -> None:
        """Trains the student; the agent stays as it is."""
        for _ in range(epochs):
            for _ in range(steps_left(self.env)):
                at_rest()
                self.env.distill(self.env.to_weights(self.act(self.env.observation)))
            on_epoch_end()

    def save(self, folder: Path) -> None:
        """Writes a note that there is nothing to load."""
        write_text(folder / "agent.txt", f"{type(self).__name__}: nothing was learned\n")


class Uniform(_FixedAgent):
    """Generates 1/M for every sample; the fusion may still tell the teachers apart.

    Args:
        env: The environment.
        seed: Unused; every agent takes one.
    """

    def __init__(self, env: MTKDVectorEnv, *, seed: int = 0) -> None:
        super().__init__(env)
        del seed

    def act(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """Zero logits."""
        return observation.new_zeros(len(observation), 2 * len(self.env.teacher_names))


class Oracle(_FixedAgent):
    """Looks up what an agent has to learn: generates softmax(A/τ) in both heads.

    A is Equ. 8 of the reward per teacher, known before the action is chosen. Under the rewards
    `paper` and `alignment`, normalised over the teachers, no agent can have a higher expected
    reward than the oracle at τ → 0 with fixed fusion; one that does not come near it has not
    learned. It is no bound under `zscore` and `zscore_clamp`, which compare samples, nor under
    rewards of the sample as a whole: `aggregate` and `reference` pay most where each head follows
    the teacher that is nearest in its own term, `improvement` and `cross_entropy` depend on the
    student's step.

    Args:
        env: The environment.
        seed: Unused; every agent takes one.
        temperature: τ.

    Raises:
        ConfigError: τ is not positive.
    """

    checks: Mapping[str, Check] = {"temperature": above_0}

    def __init__(self, env: MTKDVectorEnv, *, seed: int = 0, temperature: float = 0.2) -> None:
        super().__init__(env)
        del seed
        check_values(self.checks, {"temperature": temperature})
        self._temperature = temperature

    @torch.no_grad()
    def act(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """A/τ of the batch that waits in the environment, whatever the observation says."""
        del observation
        logits = minmax_center(self.env.teacher_rewards()) / self._temperature
        return torch.cat([logits, logits], dim=1)
