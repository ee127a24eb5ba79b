"""REINFORCE (Williams, 1992): learns from choices that it drew, and from what they earned."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from agents.arguments import Check, among, at_least_0, below_1
from agents.distributions import DISTRIBUTIONS
from agents.history import HISTORY_BYTES, History
from agents.learning import LearningAgent, RandomNumbers, descend, make_optimizer
from mtkd_env import distributed
from mtkd_env.env import MTKDVectorEnv

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

    Raises:
        ConfigError: A decay outside of this range.
    """

    total: Tensor
    weight: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        below_1("baseline_decay", decay)
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


@dataclass(frozen=True, slots=True)
class Drawn:
    """What REINFORCE keeps of a step; tensors on the device, without gradient.

    Attributes:
        observation: What the agent saw.
        choice: What it drew for every sample.
        earned: What each of the K parts of a choice earned.
    """

    observation: Float[Tensor, "B F"]
    choice: Tensor
    earned: Float[Tensor, "B K"]


class Reinforce(LearningAgent[Drawn]):
    """Draws weights or teachers from a policy, and makes what earned more than usual more likely.

    Every update is one optimiser step on all batches since the last one: a second step would learn
    from choices of a policy that is no more. The fusion is part of the environment; its
    coefficients stay as they are.

    Args:
        env: The environment.
        seed: Seed of the policy's initialisation and of what is drawn.
        distribution: `categorical`: a teacher per head, by weights that are executed as they are.
            `dirichlet`: the weights. `gaussian`: the logits, with a learned deviation.
        optimizer: `adam` or `sgd`.
        lr: Learning rate.
        baseline: `running_mean` of what was earned before, the same for all samples, or `none`.
        baseline_decay: Factor of the running mean's past at each update.
        normalize_advantage: Whether advantages are divided by their root mean square.
        entropy_coef: Factor of a bonus on the entropy of the distribution.
        agent_every: Batches between two updates; None for once an epoch.
        hidden: Width of the policy's hidden layer.
        history_bytes: Bytes that the batches of an update may take. If they are more, observations
            are kept in half precision, and if need be every k-th batch alone; `history.plan` says
            so. See `agents.history.History`.

    Raises:
        ConfigError: Unknown distribution, optimiser or baseline, a count below 1, a negative rate
            or coefficient, or a decay outside [0, 1).
    """

    remembers = Drawn
    checks: Mapping[str, Check] = {
        **LearningAgent.checks,
        "baseline": among(BASELINES, "baseline"),
        "baseline_decay": below_1,
        "distribution": among(DISTRIBUTIONS, "distribution"),
        "entropy_coef": at_least_0,
    }

    def __init__(
        self,
        env: MTKDVectorEnv,
        *,
        seed: int = 0,
        distribution: str = "categorical",
        optimizer: str = "adam",
        lr: float = 2e-3,
        baseline: str = "running_mean",
        baseline_decay: float = 0.9,
        normalize_advantage: bool = False,
        entropy_coef: float = 0.0,
        agent_every: int | None = 1,
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
            distribution=distribution,
            baseline=baseline,
            baseline_decay=baseline_decay,
            entropy_coef=entropy_coef,
        )
        self.distribution = DISTRIBUTIONS[distribution](len(env.teacher_names)).to(env.device)
        self.baseline = RunningMean(baseline_decay).to(env.device)
        self._uses_baseline = baseline == "running_mean"
        self._normalize = normalize_advantage
        self._entropy_coef = entropy_coef
        self._random = RandomNumbers(env.device, seed)
        parameters = [*self.policy.parameters(), *self.distribution.parameters()]
        self._learns_by(make_optimizer(optimizer, parameters, lr))
        self.parts |= {
            "distribution": self.distribution,
            "baseline": self.baseline,
            "random": self._random,
        }

    @torch.no_grad()
    def act(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """Logits of the distribution's mean."""
        return self.distribution.mean_action(self.policy(observation))

    def _step(self) -> Drawn:
        observation = self.env.observation
        with torch.no_grad():
            outputs = self.policy(observation)
            # For the samples of all processes in each, so that a generator is at the same place.
            drawn = self.distribution.draw(distributed.gather(outputs), self._random.generator)
            choice = distributed.local_part(drawn)
            action = self.distribution.action(outputs, choice)
        record = self.env.distill(self.env.to_weights(action))
        return Drawn(observation, choice, self.distribution.earned(record.rewards, choice))

    def _learn_from(self, history: History[Drawn]) -> None:
        drawn = history.joined()
        outputs = self.policy(drawn.observation)
        log_probability = self.distribution.log_probability(outputs, drawn.choice)
        bonus = self.distribution.entropy(outputs).mean()
        loss = score_function_loss(log_probability, self._advantages(drawn.earned))
        descend(self.optimizer, loss - self._entropy_coef * bonus)

    def _advantages(self, earned: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        advantages = earned - self.baseline() if self._uses_baseline else earned
        # Only now, so that the baseline does not depend on the choices that it is used for.
        self.baseline.update(earned)
        if self._normalize:
            squares = distributed.mean(advantages.square().mean())
            advantages = advantages / (squares.sqrt() + 1e-8)
        return advantages
