"""Agents that do not learn: references for those that do."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from agents.base import Agent, Settings
from mtkd_env.errors import check_positive


class Uniform(Agent):
    """Generates 1/M for every sample; the fusion may still tell the teachers apart."""

    def act(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """Zero logits."""
        return observation.new_zeros(len(observation), 2 * len(self.env.teacher_names))


@dataclass(frozen=True)
class OracleSettings(Settings):
    """Hyperparameters of `oracle`.

    Attributes:
        temperature: τ.

    Raises:
        ConfigError: τ is not positive.
    """

    temperature: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(temperature=self.temperature)


class Oracle(Agent):
    """Looks up what an agent has to learn: generates softmax(A/τ) in both heads.

    A is the reward per teacher by the reward's own normalisation, known before the action is
    chosen. Under the rewards `paper`, `alignment`, `heldout` and `cross`, whose normalisations
    compare the teachers of a sample, no agent can have a higher expected reward than the oracle at
    τ → 0 with fixed fusion; one that does not come near it has not learned. Where A is noisy, as
    under `heldout`, an agent that learns its expectation still leads to better students. It is no
    bound under `zscore` and `zscore_clamp`, which compare samples, nor under rewards of the sample
    as a whole: `aggregate` and `reference` pay most where each head follows the teacher that is
    nearest in its own term, `improvement` and `cross_entropy` depend on the student's step.
    """

    settings_type = OracleSettings
    settings: OracleSettings

    @torch.no_grad()
    def act(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """A/τ of the batch that waits in the environment, whatever the observation says."""
        del observation
        logits = self.env.advantages() / self.settings.temperature
        return torch.cat([logits, logits], dim=1)
