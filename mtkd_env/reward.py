"""What a teacher is worth for a sample: Equ. 6, its normalisations (Equ. 8), and alternatives.

Per teacher a reward R (B, M), from it the advantages A (B, M), and the scalar reward
r_i = ½ Σ_m (w_l + w_f)[i, m] · A[i, m] that a Gymnasium environment must give. Rows of w sum to
one, so r depends on the action only through differences between teachers.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mtkd_env import distributed, losses
from mtkd_env.distiller import Distiller
from mtkd_env.errors import check_shape
from mtkd_env.imports import Kind, Named, takes
from mtkd_env.terms import Distillation
from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.worth import CrossDirection, Direction, HeldOutDirection, RunningDeviation, worth

EPSILON = 1e-8


Credit = Callable[[DistillState, Distillation], Tensor]


def paper_credit(state: DistillState, distillation: Distillation) -> Float[Tensor, "B M"]:
    """Equ. 6: R_i^m = −CE_i − α KL_i^m − β dis_i^m.

    KL and distance are those of Equ. 2, whatever losses the student is trained with.
    """
    student = state.cross_entropy.detach().unsqueeze(1)
    rewards = -student - distillation.alpha * state.divergence
    # Without feature terms nobody has compared maps.
    return rewards - distillation.beta * state.distance if distillation.beta else rewards


def alignment_credit(state: DistillState, distillation: Distillation) -> Float[Tensor, "B M"]:
    """How well each teacher's logit gradient serves the true class; not in the paper.

    a_i^m = T (p_1(z_i^S) − onehot(y_i)) · (p_T(z_i^S) − p_T(z_i^m)), the inner product in logit
    space of the gradients of CE_i and of KL_i^m: to first order, a step on teacher m's term lowers
    the sample's cross-entropy in proportion to it. Where Equ. 6 pays for teachers that the student
    already agrees with, this pays for those that move it towards the truth.
    """
    temperature = distillation.temperature
    logits = state.student.logits.detach().float()
    error = logits.softmax(1) - losses.class_shares(state.batch.labels, logits.shape[1])
    teachers = state.teachers
    pull = losses.kd_pull(logits, teachers.logits.float(), temperature, teachers.known)
    return temperature * torch.einsum("bc,mbc->bm", error, pull)


def worth_credit(state: DistillState, distillation: Distillation) -> Float[Tensor, "B M"]:
    """How far a step on each teacher's logit term lowers the cross-entropy of other images.

    To first order, in the student's last layer, along the state's `direction`; see
    `mtkd_env.worth`. Needs no label of the sample; not in the paper.
    """
    assert state.direction is not None
    return worth(state, state.direction, distillation.temperature)


def aggregate(
    state: DistillState, weights: TeacherWeights, distillation: Distillation
) -> Float[Tensor, " B"]:
    """Minus the sample's training loss: −CE_i − α Σ_m w_l KL_i^m − β Σ_m w_f dis_i^m.

    What the authors' released code rewards: one number per sample, no credit per teacher.
    """
    logit = (weights.logit.detach() * state.divergence).sum(1)
    rewards = -state.cross_entropy.detach() - distillation.alpha * logit
    if not distillation.beta:
        return rewards
    return rewards - distillation.beta * (weights.feature.detach() * state.distance).sum(1)


def loss_improvement(
    before: DistillState, after: DistillState, weights: TeacherWeights, distillation: Distillation
) -> Float[Tensor, " B"]:
    """How much the student's step has lowered the sample's training loss, at the same weights.

    Not in the paper. Depends on the action, but mostly on the sample: what one sample's weights
    change is of the order of the learning rate over the batch size.
    """
    return aggregate(after, weights, distillation) - aggregate(before, weights, distillation)


def minmax(rewards: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """Rewards rescaled to [0, 1] over the teachers of each sample; 0 where all are equal."""
    low, high = rewards.aminmax(dim=1, keepdim=True)
    return (rewards - low) / (high - low + EPSILON)


def minmax_center(rewards: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """Equ. 8 as its text reads: rescale to [0, 1] over the teachers, then subtract the mean.

    Zero where all teachers are equal and for a single teacher.
    """
    scaled = minmax(rewards)
    return scaled - scaled.mean(1, keepdim=True)


def raw_mean(rewards: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """Equ. 8 as printed: the rescaled reward minus the mean of the raw rewards."""
    return minmax(rewards) - rewards.mean(1, keepdim=True)


def center(rewards: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """Rewards minus their mean over the teachers; keeps their scale."""
    return rewards - rewards.mean(1, keepdim=True)


def zscore(rewards: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """Rewards with mean 0 and sample variance 1 over the batch; 0 where all samples are equal."""
    centred = rewards - distributed.mean(rewards.mean(0, keepdim=True))
    squares = distributed.total(centred.square().sum(0, keepdim=True))
    degrees = max(1, len(rewards) * distributed.processes() - 1)
    return centred / ((squares / degrees).sqrt() + EPSILON)


def zscore_clamp(rewards: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """Released code: standardised over the batch, then clamped to [0, 1]."""
    return zscore(rewards).clamp(0, 1)


NORMALIZATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "minmax_center": minmax_center,
    "raw_mean": raw_mean,
    "center": center,
    "zscore": zscore,
    "zscore_clamp": zscore_clamp,
    "running": center,  # and divided by a running deviation, which `RewardFunction` keeps
    "none": lambda rewards: rewards,
}


# Of the state before the student's step and after it (the same one where nobody asked for it), the
# executed weights and the training loss: one reward per sample.
SampleReward = Callable[[DistillState, DistillState, TeacherWeights, Distillation], Tensor]


@dataclass(frozen=True, slots=True)
class RewardRule:
    """How rewards come about.

    Attributes:
        credit: Reward per teacher.
        normalization: Name in `NORMALIZATIONS`, from rewards to advantages.
        sample: Reward of the sample as a whole, if every teacher is to get that one.
        needs_update: Whether `sample` compares with the student after its step, which costs a
            forward.
        direction: Makes what finds the direction that `credit` looks along, of the distiller and
            the number of labelled images to look at, if it looks along one.
        needs_label: Whether it is worth anything only for samples with a label.
    """

    credit: Credit
    normalization: str = "minmax_center"
    sample: SampleReward | None = None
    needs_update: bool = False
    direction: Callable[[Distiller, int], Direction] | None = None
    needs_label: bool = True


def _aggregate_after(
    _: DistillState, after: DistillState, w: TeacherWeights, d: Distillation
) -> Tensor:
    return aggregate(after, w, d)


REWARDS: Mapping[str, RewardRule] = {
    # The student's cross-entropy is the same for all teachers, and so no part of the advantages.
    "paper": RewardRule(paper_credit, needs_label=False),
    "aggregate": RewardRule(paper_credit, "none", _aggregate_after),
    "reference": RewardRule(paper_credit, "zscore_clamp", _aggregate_after),
    "alignment": RewardRule(alignment_credit),
    "improvement": RewardRule(paper_credit, "zscore", loss_improvement, needs_update=True),
    # −CE_i after the student's step; not in the paper. What counts, without any credit.
    "cross_entropy": RewardRule(
        paper_credit,
        "zscore",
        lambda _, after, *__: -after.cross_entropy.detach(),
        needs_update=True,
    ),
    "heldout": RewardRule(
        worth_credit,
        "running",
        direction=HeldOutDirection,
        needs_label=False,
    ),
    "cross": RewardRule(
        worth_credit,
        "running",
        direction=lambda *_: CrossDirection(),
        needs_label=False,
    ),
}


REWARD: Kind[RewardRule] = Kind(
    REWARDS,
    "reward",
    lambda found: isinstance(found, RewardRule) or takes(2)(found),
    "a RewardRule, or a function of (state, distillation) that gives (B, M)",
    lambda found: found if isinstance(found, RewardRule) else RewardRule(found),
)


@dataclass(frozen=True, slots=True)
class Rewards:
    """Rewards of one batch; no tensor carries a gradient.

    Attributes:
        teacher: R, what each teacher is worth for each sample.
        advantages: A, normalised; what an agent learns from.
        scalar: r = ½ Σ_m (w_l + w_f) A, the Gymnasium reward.
    """

    teacher: Float[Tensor, "B M"]
    advantages: Float[Tensor, "B M"]
    scalar: Float[Tensor, " B"]


def expected_advantage(
    weights: TeacherWeights, advantages: Float[Tensor, "B M"]
) -> Float[Tensor, " B"]:
    """r_i = ½ Σ_m (w_l + w_f)[i, m] · A[i, m]; its gradient is Equ. 7's, halved."""
    return 0.5 * ((weights.logit + weights.feature) * advantages).sum(1)


class RewardFunction:
    """Gives the rewards of a batch under one rule.

    Args:
        rule: How rewards come about.
        distillation: The training loss, whose α, β and T rewards share.
        normalization: Replaces the rule's own, if given.
        timing: Whether teachers get credit for the student `before` or `after` its step.
        direction: What finds the direction that the rule's credit looks along, if it does.

    Attributes:
        needs_update: Whether rewards need the student's view of the batch after its step.
    """

    def __init__(
        self,
        rule: RewardRule,
        distillation: Distillation,
        normalization: str | None = None,
        timing: str = "before",
        direction: Direction | None = None,
    ) -> None:
        self.rule = rule
        self.distillation = distillation
        normalization = normalization or rule.normalization
        self._normalize = NORMALIZATIONS[normalization]
        self._deviation = RunningDeviation() if normalization == "running" else None
        self._after = timing == "after"
        self._direction = direction
        self.needs_update = self._after or rule.needs_update

    @torch.no_grad()
    def observe(self, state: DistillState) -> DistillState:
        """Takes a batch that has just been seen into account, once; gives it with its direction."""
        if self._direction is not None:
            state = replace(state, direction=self._direction(state))
        if self._deviation is not None:
            state = replace(state, credit=self.teacher_rewards(state))
            self._deviation.observe(self._normalize(self.teacher_rewards(state)))
        return state

    @torch.no_grad()
    def teacher_rewards(self, state: DistillState) -> Float[Tensor, "B M"]:
        """R of every teacher; does not depend on any action.

        Raises:
            ConfigError: The rule's credit has another shape.
        """
        if state.credit is not None:
            return state.credit
        rewards = self.rule.credit(state, self.distillation)
        check_shape("env.reward", rewards, state.divergence.shape)
        return rewards

    def advantages(self, rewards: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
        """A: rewards by the rule's normalisation, or the one that replaces it."""
        advantages = self._normalize(rewards)
        return advantages if self._deviation is None else self._deviation(advantages)

    @torch.no_grad()
    def __call__(
        self, state: DistillState, weights: TeacherWeights, updated: DistillState | None = None
    ) -> Rewards:
        """Rewards for having given these weights in this state.

        Args:
            state: The batch before the student's step, as `observe` gave it.
            weights: The executed weights.
            updated: The batch after it; must be given where `needs_update`.
        """
        after = state if updated is None else replace(updated, direction=state.direction)
        raw = teacher = self.teacher_rewards(after if self._after else state)
        if self.rule.sample is not None:
            reward = self.rule.sample(state, after, weights, self.distillation)
            raw = reward.unsqueeze(1).expand_as(teacher)
        advantages = self.advantages(raw)
        return Rewards(teacher, advantages, expected_advantage(weights, advantages))

    def when_asked(
        self, state: DistillState, weights: TeacherWeights, updated: DistillState | None = None
    ) -> Callable[[], Rewards]:
        """What gives the rewards of a step; see `__call__` for the arguments.

        Of several processes, which make them together, at once; else only if asked for.
        """
        # With the deviation as it is now: it never writes into its value.
        now = copy(self)
        now._deviation = copy(self._deviation)
        pay = partial(now, state, weights, updated)
        if not distributed.active():
            return pay
        rewards = pay()
        return lambda: rewards

    def reseed(self, seed: int) -> None:
        """Starts all over, with a new student."""
        for part in self._parts().values():
            part.reseed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Everything that batches have changed."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Direction | RunningDeviation]:
        parts = {"direction": self._direction, "deviation": self._deviation}
        return {name: part for name, part in parts.items() if part is not None}


def make_reward(
    reward: Named,
    distiller: Distiller,
    *,
    normalization: str | None = None,
    timing: str = "before",
    heldout_size: int = 128,
) -> RewardFunction:
    """A reward for the student of a distiller.

    Args:
        reward: A name in `REWARDS`, or what else `REWARD` finds.
        distiller: Has the student, the constants of its loss and the labelled images.
        normalization: Name in `NORMALIZATIONS` that replaces the reward's own.
        timing: `before` or `after` the student's step.
        heldout_size: Labelled images that `heldout` draws anew for every batch.
    """
    rule = REWARD.find(reward)
    direction = rule.direction(distiller, heldout_size) if rule.direction else None
    return RewardFunction(rule, distiller.distillation, normalization, timing, direction)
