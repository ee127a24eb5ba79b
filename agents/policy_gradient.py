"""The paper's agent: the all-actions policy gradient of Equ. 7-8, trained by Algorithm 2."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from agents.arguments import Check, above_0, among, at_least_0, at_least_1
from agents.base import Transition
from agents.history import HISTORY_BYTES, Derived, History
from agents.learning import LearningAgent, descend, make_optimizer
from mtkd_env.action import fuse, generated_weights
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.types import TeacherWeights


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

    −mean_im r_i (log w_l + log w_f)[i, m] with the sample's aggregated reward r_i in [0, 1] (reward
    `reference`). For weights that sum to one its minimum is at 1/M, whatever the reward.
    """
    logs = weights.logit.clamp(min=1e-12).log() + weights.feature.clamp(min=1e-12).log()
    return -(advantages * logs).mean()


def clipped_loss(
    weights: TeacherWeights,
    old: TeacherWeights,
    advantages: Float[Tensor, "B M"],
    clip_range: float,
) -> Float[Tensor, ""]:
    """The clipped objective of PPO (Schulman et al., 2017), expected over all teachers.

    −mean_i Σ_m w_old min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)[i, m], summed over the heads, ρ = w / w_old.
    PPO averages over sampled actions; here each teacher counts with the probability that it was
    chosen with, so w_old cancels and nothing is divided by it.

    Args:
        weights: Generated weights; the only argument that receives a gradient.
        old: Generated weights that were executed.
        advantages: A.
        clip_range: ε.
    """
    now, before = (torch.stack([pair.logit, pair.feature]) for pair in (weights, old))
    clipped = now.clamp((1 - clip_range) * before, (1 + clip_range) * before)
    return -torch.minimum(now * advantages, clipped * advantages).sum((0, 2)).mean()


LOSSES: Mapping[str, Callable[[TeacherWeights, Tensor], Tensor]] = {
    "policy_gradient": policy_gradient_loss,
    "bce_ones": bce_ones_loss,
}


def entropy(weights: Float[Tensor, "B M"]) -> Float[Tensor, " B"]:
    """Entropy of each row of weights [nats]; rows may hold zeros, where its gradient is finite."""
    smallest = torch.finfo(weights.dtype).tiny
    return -(weights * weights.clamp(min=smallest).log()).sum(1)


def mean_entropy(weights: TeacherWeights) -> Float[Tensor, ""]:
    """Entropy of the weights, summed over the heads, mean over the batch [nats]."""
    return (entropy(weights.logit) + entropy(weights.feature)).mean()


class PolicyGradient(LearningAgent[Transition]):
    """Acts on a batch, remembers it, and learns from its memory at the end of the epoch.

    Args:
        env: The environment.
        seed: Seed of the policy's initialisation.
        optimizer: `adam` or `sgd`.
        lr: Learning rate of the agent.
        loss: `policy_gradient` (Equ. 7), `clipped` (PPO's, for many passes), or `bce_ones` (the
            released code's).
        clip_range: ε of `clipped`.
        entropy_coef: τ of an entropy bonus on the generated weights; at the optimum of Equ. 7 they
            are then softmax(A/τ) instead of a one-hot.
        agent_every: Batches between two updates; None for once an epoch, as in Algorithm 2.
        passes: Passes over the remembered batches at each update, one optimiser step a batch.
        hidden: Width of the policy's hidden layer.
        history_bytes: Bytes that the batches of an update, and those of the warm-up, may take. If
            they are more, observations are kept in half precision, and if need be every k-th batch
            alone; `history.plan` says so. See `agents.history.History`.

    Raises:
        ConfigError: Unknown optimiser or loss, a count below 1, a negative rate or coefficient, a
            clip range that is not positive, or `clipped` with learnable fusion.
    """

    learns_from_warmup = True
    remembers = Transition
    checks: Mapping[str, Check] = {
        **LearningAgent.checks,
        "clip_range": above_0,
        "entropy_coef": at_least_0,
        "loss": among([*LOSSES, "clipped"], "agent loss"),
        "passes": at_least_1,
    }

    def __init__(
        self,
        env: MTKDVectorEnv,
        *,
        seed: int = 0,
        optimizer: str = "adam",
        lr: float = 1e-3,
        loss: str = "policy_gradient",
        clip_range: float = 0.2,
        entropy_coef: float = 0.0,
        agent_every: int | None = None,
        passes: int = 1,
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
            loss=loss,
            clip_range=clip_range,
            entropy_coef=entropy_coef,
            passes=passes,
        )
        _check_fusion(loss, env)
        self._loss = loss
        self._clip_range = clip_range
        self._entropy_coef = entropy_coef
        self._passes = passes
        # Learnable fusion coefficients live in the environment, which executes them.
        parameters = [*self.policy.parameters(), *env.fusion.parameters()]
        self._learns_by(make_optimizer(optimizer, parameters, lr))

    def _step(self) -> Transition:
        observation = self.env.observation
        record = self.env.distill(self.env.to_weights(self.act(observation)))
        return Transition(observation, record.rewards.advantages, record.weights.parts)

    def pretrain(self, history: Sequence[Transition]) -> None:
        """One update on the warm-up epoch (Algorithm 1), as if the policy had acted in it."""
        generated = [generated_weights(self.act(known.observation)) for known in history]

        def as_if_acted(position: int) -> Transition:
            known = history[position]
            return replace(known, evidence={**known.evidence, "generator": generated[position]})

        self._pass_over(Derived(len(history), as_if_acted))

    def _learn_from(self, history: History[Transition]) -> None:
        self._pass_over(history.batches)

    def _pass_over(self, batches: Sequence[Transition]) -> None:
        for _ in range(self._passes):
            for transition in batches:
                self._update(transition)

    def _update(self, transition: Transition) -> None:
        generated = generated_weights(self.policy(transition.observation))
        loss = self._objective(generated, transition)
        descend(self.optimizer, loss - self._entropy_coef * mean_entropy(generated))

    def _objective(self, generated: TeacherWeights, known: Transition) -> Float[Tensor, ""]:
        if self._loss == "clipped":
            old = known.evidence["generator"]
            return clipped_loss(generated, old, known.advantages, self._clip_range)
        parts = {**known.evidence, "generator": generated}
        weights = fuse(self.env.fusion.coefficients, parts)
        return LOSSES[self._loss](weights, known.advantages)


def _check_fusion(loss: str, env: MTKDVectorEnv) -> None:
    if loss == "clipped" and env.fusion.learnable:
        raise ConfigError(
            "loss: 'clipped' compares the generated weights alone, so it cannot train a learnable "
            "fusion; choose 'policy_gradient' or a fixed fusion"
        )
