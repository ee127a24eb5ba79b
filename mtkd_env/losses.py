"""The loss terms of Equ. 2 and the evidence of Equ. 3-4: pure functions, one value per sample.

They know neither networks nor weights. All are computed in float32 at least, whatever the
precision of the networks, because differences of log-probabilities lose all digits in half.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional


def _precise(values: Tensor) -> Tensor:
    """The values in float32, or in float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cross_entropy(
    logits: Float[Tensor, "B C"], targets: Int64[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Cross-entropy of the predictions with the true classes, per sample [nats].

    First term of Equ. 2 without the mean over the batch.
    """
    return functional.cross_entropy(_precise(logits), targets, reduction="none")


def teacher_cross_entropy(
    teachers: Float[Tensor, "M B C"], targets: Int64[Tensor, " B"]
) -> Float[Tensor, "B M"]:
    """Cross-entropy of every teacher with the true classes, per sample [nats]; Equ. 3-5."""
    log_probabilities = functional.log_softmax(_precise(teachers), dim=-1)
    index = targets.expand(len(teachers), -1).unsqueeze(-1)
    return -log_probabilities.gather(-1, index).squeeze(-1).transpose(0, 1)


def kd_divergence(
    student: Float[Tensor, "B C"], teachers: Float[Tensor, "M B C"], temperature: float
) -> Float[Tensor, "B M"]:
    """KL divergence from every teacher's softened prediction to the student's, per sample [nats].

    Soft-target term of Hinton et al. (2015), per teacher and without the batch mean:
        kd[b, m] = T² Σ_c p_m(c | x_b) log( p_m(c | x_b) / q(c | x_b) )
    The paper writes D_KL(y^S, y^T) in Equ. 2; its released code, like the field, has the teacher
    first, and so has this.

    Args:
        student: Student logits; the only argument that receives a gradient.
        teachers: Logits of the M teachers.
        temperature: Softening T > 0; T² keeps the gradient scale of T = 1.
    """
    log_q = functional.log_softmax(_precise(student) / temperature, dim=-1)
    log_p = functional.log_softmax(_precise(teachers) / temperature, dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return temperature**2 * divergence.transpose(0, 1)


def feature_mse(
    projected: tuple[Tensor, ...], teachers: tuple[Tensor, ...]
) -> Float[Tensor, "B M"]:
    """Mean squared distance of the student's projected maps to the teachers', per sample.

    FitNet term (Romero et al., 2015) as Equ. 2 uses it: the mean runs over channels and pixels.

    Args:
        projected: r_m(F), one (B, K_m, H_m, W_m) tensor per teacher; receives the gradient.
        teachers: Last feature maps of the teachers, of the same shapes.
    """
    pairs = zip(projected, teachers, strict=True)
    distances = [
        (_precise(ours) - _precise(theirs)).square().flatten(1).mean(1) for ours, theirs in pairs
    ]
    return torch.stack(distances, dim=1)


def feature_cosine(
    projected: tuple[Tensor, ...], teachers: tuple[Tensor, ...]
) -> Float[Tensor, "B M"]:
    """Cosine of the student's projected, pooled features and the teachers', per sample.

    Part of Equ. 3-5. Both maps are averaged over their pixels. For a teacher whose classifier reads
    its pooled map this is the cosine with its feature f^m; for the others the pooled map stands in.

    Args:
        projected: r_m(F), one (B, K_m, H_m, W_m) tensor per teacher.
        teachers: Last feature maps of the teachers, of the same shapes.
    """
    pairs = zip(projected, teachers, strict=True)
    pooled = [
        (_precise(ours).mean((2, 3)), _precise(theirs).mean((2, 3))) for ours, theirs in pairs
    ]
    return torch.stack([functional.cosine_similarity(a, b, dim=1) for a, b in pooled], dim=1)
