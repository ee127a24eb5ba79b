"""DPG (Silver et al., 2014): learns what weights are worth, and moves the policy uphill."""

from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from agents.history import History
from agents.learning import OPTIMIZERS
from agents.policy_gradient import LearningAgent, LearningSettings, mean_entropy
from mtkd_env import distributed
from mtkd_env.action import generated_weights
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import check_at_least_1, check_not_negative
from mtkd_env.optimization import descend
from mtkd_env.seeding import RandomNumbers, derive_seed, seeded
from mtkd_env.shared_policy import SharedCritic
from mtkd_env.types import TeacherWeights


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
        self, observation: Float[Tensor, "B F"], weights: Float[Tensor, "B A"]
    ) -> Float[Tensor, "B 1"]:
        """The value of each sample's weights, logit head first; as of `SharedCritic`."""
        return self.head(torch.cat([self.trunk(observation.float()), weights], dim=1))


def critic_loss(values: Float[Tensor, " B"], rewards: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """mean_i (Q(s_i, w_i) − r_i)²: the reward of a batch is all that its weights have an effect on.

    The squared error of temporal difference at γ = 0, which is exact for one-step episodes.
    """
    return (values - rewards).square().mean()


def actor_loss(values: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """−mean_i Q(s_i, w_θ(s_i)), whose gradient is minus the deterministic policy gradient.

    That is mean_i ∇_θ w_θ(s_i) ∇_w Q(s_i, w) at w = w_θ(s_i) (Silver et al., 2014, theorem 1), by
    the chain rule.
    """
    return -values.mean()


@dataclass(frozen=True)
class DPGSettings(LearningSettings):
    """Hyperparameters of `dpg`.

    Attributes:
        critic_lr: Learning rate of the critic.
        noise_std: Standard deviation of the Gaussian noise on the logits.
        entropy_coef: τ of an entropy bonus on the policy's weights. Without it the policy leaves
            for one teacher before the critic can tell samples apart, and does not come back: at a
            one-hot the softmax has no gradient.
        passes: Passes over the remembered batches at each update, one step of critic and policy
            each a batch.

    Raises:
        ConfigError: A value that cannot be used.
    """

    critic_lr: float = 1e-3
    noise_std: float = 1.5
    entropy_coef: float = 0.02
    passes: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(
            critic_lr=self.critic_lr, noise_std=self.noise_std, entropy_coef=self.entropy_coef
        )
        check_at_least_1(passes=self.passes)


@dataclass(frozen=True, slots=True)
class Tried:
    """What DPG keeps of a step; tensors on the device, without gradient.

    Attributes:
        observation: What the agent saw, as it can be kept.
        weights: What it generated, with exploration.
        rewards: The environment's scalar reward.
    """

    observation: Any
    weights: TeacherWeights
    rewards: Float[Tensor, " B"]


class DPG(LearningAgent[Tried]):
    """Explores around its weights, fits a critic to the rewards, and ascends the critic.

    Learns from the batches since its last update only; `ddpg` of Stable-Baselines3 has a replay
    buffer. Several passes are sound nonetheless: what weights are worth does not depend on the
    policy, and the actor's gradient is taken at the policy's own weights. There is no γ, because
    the next batch does not depend on the weights in any way that the critic could know; the
    environment's episodes are not looked at. The fusion is part of the environment; its
    coefficients stay as they are. `DPGSettings` says what can be chosen.
    """

    step_type = Tried
    settings_type = DPGSettings
    settings: DPGSettings

    def __init__(self, env: MTKDVectorEnv, *, seed: int = 0, **arguments: Any) -> None:
        super().__init__(env, seed=seed, **arguments)
        settings = self.settings
        self._random = RandomNumbers(derive_seed(seed, "exploration"), env.device)
        teachers = len(env.teacher_names)
        with seeded(derive_seed(seed, "critic")):
            critic = (
                SharedCritic([settings.hidden])
                if self.shared
                else TeacherCritic(env.observer.width, teachers, settings.hidden)
            )
        self.critic = critic.to(env.device)
        self.critic_optimizer = OPTIMIZERS[settings.optimizer](
            self.critic.parameters(), lr=settings.critic_lr
        )
        self.optimize()
        self.parts |= {
            "critic": self.critic,
            "critic_optimizer": self.critic_optimizer,
            "random": self._random,
        }

    def collect(self) -> Tried:
        """One step of the student under weights around the policy's."""
        observation, kept = self.env.observation, self.env.keepable_observation
        action = self._explore(self.act(observation))
        record = self.env.distill(self.env.to_weights(action))
        return Tried(kept, generated_weights(action), record.rewards.scalar)

    def _explore(self, logits: Float[Tensor, "B A"]) -> Float[Tensor, "B A"]:
        generator = self._random.generator
        # For the samples of all processes in each, so that a generator is at the same place.
        shape = len(logits) * distributed.processes(), *logits.shape[1:]
        noise = torch.randn(shape, device=logits.device, generator=generator)
        return logits + self.settings.noise_std * distributed.local_part(noise)

    def values(
        self, observation: Float[Tensor, "B F"], weights: TeacherWeights
    ) -> Float[Tensor, " B"]:
        """What the critic takes each sample's weights to be worth."""
        acted = torch.cat([weights.logit, weights.feature], dim=1)
        return self.critic(observation, acted).squeeze(1)

    def learn_from(self, history: History[Tried]) -> None:
        """Passes over the steps in their order, one of both optimisers for each."""
        for tried in chain.from_iterable(repeat(history, self.settings.passes)):
            values = self.values(tried.observation, tried.weights)
            descend(self.critic_optimizer, [critic_loss(values, tried.rewards)])
            weights = generated_weights(self.policy(tried.observation))
            loss = actor_loss(self.values(tried.observation, weights))
            bonus = self.settings.entropy_coef * mean_entropy(weights)
            descend(self.optimizer, [loss - bonus, *self.label_losses()])
