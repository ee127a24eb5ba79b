"""The paper's agent: the policy gradient of Equ. 7-8, trained by Algorithms 1 and 2.

The advantages A of Equ. 8 come from the environment (`mtkd_env.reward`). Here are, in this order:
the agent's network; what it minimises (Equ. 7); the loop of Algorithm 2, which other learning
agents share; and the agent itself, with Algorithm 1.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, Generic, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from agents.base import (
    SHARED,
    AtRest,
    EpochEnd,
    PolicyAgent,
    Settings,
    nothing,
    steps_left,
    warm_up_weights,
)
from agents.history import History, Replay, Step
from agents.learning import OPTIMIZERS, StepCount
from mtkd_env.action import PRIOR, SMALLEST_PRIOR, generated_weights
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import (
    ConfigError,
    check_at_least_1,
    check_choice,
    check_not_negative,
    check_positive,
)
from mtkd_env.losses import mixture_log_likelihood
from mtkd_env.optimization import descend, follow_gradients
from mtkd_env.reference import LabelledDraws
from mtkd_env.seeding import derive_seed, seeded
from mtkd_env.shared_policy import SharedPolicy
from mtkd_env.types import TeacherWeights

# What a history may take unless it is told otherwise.
HISTORY_BYTES = 64 * 2**20

POLICIES = ("teacher", SHARED)


class TeacherPolicy(nn.Module):
    """The paper's agent: one network over the observations of all teachers (its appendix).

    Linear(F, hidden) without bias, ReLU, and one linear head of M logits each for the logit-level
    and the feature-level weights. Further hidden layers are an extension.

    Args:
        observation_width: F.
        teachers: M.
        hidden: Width of the hidden layers; the paper's is 128.
        layers: Number of hidden layers; the paper has one.
    """

    def __init__(
        self, observation_width: int, teachers: int, hidden: int = 128, layers: int = 1
    ) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(observation_width, hidden, bias=False), nn.ReLU())
        for _ in range(layers - 1):
            self.trunk.extend([nn.Linear(hidden, hidden), nn.ReLU()])
        # Both heads in one layer: the first M outputs are the logit head's.
        self.heads = nn.Linear(hidden, 2 * teachers)

    def forward(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """Logits (B, 2·M) of both heads."""
        return self.heads(self.trunk(observation.float()))

    @torch.no_grad()
    def back_propagate(
        self, observation: Float[Tensor, "B F"], slope: Callable[[Tensor], Tensor]
    ) -> None:
        """Leaves in all parameters the gradient that a loss has there.

        What autograd would leave, in half of its time, since a network this small is mostly calls.

        Args:
            observation: The observation.
            slope: Gives the gradient of the loss in the logits, of these.
        """
        layers = [part for part in (*self.trunk, self.heads) if isinstance(part, nn.Linear)]
        seen = [observation.float()]
        for layer in layers[:-1]:
            seen.append(functional.linear(seen[-1], layer.weight, layer.bias).relu_())
        gradient = slope(self.heads(seen[-1]))
        for layer, inputs in zip(reversed(layers), reversed(seen), strict=True):
            layer.weight.grad = gradient.T @ inputs
            if layer.bias is not None:
                layer.bias.grad = gradient.sum(0)
            if layer is not layers[0]:
                gradient = torch.ops.aten.threshold_backward(gradient @ layer.weight, inputs, 0)


def policy_gradient_loss(
    weights: TeacherWeights, advantages: Float[Tensor, "B M"]
) -> Float[Tensor, ""]:
    """Minus the expected advantage: its gradient is that of Equ. 7, ascending.

    −mean_i Σ_m A_i^m (w_l + w_f)[i, m]. All M rewards of a sample are known, so the gradient is
    exact: nothing is sampled, and no baseline is needed. The paper prints a minus sign before
    the learning rate and describes an ascent; this follows the text.
    """
    return ((weights.logit + weights.feature) * advantages).sum() / -len(advantages)


def policy_gradient_slope(
    action: Float[Tensor, "B A"], advantages: Float[Tensor, "B M"], share: float = 1.0
) -> Float[Tensor, "B A"]:
    """Gradient of `policy_gradient_loss` in the action: −γ/B w (A − Σ_m w A), of each head.

    Args:
        action: Logits of both heads.
        advantages: A.
        share: γ, the coefficient that generated weights have in the executed ones.
    """
    weights = action.unflatten(1, (2, -1)).softmax(2)
    slopes = (advantages * (-share / len(advantages))).unsqueeze(1).expand_as(weights)
    return torch.ops.aten._softmax_backward_data(slopes, weights, 2, weights.dtype).flatten(1)


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
    return torch.special.entr(weights.clamp(min=torch.finfo(weights.dtype).tiny)).sum(1)


def mean_entropy(weights: TeacherWeights) -> Float[Tensor, ""]:
    """Entropy of the weights, summed over the heads, mean over the batch [nats]."""
    return entropy(torch.cat([weights.logit, weights.feature], dim=1)).mean()


def prior_divergence(weights: TeacherWeights) -> Float[Tensor, ""]:
    """KL(w ‖ w0) of executed weights and their prior, summed over heads, batch mean [nats].

    The entropy bonus is the same for a prior of equal weights, but for a constant.
    """
    own, prior = (
        torch.cat([pair.logit, pair.feature], dim=1) for pair in (weights, weights.parts[PRIOR])
    )
    cross = -(own * prior.clamp(min=SMALLEST_PRIOR).log()).sum(1)
    return (cross - entropy(own)).mean()


@dataclass(frozen=True)
class LearningSettings(Settings):
    """Hyperparameters of every learning agent.

    Attributes:
        optimizer: `adam` or `sgd`.
        lr: Learning rate.
        agent_every: Batches between two updates; None for once an epoch, as in Algorithm 2. An
            update at the end of every epoch takes what is left.
        policy: `teacher`, the paper's network over the observations of all teachers; or `shared`,
            one network for each teacher, which needs the observation `relative`: for any number of
            teachers in any order.
        hidden: Width of the hidden layers; the paper's is 128.
        layers: Number of hidden layers of the policy; the paper has one. Of a shared one, those of
            each teacher by itself.
        likelihood: λ of a second task, which the policy learns with every step of its optimiser:
            log Σ_m w^m p^m(y) of labelled images, seen with the student as it is now. The gate's
            objective; needs an observation that does not look at labels.
        likelihood_size: Labelled images drawn anew for every such step.
        history_bytes: Bytes that the batches between two updates may take. When it has come to
            that, the agent learns from them as if `agent_every` batches were there. Without a
            store of teacher outputs, a batch of 64 takes 0.44 MB at the paper's sizes.

    Raises:
        ConfigError: A value that cannot be used.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    agent_every: int | None = None
    policy: str = "teacher"
    hidden: int = 128
    layers: int = 1
    likelihood: float = 0.0
    likelihood_size: int = 64
    history_bytes: int = HISTORY_BYTES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(OPTIMIZERS, optimizer=self.optimizer)
        check_choice(POLICIES, policy=self.policy)
        check_not_negative(lr=self.lr, likelihood=self.likelihood)
        check_at_least_1(hidden=self.hidden, layers=self.layers, history_bytes=self.history_bytes)
        check_at_least_1(likelihood_size=self.likelihood_size)
        if self.agent_every is not None:
            check_at_least_1(agent_every=self.agent_every)


# Parts of weights that no agent chooses, by their names.
Evidence: TypeAlias = Mapping[str, TeacherWeights]


@dataclass(frozen=True, slots=True)
class Labelled:
    """Labelled images.

    Attributes:
        observation: What the policy sees of them.
        evidence: The parts of their weights that it does not choose.
        teacher_cross_entropy: Each teacher's with their true classes.
    """

    observation: Float[Tensor, "L F"]
    evidence: Evidence
    teacher_cross_entropy: Float[Tensor, "L M"]


class LearningAgent(PolicyAgent, Generic[Step]):
    """Trains the student, remembers what happened, and learns from that (Algorithm 2).

    A subclass says what it does with a batch and keeps of it, and how it learns from what it kept.

    Args:
        env: The environment.
        seed: Seed of the policy's initialisation and of all that it draws.
        arguments: Fields of `settings_type`.

    Attributes:
        step_type: The dataclass of what is kept of a batch.
        policy: The network.
        history: The batches since the last update.
        parts: Everything that learning changes, by the name that it is saved under; each has a
            `state_dict` and goes on from it.

    Raises:
        ConfigError: A hyperparameter that cannot be used.
    """

    step_type: type[Step]
    settings_type = LearningSettings
    settings: LearningSettings

    def __init__(self, env: MTKDVectorEnv, *, seed: int = 0, **arguments: Any) -> None:
        super().__init__(env, seed=seed, **arguments)
        settings = self.settings
        self.shared = settings.policy == SHARED
        hidden, layers, teachers = settings.hidden, settings.layers, len(env.teacher_names)
        self.network = {"hidden": hidden, "layers": layers, "outputs": "logits"}
        self.check_env(env)
        with seeded(derive_seed(seed, "agent")):
            policy = (
                SharedPolicy(hidden, layers)
                if self.shared
                else TeacherPolicy(env.observer.width, teachers, hidden, layers)
            )
        if env.fusion.prior is not None:  # Which is what an agent begins with, then.
            nn.init.zeros_(policy.heads.weight)
            nn.init.zeros_(policy.heads.bias)
        self.policy: nn.Module = policy.to(env.device)
        self.parts: dict[str, Any] = {"policy": self.policy}
        self._settle()

    def check_env(self, env: MTKDVectorEnv) -> None:
        """Checks that the agent can learn in an environment.

        Raises:
            ConfigError: Its settings need another observation or fusion.
        """
        super().check_env(env)
        if self.settings.likelihood and env.observer.needs_label:
            raise ConfigError(
                "likelihood: needs an observation that does not look at labels, such as "
                "'label_free'"
            )

    def enter(self, env: MTKDVectorEnv) -> None:
        """Goes on with the same policy and optimiser in another environment.

        Its teachers, their number and its classes may be others. What was kept of steps in the
        former one is forgotten; `update` learns from it before.

        Args:
            env: The environment, on the same device.

        Raises:
            ConfigError: The policy is not shared, a fusion is learnable, or the agent cannot learn
                in the environment.
        """
        if not self.shared:
            raise ConfigError(
                f"policy: '{self.settings.policy}' is made for the teachers of one environment; "
                f"choose '{SHARED}' for several"
            )
        if self.env.fusion.learnable or env.fusion.learnable:
            raise ConfigError(
                "fusion: 'learnable' belongs to one environment, and the agent is to enter another "
                "one; choose 'generator'"
            )
        self.check_env(env)
        self.env = env
        self._settle()

    def _settle(self) -> None:
        """Makes what belongs to the environment."""
        settings = self.settings
        self.history: History[Step] = History(self.step_type, self.env, settings.history_bytes)
        self.parts["history"] = self.history
        if settings.likelihood:
            draws = LabelledDraws(self.env.distiller.reference, derive_seed(self.seed, "labelled"))
            if "draws" in self.parts:
                draws.load_state_dict(self.parts["draws"].state_dict())
            self.parts["draws"] = self._draws = draws

    def optimize(self, *modules: nn.Module) -> None:
        """Makes the optimiser of the policy and of what is learned together with it."""
        parameters = [p for module in (self.policy, *modules) for p in module.parameters()]
        self.optimizer = OPTIMIZERS[self.settings.optimizer](parameters, lr=self.settings.lr)
        self._steps = StepCount(self.optimizer)
        self.parts |= {"optimizer": self.optimizer, "updates": self._steps}

    @torch.no_grad()
    def act(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """Logits of the policy."""
        return self.policy(observation)

    def learn(self, epochs: int, on_epoch_end: EpochEnd, at_rest: AtRest = nothing) -> None:
        """Algorithm 2: the student learns under the policy as it is, then the policy from that."""
        for _ in range(epochs):
            for _ in range(steps_left(self.env)):
                at_rest()
                self.keep(self.collect())
            self.update()
            on_epoch_end()

    @abstractmethod
    def collect(self) -> Step:
        """Trains the student on the batch that waits; gives what is worth keeping of it."""

    def keep(self, step: Step) -> None:
        """Remembers a step; learns from all of them when they are enough or would be too much."""
        self.history.add(step)
        if len(self.history) == self.settings.agent_every or self.history.full:
            self.update()

    @torch.enable_grad()
    def update(self) -> None:
        """Learns from what has been kept, and forgets it."""
        if len(self.history):
            self.learn_from(self.history)
            self.history.clear()

    @abstractmethod
    def learn_from(self, history: History[Step]) -> None:
        """Updates the policy from some steps."""

    def label_losses(self) -> Iterator[Float[Tensor, ""]]:
        """What labelled images add to the loss of a step of the optimiser; nothing without λ."""
        if (labelled := self.look_at_labelled()) is not None:
            yield self.label_loss(labelled, *self.generate(labelled.observation))

    def look_at_labelled(self) -> Labelled | None:
        """Labelled images drawn anew, and what the policy sees of them; nothing without λ."""
        if not self.settings.likelihood:
            return None
        env = self.env
        state = env.distiller.examine(self._draws.draw(self.settings.likelihood_size))
        seen = env.normalize(env.observer(state))
        return Labelled(seen, env.fusion.evidence(state), state.teacher_cross_entropy)

    def generate(self, *observations: Float[Tensor, "_ F"]) -> Iterator[TeacherWeights]:
        """Weights for each of some observations, in one pass of the policy.

        Of a network this small, two would take twice as long.
        """
        rows = [len(each) for each in observations]
        return map(generated_weights, self.policy(torch.cat(observations)).split(rows))

    def label_loss(self, labelled: Labelled, generated: TeacherWeights) -> Float[Tensor, ""]:
        """Minus λ times the likelihood of labelled images under generated weights."""
        weights = self.env.fusion.fuse(generated, labelled.evidence)
        found = mixture_log_likelihood(weights.logit, labelled.teacher_cross_entropy)
        return -self.settings.likelihood * found.mean()

    @property
    def updates(self) -> int:
        """Steps of the policy's optimiser so far."""
        return self._steps.steps

    def state_dict(self) -> dict[str, Any]:
        """All parts; the history is empty where an epoch has ended."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    @property
    def modules(self) -> Mapping[str, nn.Module]:  # type: ignore[override] # parts may be added
        """The parts that are networks, or have parameters beside them."""
        return {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}


@dataclass(frozen=True)
class PolicyGradientSettings(LearningSettings):
    """Hyperparameters of `pg`.

    Attributes:
        loss: `policy_gradient` (Equ. 7), `clipped` (PPO's, for many passes), or `bce_ones` (the
            released code's).
        clip_range: ε of `clipped`.
        entropy_coef: τ of an entropy bonus on the generated weights; at the optimum of Equ. 7 they
            are then softmax(A/τ) instead of a one-hot.
        prior_weight: τ of a penalty KL(w ‖ w0) on the executed weights, w0 the fusion's prior: at
            the optimum w ∝ w0 exp(A/τ).
        passes: Passes over the remembered batches at each update, one optimiser step a batch.
        replay: Earlier batches, of any task, that every step of the optimiser learns from beside
            its own, so that a shared policy does not forget one task over the next.
        replay_size: Batches that are remembered, an even sample of all so far.

    Raises:
        ConfigError: A value that cannot be used.
    """

    loss: str = "policy_gradient"
    clip_range: float = 0.2
    entropy_coef: float = 0.0
    prior_weight: float = 0.0
    passes: int = 1
    replay: int = 0
    replay_size: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice([*LOSSES, "clipped"], loss=self.loss)
        check_positive(clip_range=self.clip_range)
        check_not_negative(
            entropy_coef=self.entropy_coef, prior_weight=self.prior_weight, replay=self.replay
        )
        check_at_least_1(passes=self.passes, replay_size=self.replay_size)
        if self.replay and (self.policy != SHARED or self.loss != "policy_gradient"):
            raise ConfigError(
                f"replay: needs policy '{SHARED}' and loss 'policy_gradient', found "
                f"'{self.policy}' and '{self.loss}'"
            )


@dataclass(frozen=True, slots=True)
class Transition:
    """What the policy gradient keeps of a step; tensors on the device, without gradient.

    Attributes:
        observation: What the agent saw, as it can be kept.
        advantages: A, what each teacher was worth for each sample.
        evidence: The parts of the weights that no agent chooses (`confidence`, `divergence`), as
            far as the gradient depends on them.
    """

    observation: Any
    advantages: Float[Tensor, "B M"]
    evidence: Evidence


class PolicyGradient(LearningAgent[Transition]):
    """Acts on batches, and learns from all of an epoch's at its end.

    Learnable fusion coefficients live in the environment, which executes them, and are trained with
    the policy. `PolicyGradientSettings` says what can be chosen.

    Raises:
        ConfigError: A hyperparameter that cannot be used, or `clipped` with learnable fusion.
    """

    step_type = Transition
    settings_type = PolicyGradientSettings
    settings: PolicyGradientSettings

    def __init__(self, env: MTKDVectorEnv, *, seed: int = 0, **arguments: Any) -> None:
        super().__init__(env, seed=seed, **arguments)
        self.optimize(env.fusion)
        if self.settings.replay:
            kinds = Transition, Labelled
            self._replay = Replay(self.settings.replay_size, env.device, seed, kinds)
            self.parts["replay"] = self._replay

    def check_env(self, env: MTKDVectorEnv) -> None:
        """Checks that the agent can learn in an environment."""
        super().check_env(env)
        if self.settings.loss == "clipped" and env.fusion.generated_share is None:
            raise ConfigError(
                "loss: 'clipped' compares the generated weights alone, so it knows nothing of a "
                "learnable fusion or a prior; choose 'policy_gradient' or another fusion"
            )
        if self.settings.prior_weight and env.fusion.prior is None:
            raise ConfigError("prior_weight: needs env.fusion prior; without, see entropy_coef")
        if self.settings.replay and env.fusion.prior is None and env.fusion.generated_share != 1:
            raise ConfigError(
                "replay: knows generated weights and a prior; choose env.fusion generator or prior"
            )

    def warm_up(self, steps: int, weights: str = "uniform", at_rest: AtRest = nothing) -> None:
        """Algorithm 1: the student learns under equal weights, then the policy from that.

        With `agent_every` it learns while they last.
        """
        for _ in range(steps):
            at_rest()
            self.keep(self.train_student(warm_up_weights(self.env, weights)))
        self.update()

    def collect(self) -> Transition:
        """One step of the student under the policy's weights (Equ. 9-14)."""
        env = self.env
        return self.train_student(env.to_weights(self.act(env.observation)))

    def train_student(self, weights: TeacherWeights) -> Transition:
        """One step of the student, and what every teacher was worth in it (Equ. 6, 8)."""
        env = self.env
        observation, evidence = env.keepable_observation, self._evidence(weights)
        record = env.distill(weights)
        return Transition(observation, record.rewards.advantages, evidence)

    def _evidence(self, weights: TeacherWeights) -> Evidence:
        """The parts of the weights that the gradient depends on; nothing of a fixed sum is."""
        fusion, settings = self.env.fusion, self.settings
        if settings.loss != "bce_ones" and fusion.prior is None and not fusion.learnable:
            return {}
        parts = {name: part for name, part in weights.parts.items() if name != "generator"}
        return parts or fusion.evidence(self.env.state)  # None are known in a warm-up.

    def learn_from(self, history: History[Transition]) -> None:
        """Passes over the steps in their order, one step of the optimiser for each (Equ. 7)."""
        settings = self.settings
        steps: Iterable[Transition] = history.drained() if settings.passes > 1 else history
        old: Iterable[TeacherWeights | None] = repeat(None)
        if settings.loss == "clipped":
            # The policy is still the one that acted; after a warm-up it is as if it had.
            old = [generated_weights(self.act(known.observation)) for known in steps]
        plain = self._is_plain
        for _ in range(settings.passes):
            for known, before in zip(steps, old, strict=False):
                if plain:
                    self._descend_plainly(known)
                    continue
                labelled = self.look_at_labelled()
                losses = [self._whole_loss(known, before, labelled)]
                if settings.replay:
                    losses += self._replayed(known, labelled)
                descend(self.optimizer, losses)

    @property
    def _is_plain(self) -> bool:
        """Whether the loss is that of Equ. 7 alone, of the paper's network."""
        settings = self.settings
        beside = settings.entropy_coef, settings.prior_weight, settings.likelihood, settings.replay
        known = settings.loss == "policy_gradient" and self.env.fusion.generated_share is not None
        return known and not any(beside) and isinstance(self.policy, TeacherPolicy)

    def _descend_plainly(self, known: Transition) -> None:
        """A step of the optimiser by the gradient in closed form."""
        assert isinstance(self.policy, TeacherPolicy)
        share = self.env.fusion.generated_share
        assert share is not None
        slope = partial(policy_gradient_slope, advantages=known.advantages, share=share)
        self.policy.back_propagate(known.observation, slope)
        follow_gradients(self.optimizer)

    def _replayed(self, known: Transition, labelled: Labelled | None) -> list[Float[Tensor, ""]]:
        """The loss of earlier lessons, each of which counts like this one; remembers this one."""
        count, earlier = self.settings.replay, self._replay.draw(self.settings.replay)
        self._replay.add({"known": known} | ({} if labelled is None else {"labelled": labelled}))
        if earlier is None:
            return []
        return [count * self._whole_loss(earlier["known"], None, earlier.get("labelled"))]

    def _whole_loss(
        self, known: Transition, before: TeacherWeights | None, labelled: Labelled | None
    ) -> Float[Tensor, ""]:
        """The loss of a step, with its bonus and that of labelled images.

        Under the weights that the policy generates now, and did before.
        """
        settings = self.settings
        if labelled is None:
            generated = generated_weights(self.policy(known.observation))
        else:
            generated, of_labelled = self.generate(known.observation, labelled.observation)
        if before is not None:
            loss = clipped_loss(generated, before, known.advantages, settings.clip_range)
        else:
            weights = self.env.fusion.fuse(generated, known.evidence)
            loss = LOSSES[settings.loss](weights, known.advantages)
            if settings.prior_weight:
                loss = loss + settings.prior_weight * prior_divergence(weights)
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * mean_entropy(generated)
        return loss if labelled is None else loss + self.label_loss(labelled, of_labelled)
