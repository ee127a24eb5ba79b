"""How a stochastic policy chooses: distributions over teacher weights, or over teachers.

A policy's network gives 2·M outputs per sample, M for each head. A distribution draws a choice from
them, gives the action that executes it, and says how probable it was and what it earned.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor, distributions, nn
from torch.nn import functional

from mtkd_env.reward import Rewards

# Smaller weights are executed as this one, so that their logarithms are logits.
SMALLEST_WEIGHT = 1e-6


def per_head(outputs: Float[Tensor, "B A"]) -> Float[Tensor, "B 2 M"]:
    """Outputs with an axis for the two heads."""
    return outputs.unflatten(1, (2, -1))


class Distribution(nn.Module, ABC):
    """A random choice for every sample, in K parts that are rewarded on their own.

    Parameters of its own are learned together with the network's.

    Attributes:
        outputs: What the network's outputs are called.
    """

    outputs = "logits"

    @abstractmethod
    def of(self, outputs: Float[Tensor, "B A"]) -> distributions.Distribution:
        """Torch's distribution for some outputs; its samples are choices, its batches (B, ...)."""

    @abstractmethod
    def draw(self, outputs: Float[Tensor, "B A"], generator: torch.Generator) -> Tensor:
        """A choice for every sample; the first axis is B. Torch's own takes no generator."""

    @abstractmethod
    def action(self, outputs: Float[Tensor, "B A"], choice: Tensor) -> Float[Tensor, "B A"]:
        """The logits that execute a choice."""

    def mean_action(self, outputs: Float[Tensor, "B A"]) -> Float[Tensor, "B A"]:
        """The logits without exploration: those of the mean."""
        return outputs

    def log_probability(
        self, outputs: Float[Tensor, "B A"], choice: Tensor
    ) -> Float[Tensor, "B K"]:
        """Logarithm of the probability, or density, of each part of a choice."""
        return self.of(outputs).log_prob(choice).sum(1, keepdim=True)

    def entropy(self, outputs: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        """Entropy of the choice [nats], a differential one of weights and logits."""
        return self.of(outputs).entropy().sum(1)

    def earned(self, rewards: Rewards, choice: Tensor) -> Float[Tensor, "B K"]:
        """The reward of each part of a choice: the environment's scalar for the only one."""
        del choice
        return rewards.scalar.unsqueeze(1)


class Categorical(Distribution):
    """One teacher for each head, drawn by the weights (B, 2).

    The weights themselves are executed, not the drawn teachers: in expectation they pay the same.
    Each teacher earns its own advantage A^m, which does not depend on what is executed.
    """

    def of(self, outputs: Float[Tensor, "B A"]) -> distributions.Categorical:
        """The weights of each head."""
        return distributions.Categorical(logits=per_head(outputs), validate_args=False)

    def draw(
        self, outputs: Float[Tensor, "B A"], generator: torch.Generator
    ) -> Int64[Tensor, "B 2"]:
        """The number of a teacher for each head."""
        weights = per_head(outputs).softmax(2)
        return torch.multinomial(weights.flatten(0, 1), 1, generator=generator).view(-1, 2)

    def action(self, outputs: Float[Tensor, "B A"], choice: Tensor) -> Float[Tensor, "B A"]:
        """The outputs as they are, whatever was drawn."""
        del choice
        return outputs

    def log_probability(
        self, outputs: Float[Tensor, "B A"], choice: Int64[Tensor, "B 2"]
    ) -> Float[Tensor, "B 2"]:
        """Logarithm of the weight of each head's teacher."""
        return self.of(outputs).log_prob(choice)

    def earned(self, rewards: Rewards, choice: Int64[Tensor, "B 2"]) -> Float[Tensor, "B 2"]:
        """The advantage of the teacher of each head."""
        return rewards.advantages.gather(1, choice)


class Dirichlet(Distribution):
    """Weights of each head from a Dirichlet distribution over the simplex (B, 2, M).

    Its concentrations are softplus(outputs) + 0.1. Closer to zero, draws would underflow.
    """

    FLOOR = 0.1
    outputs = "concentrations"

    def of(self, outputs: Float[Tensor, "B A"]) -> distributions.Dirichlet:
        """The distribution of each head."""
        concentration = functional.softplus(per_head(outputs)) + self.FLOOR
        return distributions.Dirichlet(concentration, validate_args=False)

    def draw(
        self, outputs: Float[Tensor, "B A"], generator: torch.Generator
    ) -> Float[Tensor, "B 2 M"]:
        """Weights on the simplex."""
        return torch._sample_dirichlet(self.of(outputs).concentration.detach(), generator)

    def action(
        self, outputs: Float[Tensor, "B A"], choice: Float[Tensor, "B 2 M"]
    ) -> Float[Tensor, "B A"]:
        """The logarithm of the weights; the environment's softmax gives them back."""
        del outputs
        return choice.clamp(min=SMALLEST_WEIGHT).log().flatten(1)

    def mean_action(self, outputs: Float[Tensor, "B A"]) -> Float[Tensor, "B A"]:
        """The logarithm of the mean weights."""
        return self.action(outputs, self.of(outputs).mean)


class Gaussian(Distribution):
    """Logits from independent normal distributions around the outputs (B, 2·M).

    Args:
        deviations: Standard deviations that it learns: 2·M, or 1 for all logits.

    Attributes:
        log_std: Logarithm of the standard deviation of each logit, or of all; learned.
    """

    def __init__(self, deviations: int) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(deviations))

    def of(self, outputs: Float[Tensor, "B A"]) -> distributions.Normal:
        """The distribution of each logit."""
        return distributions.Normal(outputs, self.log_std.exp(), validate_args=False)

    def draw(
        self, outputs: Float[Tensor, "B A"], generator: torch.Generator
    ) -> Float[Tensor, "B A"]:
        """Logits."""
        noise = torch.randn(outputs.shape, device=outputs.device, generator=generator)
        return (outputs + self.log_std.exp() * noise).detach()

    def action(
        self, outputs: Float[Tensor, "B A"], choice: Float[Tensor, "B A"]
    ) -> Float[Tensor, "B A"]:
        """The drawn logits."""
        del outputs
        return choice


# By the number of deviations to learn, of those that do.
DISTRIBUTIONS: Mapping[str, Callable[[int], Distribution]] = {
    "categorical": lambda _: Categorical(),
    "dirichlet": lambda _: Dirichlet(),
    "gaussian": Gaussian,
}
