"""DPG (Silver et al., 2014): learns what weights are worth, and moves the policy uphill."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from agents.arguments import Check, at_least_0, at_least_1
from agents.history import HISTORY_BYTES, History
from agents.learning import LearningAgent, RandomNumbers, descend, make_optimizer
from agents.policies import TeacherCritic
from agents.policy_gradient import mean_entropy
from mtkd_env import distributed
from mtkd_env.action import generated_weights
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.seeding import derive_seed, seeded
from mtkd_env.types import TeacherWeights


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


@dataclass(frozen=True, slots=True)
class Tried:
    """What DPG keeps of a step; tensors on the device, without gradient.

    Attributes:
        observation: What the agent saw.
        weights: What it generated, with exploration.
        rewards: The environment's scalar reward.
    """

    observation: Float[Tensor, "B F"]
    weights: TeacherWeights
    rewards: Float[Tensor, " B"]


class DPG(LearningAgent[Tried]):
    """Explores around its weights, fits a critic to the rewards, and ascends the critic.

    Learns from the batches since its last update only; `ddpg` of Stable-Baselines3 has a replay
    buffer. Several passes are sound nonetheless: what weights are worth does not depend on the
    policy, and the actor's gradient is taken at the policy's own weights. There is no γ, because
    the next batch does not depend on the weights in any way that the critic could know; the
    environment's episodes are not looked at. The fusion is part of the environment; its
    coefficients stay as they are.

    Args:
        env: The environment.
        seed: Seed of both networks' initialisation and of the exploration.
        optimizer: `adam` or `sgd`, for both networks.
        lr: Learning rate of the policy.
        critic_lr: Learning rate of the critic.
        noise_std: Standard deviation of the Gaussian noise on the logits.
        entropy_coef: τ of an entropy bonus on the policy's weights. Without it the policy leaves
            for one teacher before the critic can tell samples apart, and does not come back: at a
            one-hot the softmax has no gradient.
        agent_every: Batches between two updates; None for once an epoch.
        passes: Passes over the remembered batches at each update, one step of critic and policy
            each a batch.
        hidden: Width of the hidden layers.
        history_bytes: Bytes that the batches of an update may take. If they are more, observations
            are kept in half precision, and if need be every k-th batch alone; `history.plan` says
            so. See `agents.history.History`.

    Raises:
        ConfigError: Unknown optimiser, a count below 1, or a negative rate, noise or coefficient.
    """

    remembers = Tried
    checks: Mapping[str, Check] = {
        **LearningAgent.checks,
        "critic_lr": at_least_0,
        "entropy_coef": at_least_0,
        "noise_std": at_least_0,
        "passes": at_least_1,
    }

    def __init__(
        self,
        env: MTKDVectorEnv,
        *,
        seed: int = 0,
        optimizer: str = "adam",
        lr: float = 1e-3,
        critic_lr: float = 1e-3,
        noise_std: float = 1.5,
        entropy_coef: float = 0.02,
        agent_every: int | None = None,
        passes: int = 4,
        hidden: int = 128,
        history_bytes: int = HISTORY_BYTES,
    ) -> None:
        super().__init__(
            env,
            seed=seed,
            agent_every=agent_every,
            hidden=hidden,
            history_bytes=history_bytes,
            optimizer=optimizer,
            lr=lr,
            critic_lr=critic_lr,
            noise_std=noise_std,
            entropy_coef=entropy_coef,
            passes=passes,
        )
        self._noise_std = noise_std
        self._entropy_coef = entropy_coef
        self._passes = passes
        self._random = RandomNumbers(env.device, seed)
        with seeded(derive_seed(seed, "critic")):
            critic = TeacherCritic(env.observer.width, len(env.teacher_names), hidden)
        self.critic = critic.to(env.device)
        self._learns_by(make_optimizer(optimizer, self.policy.parameters(), lr))
        self.critic_optimizer = make_optimizer(optimizer, self.critic.parameters(), critic_lr)
        self.parts |= {
            "critic": self.critic,
            "critic_optimizer": self.critic_optimizer,
            "random": self._random,
        }

    def _step(self) -> Tried:
        observation = self.env.observation
        action = self._explore(self.act(observation))
        record = self.env.distill(self.env.to_weights(action))
        return Tried(observation, generated_weights(action), record.rewards.scalar)

    def _explore(self, logits: Float[Tensor, "B A"]) -> Float[Tensor, "B A"]:
        generator = self._random.generator
        # For the samples of all processes in each, so that a generator is at the same place.
        shape = len(logits) * distributed.processes(), *logits.shape[1:]
        noise = torch.randn(shape, device=logits.device, generator=generator)
        return logits + self._noise_std * distributed.local_part(noise)

    def _learn_from(self, history: History[Tried]) -> None:
        for _ in range(self._passes):
            for tried in history.batches:
                self._update(tried)

    def _update(self, tried: Tried) -> None:
        values = self.critic(tried.observation, tried.weights)
        descend(self.critic_optimizer, critic_loss(values, tried.rewards))
        weights = generated_weights(self.policy(tried.observation))
        loss = actor_loss(self.critic(tried.observation, weights))
        descend(self.optimizer, loss - self._entropy_coef * mean_entropy(weights))
