"""REINFORCE (Williams, 1992): learns from choices that it drew, and from what they earned."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from agents.distributions import DISTRIBUTIONS
from agents.history import History
from agents.policy_gradient import LearningAgent, LearningSettings
from mtkd_env import distributed
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError, check_choice, check_not_negative
from mtkd_env.optimization import descend
from mtkd_env.seeding import RandomNumbers, derive_seed

BASELINES = ("none", "running_mean")


def score_function_loss(
    log_probability: Float[Tensor, "B K"], advantages: Float[Tensor, "B K"]
) -> Float[Tensor, ""]:
    """−mean_i Σ_k A[i, k] log π[i, k], the score-function estimate of REINFORCE (Williams, 1992).

    Over the choices that π draws, its gradient is on average that of minus the expected reward, if
    A is the reward minus a baseline that does not depend on the choice.

    Args:
        log_probability: log π of each of the K parts of a choice; carries the gradient.
        advantages: What each part earned, minus the baseline.
    """
    return -(log_probability * advantages).sum(1).mean()


class RunningMean(nn.Module):
    """Exponential moving average of all values that it was given; 0 before the first.

    Averages are divided by the weight that they have come to, so they are not drawn towards zero.

    Args:
        decay: Factor of what is known at each update, in [0, 1).
    """

    total: Tensor
    weight: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self._decay = decay
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    def forward(self) -> Float[Tensor, ""]:
        """The average."""
        return self.total / self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny)

    def update(self, values: Float[Tensor, "..."]) -> None:
        """Takes further values into account."""
        self.total.lerp_(distributed.mean(values.mean()), 1 - self._decay)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - self._decay)


@dataclass(frozen=True)
class ReinforceSettings(LearningSettings):
    """Hyperparameters of `reinforce`.

    Attributes:
        distribution: `categorical`: a teacher per head, by weights that are executed as they are.
            `dirichlet`: the weights. `gaussian`: the logits, with a learned deviation.
        baseline: `running_mean` of what was earned before, the same for all samples, or `none`.
        baseline_decay: Factor of the running mean's past at each update, in [0, 1).
        normalize_advantage: Whether advantages are divided by their root mean square.
        entropy_coef: Factor of a bonus on the entropy of the distribution.

    Raises:
        ConfigError: A value that cannot be used.
    """

    lr: float = 2e-3
    agent_every: int | None = 1
    distribution: str = "categorical"
    baseline: str = "running_mean"
    baseline_decay: float = 0.9
    normalize_advantage: bool = False
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(DISTRIBUTIONS, distribution=self.distribution)
        check_choice(BASELINES, baseline=self.baseline)
        # Written so that NaN fails.
        if not 0 <= self.baseline_decay < 1:
            found = self.baseline_decay
            raise ConfigError(f"baseline_decay: expected a number in [0, 1), got {found}")
        check_not_negative(entropy_coef=self.entropy_coef)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What REINFORCE keeps of a step; tensors on the device, without gradient.

    Attributes:
        observation: What the agent saw, as it can be kept.
        choice: What it drew for every sample.
        earned: What each of the K parts of a choice earned.
    """

    observation: Any
    choice: Tensor
    earned: Float[Tensor, "B K"]


class Reinforce(LearningAgent[Drawn]):
    """Draws weights or teachers from a policy, and makes what earned more than usual more likely.

    Every update is one optimiser step on all batches since the last one: a second step would learn
    from choices of a policy that is no more. The fusion is part of the environment; its
    coefficients stay as they are. `ReinforceSettings` says what can be chosen.
    """

    step_type = Drawn
    settings_type = ReinforceSettings
    settings: ReinforceSettings

    def __init__(self, env: MTKDVectorEnv, *, seed: int = 0, **arguments: Any) -> None:
        super().__init__(env, seed=seed, **arguments)
        settings = self.settings
        deviations = 1 if self.shared else 2 * len(env.teacher_names)
        distribution = DISTRIBUTIONS[settings.distribution](deviations)
        self.network["outputs"] = distribution.outputs
        self.distribution = distribution.to(env.device)
        self.baseline = RunningMean(settings.baseline_decay).to(env.device)
        self._random = RandomNumbers(derive_seed(seed, "exploration"), env.device)
        self.optimize(self.distribution)
        self.parts |= {
            "distribution": self.distribution,
            "baseline": self.baseline,
            "random": self._random,
        }

    @torch.no_grad()
    def act(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """Logits of the distribution's mean."""
        return self.distribution.mean_action(self.policy(observation))

    def collect(self) -> Drawn:
        """One step of the student under a choice that is drawn."""
        observation, kept = self.env.observation, self.env.keepable_observation
        with torch.no_grad():
            outputs = self.policy(observation)
            # For the samples of all processes in each, so that a generator is at the same place.
            drawn = self.distribution.draw(distributed.gather(outputs), self._random.generator)
            choice = distributed.local_part(drawn)
            action = self.distribution.action(outputs, choice)
        record = self.env.distill(self.env.to_weights(action))
        return Drawn(kept, choice, self.distribution.earned(record.rewards, choice))

    def learn_from(self, history: History[Drawn]) -> None:
        """One step of the optimiser on all choices together."""
        advantages = self._advantages(torch.cat([drawn.earned for drawn in history.steps]))
        parts = advantages.split(len(advantages) // len(history))
        losses = (self._loss(*known) / len(history) for known in zip(history, parts, strict=True))
        descend(self.optimizer, chain(losses, self.label_losses()))

    def _loss(self, drawn: Drawn, advantages: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
        outputs = self.policy(drawn.observation)
        log_probability = self.distribution.log_probability(outputs, drawn.choice)
        bonus = self.settings.entropy_coef * self.distribution.entropy(outputs).mean()
        return score_function_loss(log_probability, advantages) - bonus

    def _advantages(self, earned: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        uses_baseline = self.settings.baseline == "running_mean"
        advantages = earned - self.baseline() if uses_baseline else earned
        # Only now, so that the baseline does not depend on the choices that it is used for.
        self.baseline.update(earned)
        if self.settings.normalize_advantage:
            squares = distributed.mean(advantages.square().mean())
            advantages = advantages / (squares.sqrt() + 1e-8)
        return advantages
