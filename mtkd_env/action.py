"""From an action to teacher weights: Equ. 9-14.

An action is 2·M logits. Their softmaxes over the teachers are the generated weights, which are
fused with two parts that need no learning: how sure each teacher is, and how far the student is.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mtkd_env.errors import ConfigError, lookup
from mtkd_env.types import DistillState, TeacherWeights

PARTS = ("generator", "confidence", "divergence")

# Coefficients γ of the fusion in the order of PARTS, the same in both heads.
FUSIONS: Mapping[str, tuple[float, float, float]] = {
    "paper": (1 / 3, 1 / 3, 1 / 3),
    "learnable": (1 / 3, 1 / 3, 1 / 3),
    "generator": (1.0, 0.0, 0.0),
    "confidence": (0.0, 1.0, 0.0),
    "divergence": (0.0, 0.0, 1.0),
    "generator+confidence": (0.5, 0.5, 0.0),
    "generator+divergence": (0.5, 0.0, 0.5),
    "confidence+divergence": (0.0, 0.5, 0.5),
}


# The fusion that multiplies the generated weights with weights that are there before; see `fuse`.
PRIOR = "prior"

# No weight of a prior is taken as smaller, so that an agent can bring back any teacher.
SMALLEST_PRIOR = 1e-4

# Weights that are there before an agent acts.
Prior = Callable[[DistillState], TeacherWeights]


def fusion_coefficients(fusion: str | Sequence[float]) -> tuple[float, ...]:
    """The coefficients γ of a fusion by its name in `FUSIONS`, or those that are given.

    Raises:
        ConfigError: Unknown name, or coefficients that are not three, negative, or do not sum to 1.
    """
    values = lookup(FUSIONS, fusion, "fusion") if isinstance(fusion, str) else tuple(fusion)
    # Written so that NaN fails both.
    on_simplex = all(value >= 0 for value in values) and abs(sum(values) - 1) <= 1e-6
    if len(values) != len(PARTS) or not on_simplex:
        raise ConfigError(
            f"fusion: expected {len(PARTS)} coefficients >= 0 with sum 1 "
            f"for {', '.join(PARTS)}, got {list(values)}"
        )
    return values


def generated_weights(action: Float[Tensor, "B A"]) -> TeacherWeights:
    """Softmax over the teachers of each half of the action: logit head first, then feature head."""
    logit, feature = action.float().unflatten(1, (2, -1)).softmax(2).unbind(1)
    return TeacherWeights(logit=logit, feature=feature)


def complement(shares: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """Weights that are large where shares are small: (1 − share) / (M − 1).

    Args:
        shares: Rows on the simplex; so are the result's. A single teacher has weight 1.
    """
    teachers = shares.shape[1]
    return (1 - shares) / (teachers - 1) if teachers > 1 else torch.ones_like(shares)


def confidence_weights(teacher_cross_entropy: Float[Tensor, "B M"]) -> TeacherWeights:
    """Equ. 9: the surer of the true class a teacher is, the larger its weight.

    (1 − softmax_m(CE^m)) / (M − 1) in both heads. The paper's K is the number of teachers.
    """
    weights = complement(teacher_cross_entropy.softmax(1))
    return TeacherWeights(logit=weights, feature=weights)


def divergence_weights(
    divergence: Float[Tensor, "B M"], similarity: Float[Tensor, "B M"]
) -> TeacherWeights:
    """Divergence-aware part of Equ. 9-14: softmax of the KL, and of the cosine, per head.

    As in the paper, a larger gap in the logits and a larger similarity of the features both
    raise a weight.
    """
    return TeacherWeights(logit=divergence.softmax(1), feature=similarity.softmax(1))


def fuse(
    coefficients: Float[Tensor, "2 3"] | Sequence[Sequence[float]],
    parts: Mapping[str, TeacherWeights],
) -> TeacherWeights:
    """The convex combination of the parts, per head (the fusion of Equ. 9-14).

    Args:
        coefficients: γ, rows (logit, feature) on the simplex, columns in the order of `PARTS`.
        parts: Pairs of weights by names in `PARTS`; others count for nothing.
    """
    columns = [PARTS.index(name) for name in parts]
    logit, feature = (
        [
            _scaled(getattr(part, head), row[k])
            for k, part in zip(columns, parts.values(), strict=True)
        ]
        for head, row in zip(("logit", "feature"), coefficients, strict=True)
    )
    return TeacherWeights(reduce(torch.add, logit), reduce(torch.add, feature), parts)


def _scaled(weights: Float[Tensor, "B M"], factor: Tensor | float) -> Float[Tensor, "B M"]:
    return weights if isinstance(factor, float) and factor == 1 else weights * factor


def with_prior(prior: TeacherWeights, generated: TeacherWeights) -> TeacherWeights:
    """softmax(log prior + action) per head, for an action whose softmaxes are `generated`.

    The product of both, divided by its sum. At action 0 it is the prior, but for `SMALLEST_PRIOR`.
    """
    before, own = (torch.stack([pair.logit, pair.feature]) for pair in (prior, generated))
    smallest = torch.finfo(torch.float32).tiny
    logs = before.clamp(min=SMALLEST_PRIOR).log() + own.clamp(min=smallest).log()
    logit, feature = logs.softmax(2).unbind()
    return TeacherWeights(logit, feature, {"generator": generated, PRIOR: prior})


class WeightFusion(nn.Module):
    """What becomes of generated weights: the fusion of Equ. 9-14, or their product with a prior.

    Args:
        fusion: A name in `FUSIONS`, the three coefficients γ themselves, or `prior`. `learnable`
            starts as `paper`; its coefficients are the softmax of parameters that an agent may
            train.
        prior: Weights that are there before, for `prior`.

    Raises:
        ConfigError: Unknown name; coefficients that are not three, negative, or do not sum to 1; or
            a prior that is missing, or not asked for.
    """

    def __init__(self, fusion: str | Sequence[float], prior: Prior | None = None) -> None:
        super().__init__()
        if (fusion == PRIOR) != (prior is not None):
            raise ConfigError(
                "fusion: 'prior' needs weights that are there before an agent acts; see env.prior"
                if prior is None
                else f"prior: only the fusion 'prior' has one, found {fusion!r}"
            )
        self.prior = prior
        self.learnable = fusion == "learnable"
        if prior is not None:
            return
        # On the host, so that nobody waits for the device to know them.
        self._fixed = values = fusion_coefficients(fusion)
        rows = torch.tensor([values, values], dtype=torch.float32)
        if self.learnable:
            self.logits = nn.Parameter(rows.log())
        else:
            self.register_buffer("fixed", rows)

    @property
    def coefficients(self) -> Float[Tensor, "2 3"]:
        """γ: one row per head, each on the simplex; of a fusion without prior."""
        return self.logits.softmax(1) if self.learnable else self.get_buffer("fixed")

    @property
    def generated_share(self) -> float | None:
        """γ of what an agent generates, if all that is added to it does not depend on an agent."""
        return None if self.prior is not None or self.learnable else self._fixed[0]

    def evidence(self, state: DistillState) -> dict[str, TeacherWeights]:
        """The parts that need no action, but for those that count for nothing."""
        if self.prior is not None:
            return {PRIOR: self.prior(state)}
        _, confidence, divergence = self._fixed
        parts = {}
        if confidence:
            parts["confidence"] = confidence_weights(state.teacher_cross_entropy)
        if divergence:
            parts["divergence"] = divergence_weights(state.divergence, state.similarity)
        return parts

    def fuse(
        self, generated: TeacherWeights, evidence: Mapping[str, TeacherWeights]
    ) -> TeacherWeights:
        """Executed weights of generated ones, with their parts.

        Args:
            generated: What an agent generates.
            evidence: What `evidence` gave for the batch.
        """
        if self.prior is not None:
            return with_prior(evidence[PRIOR], generated)
        coefficients = self.coefficients if self.learnable else (self._fixed,) * 2
        return fuse(coefficients, {"generator": generated, **evidence})

    def forward(self, action: Float[Tensor, "B A"], state: DistillState) -> TeacherWeights:
        """Executed weights of an action, with their parts."""
        return self.fuse(generated_weights(action), self.evidence(state))
