"""The paper's agent: the all-actions policy gradient of Equ. 7-8, trained by Algorithm 2."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, optim

from agents.base import Agent, EpochEnd, Transition
from agents.policies import TeacherPolicy
from mtkd_env.action import fuse, generated_weights
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError, lookup
from mtkd_env.files import save_checkpoint
from mtkd_env.seeding import derive_seed, seeded
from mtkd_env.types import TeacherWeights

OPTIMIZERS: Mapping[str, Callable[..., optim.Optimizer]] = {"adam": optim.Adam, "sgd": optim.SGD}


def policy_gradient_loss(
    weights: TeacherWeights, advantages: Float[Tensor, "B M"]
) -> Float[Tensor, ""]:
    """Minus the expected advantage: its gradient is that of Equ. 7, ascending.

    −mean_i Σ_m A_i^m (w_l + w_f)[i, m]. All M rewards of a sample are known, so the gradient is
    exact: nothing is sampled, and no baseline is needed. The paper prints a minus sign before
    the learning rate and describes an ascent; this follows the text.
    """
    return -((weights.logit + weights.feature) * advantages).sum(1).mean()


def bce_ones_loss(weights: TeacherWeights, advantages: Float[Tensor, "B M"]) -> Float[Tensor, ""]:
    """What the authors' released code minimises: binary cross-entropy of the weights with 1.

    −mean_i r_i Σ_m (log w_l + log w_f)[i, m] with the sample's aggregated reward r_i in [0, 1]
    (reward `reference`). For weights that sum to one its minimum is at 1/M, whatever the reward.
    """
    logs = weights.logit.clamp(min=1e-12).log() + weights.feature.clamp(min=1e-12).log()
    return -(advantages * logs).sum(1).mean()


LOSSES: Mapping[str, Callable[[TeacherWeights, Tensor], Tensor]] = {
    "policy_gradient": policy_gradient_loss,
    "bce_ones": bce_ones_loss,
}


def entropy(weights: Float[Tensor, "B M"]) -> Float[Tensor, " B"]:
    """Entropy of each row of weights [nats]; rows may hold zeros."""
    return torch.special.entr(weights).sum(1)


class PolicyGradient(Agent):
    """Acts on a batch, remembers it, and learns from its memory at the end of the epoch.

    Args:
        env: The environment.
        seed: Seed of the policy's initialisation.
        optimizer: `adam` or `sgd`.
        lr: Learning rate of the agent.
        loss: `policy_gradient` (Equ. 7), or `bce_ones` (the released code's).
        entropy_coef: τ of an entropy bonus on the generated weights; at the optimum they are then
            softmax(A/τ) instead of a one-hot.
        agent_every: Batches between two updates; None for once an epoch, as in Algorithm 2.
        passes: Passes over the remembered batches at each update, one optimiser step a batch.
        hidden: Width of the policy's hidden layer.

    Raises:
        ConfigError: Unknown optimiser or loss, or a count below 1.
    """

    learns_from_warmup = True

    def __init__(
        self,
        env: MTKDVectorEnv,
        *,
        seed: int = 0,
        optimizer: str = "adam",
        lr: float = 1e-3,
        loss: str = "policy_gradient",
        entropy_coef: float = 0.0,
        agent_every: int | None = None,
        passes: int = 1,
        hidden: int = 128,
    ) -> None:
        super().__init__(env)
        if passes < 1 or (agent_every is not None and agent_every < 1):
            raise ConfigError(
                f"passes, agent_every: expected at least 1, got {passes}, {agent_every}"
            )
        self._loss = lookup(LOSSES, loss, "agent loss")
        self._entropy_coef = entropy_coef
        self._agent_every = agent_every
        self._passes = passes
        with seeded(derive_seed(seed, "agent")):
            policy = TeacherPolicy(env.observer.width, len(env.teacher_names), hidden)
        self.policy = policy.to(env.device)
        # Learnable fusion coefficients live in the environment, which executes them.
        parameters = [*self.policy.parameters(), *env.fusion.parameters()]
        self.optimizer = lookup(OPTIMIZERS, optimizer, "optimizer")(parameters, lr=lr)
        self._history: list[Transition] = []

    @torch.no_grad()
    def act(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """Logits of the policy; the gradient is exact, so nothing is explored."""
        logits: Tensor = self.policy(observation)
        return logits

    def learn(self, epochs: int, on_epoch_end: EpochEnd) -> None:
        """Student steps with the policy as it is, then agent steps on all of them (Algorithm 2)."""
        for _ in range(epochs):
            for _ in range(self.env.steps_per_epoch):
                self._history.append(self._step())
                if len(self._history) == self._agent_every:
                    self._flush()
            self._flush()
            on_epoch_end()

    def _step(self) -> Transition:
        observation = self.env.observation
        record = self.env.distill(self.env.to_weights(self.act(observation)))
        return Transition(observation, record.rewards.advantages, record.weights.parts)

    def pretrain(self, history: Sequence[Transition]) -> None:
        """One update on the warm-up epoch (Algorithm 1)."""
        self._history = list(history)
        self._flush()

    def _flush(self) -> None:
        for _ in range(self._passes):
            for transition in self._history:
                self._update(transition)
        self._history = []

    def _update(self, transition: Transition) -> None:
        generated = generated_weights(self.policy(transition.observation))
        parts = {**transition.evidence, "generator": generated}
        weights = fuse(self.env.fusion.coefficients, parts)
        bonus = entropy(generated.logit).mean() + entropy(generated.feature).mean()
        loss = self._loss(weights, transition.advantages) - self._entropy_coef * bonus
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Policy and optimiser; the memory is empty between two calls of `learn`."""
        return {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self, folder: Path) -> None:
        """Writes `agent.pt`."""
        save_checkpoint(folder / "agent.pt", self.state_dict())
