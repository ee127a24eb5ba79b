"""What a teacher is worth for a sample: Equ. 6, its normalisations (Equ. 8), and alternatives.

Per teacher a reward R (B, M), from it the advantages A (B, M), and the scalar reward
r_i = ½ Σ_m (w_l + w_f)[i, m] · A[i, m] that a Gymnasium environment must give. Rows of w sum to
one, so r depends on the action only through differences between teachers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mtkd_env.types import DistillState, TeacherWeights

EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class Scale:
    """The constants of the training loss that rewards share with it.

    Attributes:
        alpha: α of the logit terms.
        beta: β of the feature terms.
        temperature: T of the softened predictions.
    """

    alpha: float
    beta: float
    temperature: float


Credit = Callable[[DistillState, Scale], Tensor]


def paper_credit(state: DistillState, scale: Scale) -> Float[Tensor, "B M"]:
    """Equ. 6: R_i^m = −CE_i − α KL_i^m − β dis_i^m.

    KL and distance are those of Equ. 2, whatever losses the student is trained with.
    """
    student = state.cross_entropy.detach().unsqueeze(1)
    return -student - scale.alpha * state.divergence - scale.beta * state.distance


def alignment_credit(state: DistillState, scale: Scale) -> Float[Tensor, "B M"]:
    """How well each teacher's logit gradient serves the true class; not in the paper.

    a_i^m = T (p_1(z_i^S) − onehot(y_i)) · (p_T(z_i^S) − p_T(z_i^m)), the inner product in logit
    space of the gradients of CE_i and of KL_i^m: to first order, a step on teacher m's term lowers
    the sample's cross-entropy in proportion to it. Where Equ. 6 pays for teachers that the student
    already agrees with, this pays for those that move it towards the truth.
    """
    temperature = scale.temperature
    logits = state.student.logits.detach().float()
    onehot = functional.one_hot(state.batch.targets, logits.shape[1])
    error = logits.softmax(1) - onehot
    teachers = (state.teachers.logits.float() / temperature).softmax(-1)
    pull = (logits / temperature).softmax(1) - teachers
    return temperature * torch.einsum("bc,mbc->bm", error, pull)


def aggregate(state: DistillState, weights: TeacherWeights, scale: Scale) -> Float[Tensor, " B"]:
    """Minus the sample's training loss: −CE_i − α Σ_m w_l KL_i^m − β Σ_m w_f dis_i^m.

    What the authors' released code rewards: one number per sample, no credit per teacher.
    """
    logit = (weights.logit.detach() * state.divergence).sum(1)
    feature = (weights.feature.detach() * state.distance).sum(1)
    return -state.cross_entropy.detach() - scale.alpha * logit - scale.beta * feature


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


def zscore_clamp(rewards: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """Released code: standardised over the batch, then clamped to [0, 1]."""
    spread = rewards.std(0, correction=0, keepdim=True)
    return ((rewards - rewards.mean(0, keepdim=True)) / (spread + EPSILON)).clamp(0, 1)


def unchanged(rewards: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """The rewards as they are."""
    return rewards


NORMALIZATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "minmax_center": minmax_center,
    "raw_mean": raw_mean,
    "center": center,
    "zscore_clamp": zscore_clamp,
    "none": unchanged,
}


@dataclass(frozen=True, slots=True)
class RewardRule:
    """How rewards come about.

    Attributes:
        credit: Reward per teacher.
        normalization: Name in `NORMALIZATIONS`, from rewards to advantages.
        aggregated: Whether every teacher of a sample gets the same, aggregated reward.
    """

    credit: Credit
    normalization: str = "minmax_center"
    aggregated: bool = False


REWARDS: Mapping[str, RewardRule] = {
    "paper": RewardRule(paper_credit),
    "aggregate": RewardRule(paper_credit, normalization="none", aggregated=True),
    "reference": RewardRule(paper_credit, normalization="zscore_clamp", aggregated=True),
    "alignment": RewardRule(alignment_credit),
}


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
        scale: α, β and T of the training loss.
        normalization: Replaces the rule's own, if given.
    """

    def __init__(self, rule: RewardRule, scale: Scale, normalization: str | None = None) -> None:
        self.rule = rule
        self.scale = scale
        self._normalize = NORMALIZATIONS[normalization or rule.normalization]

    def teacher_rewards(self, state: DistillState) -> Float[Tensor, "B M"]:
        """R of every teacher; does not depend on any action."""
        return self.rule.credit(state, self.scale)

    @torch.no_grad()
    def __call__(self, state: DistillState, weights: TeacherWeights) -> Rewards:
        """Rewards for having given these weights in this state."""
        teacher = self.teacher_rewards(state)
        raw = teacher
        if self.rule.aggregated:
            raw = aggregate(state, weights, self.scale).unsqueeze(1).expand_as(teacher)
        advantages = self._normalize(raw)
        return Rewards(teacher, advantages, expected_advantage(weights, advantages))
