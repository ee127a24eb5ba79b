"""The loss terms of Equ. 2 and the evidence of Equ. 3-4: pure functions, one value per sample.

They know neither networks nor weights. All are computed in float32 at least, whatever the
precision of the networks, because differences of log-probabilities lose all digits in half.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from mtkd_env import distributed
from mtkd_env.precision import widen
from mtkd_env.types import UNKNOWN, UNKNOWN_LOGIT, Known

# Classes (`UNKNOWN` without a label), or the share of every class in each image.
Labels = Int64[Tensor, " B"] | Float[Tensor, "B C"]

# Log-probability [nats] of a class that a teacher does not know, where the logarithm of its
# probability of 0 is needed.
UNKNOWN_LOG_PROBABILITY = -20.0


def cross_entropy(
    logits: Float[Tensor, "B C"], labels: Labels, smoothing: float = 0.0
) -> Float[Tensor, " B"]:
    """Cross-entropy of the predictions with the true classes, per sample [nats].

    First term of Equ. 2 without the mean over the batch; 0 for an image without a label.

    Args:
        logits: The predictions.
        labels: The true classes, or the share of every class in each image.
        smoothing: Part of every label that is spread evenly over all classes (Szegedy et al.,
            2016).
    """
    if labels.is_floating_point():
        labels = labels.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(
        widen(logits),
        labels,
        reduction="none",
        label_smoothing=smoothing,
        ignore_index=UNKNOWN,
    )


def teacher_cross_entropy(
    teachers: Float[Tensor, "M B C"], labels: Labels, known: Known = None
) -> Float[Tensor, "B M"]:
    """Cross-entropy of every teacher with the true classes, per sample [nats]; Equ. 3-5.

    0 for an image without a label, 20 for one of a class that the teacher does not know.
    """
    log_probabilities = functional.log_softmax(widen(teachers), dim=-1)
    if known is not None:
        unknown = ~known.unsqueeze(1)
        log_probabilities = log_probabilities.masked_fill(unknown, UNKNOWN_LOG_PROBABILITY)
    if labels.is_floating_point():
        return -(log_probabilities * labels.to(log_probabilities.dtype)).sum(-1).transpose(0, 1)
    entropies = functional.nll_loss(
        log_probabilities.flatten(0, 1),
        labels.repeat(len(teachers)),
        reduction="none",
        ignore_index=UNKNOWN,
    )
    return entropies.unflatten(0, (len(teachers), -1)).transpose(0, 1)


def class_shares(labels: Labels, num_classes: int) -> Float[Tensor, "B C"]:
    """Share of every class in each image: ones and zeros where images are not mixed.

    All zeros for an image without a label.
    """
    if labels.is_floating_point():
        return labels
    # One class more, which is that of images without a label.
    shares = torch.zeros(len(labels), num_classes + 1, device=labels.device)
    return shares.scatter_(1, (labels % (num_classes + 1)).unsqueeze(1), 1.0)[:, :-1]


def predictive_entropy(logits: Float[Tensor, "M B C"], known: Known = None) -> Float[Tensor, "B M"]:
    """Shannon entropy of every teacher's prediction at temperature 1, per sample [nats].

    That of a teacher of C_m < C classes is scaled by log C / log C_m, so that whoever has no idea
    has log C.
    """
    entropy = torch.special.entr(widen(logits).softmax(-1)).sum(-1).transpose(0, 1)
    if known is None:
        return entropy
    return entropy * (math.log(known.shape[1]) / known.sum(1).log())


def mixture_log_likelihood(
    weights: Float[Tensor, "*K B M"], teacher_cross_entropy: Float[Tensor, "B M"]
) -> Float[Tensor, "*K B"]:
    """Log Σ_m w^m p_1(z^m)[y]: how likely weighted teachers find the true classes [nats].

    Args:
        weights: Rows on the simplex; receive a gradient.
        teacher_cross_entropy: The teachers' with the true classes, all of which are known.
    """
    smallest = torch.finfo(weights.dtype).tiny
    return (weights.clamp(min=smallest).log() - teacher_cross_entropy).logsumexp(-1)


def of_known(student: Float[Tensor, "B C"], known: Known) -> Float[Tensor, "#M B C"]:
    """The student's logits as far as each teacher knows their classes, the same ones for all if so.

    Softmaxes of them are distributions over the teacher's classes; no gradient passes the others.
    """
    if known is None:
        return student.unsqueeze(0)
    return student.unsqueeze(0).masked_fill(~known.unsqueeze(1), UNKNOWN_LOGIT)


def kd_divergence(
    student: Float[Tensor, "B C"],
    teachers: Float[Tensor, "M B C"],
    temperature: float,
    known: Known = None,
) -> Float[Tensor, "B M"]:
    """KL divergence from every teacher's softened prediction to the student's, per sample [nats].

    Soft-target term of Hinton et al. (2015), per teacher and without the batch mean:
        kd[b, m] = T² Σ_c p_m(c | x_b) log( p_m(c | x_b) / q(c | x_b) )
    The paper writes D_KL(y^S, y^T) in Equ. 2; its released code, like the field, has the teacher
    first, and so has this. Both are distributions over the classes that the teacher knows.

    Args:
        student: Student logits; the only argument that receives a gradient.
        teachers: Logits of the M teachers.
        temperature: Softening T > 0; T² keeps the gradient scale of T = 1.
        known: Which classes each teacher knows.
    """
    log_q, log_p = (
        functional.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
        for logits in (of_known(widen(student), known), widen(teachers))
    )
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).transpose(0, 1)
    return divergence if temperature == 1 else temperature**2 * divergence


def kd_pull(
    student: Float[Tensor, "B C"],
    teachers: Float[Tensor, "M B C"],
    temperature: float,
    known: Known = None,
) -> Float[Tensor, "M B C"]:
    """Q − p_m, at temperature T: T times it is the gradient of `kd_divergence` in the logits.

    0 at classes that the teacher does not know. See `kd_divergence` for the arguments.
    """
    ours = (of_known(widen(student), known) / temperature).softmax(-1)
    return ours - (widen(teachers) / temperature).softmax(-1)


def divergence_from(
    probabilities: Float[Tensor, "M B C"], log_shares: Float[Tensor, "B C"]
) -> Float[Tensor, "B M"]:
    """KL(p^m ‖ q) of every teacher's prediction from another, given by log q, per sample [nats]."""
    own = torch.special.entr(probabilities).sum(-1)
    return (-own - torch.einsum("mbc,bc->mb", probabilities, log_shares)).T


def kd_of_mean(
    student: Float[Tensor, "B C"],
    teachers: Float[Tensor, "M B C"],
    temperature: float,
    known: Known = None,
) -> Float[Tensor, "B M"]:
    """KL divergence from the softened mean of the teachers' logits to the student, per sample.

    Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning" (NeurIPS
    2020), times T². The same for every teacher, so weights that sum to one do not change it.

    Args:
        student: Student logits; the only argument that receives a gradient.
        teachers: Logits of the M teachers.
        temperature: Softening T > 0.
        known: Which classes each teacher knows; the mean of a class is over those that know it.
    """
    if known is None:
        mean = widen(teachers).mean(0, keepdim=True)
    else:
        count = known.sum(0)
        total = widen(teachers).masked_fill(~known.unsqueeze(1), 0).sum(0, keepdim=True)
        mean = torch.where(count > 0, total / count.clamp(min=1), UNKNOWN_LOGIT)
        known = (count > 0).unsqueeze(0)
    return kd_divergence(student, mean, temperature, known).expand(-1, len(teachers))


def feature_mse(
    projected: tuple[Tensor, ...], teachers: tuple[Tensor, ...]
) -> Float[Tensor, "B M"]:
    """Mean squared distance of the student's projected maps to the teachers', per sample.

    FitNet term (Romero et al., 2015) as Equ. 2 uses it: the mean runs over channels and pixels.

    Args:
        projected: r_m(F), one (B, K_m, H_m, W_m) tensor per teacher; receives the gradient.
        teachers: Last feature maps of the teachers, of the same shapes.
    """
    squares = []
    for ours, theirs in zip(projected, teachers, strict=True):
        # The gradient is laid out like what is seen here; where it meets another layout, all that
        # follows is several times slower.
        last = (0, 2, 3, 1) if ours.stride(1) == 1 else (0, 1, 2, 3)
        first, second = (widen(one.permute(last)) for one in (ours, theirs))
        squares.append(functional.mse_loss(first, second, reduction="none"))
    # A mean would fill a map with its gradient, a sum does not.
    return torch.stack([one.sum((1, 2, 3)) / one.shape[1:].numel() for one in squares], dim=1)


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
    widths = [one.shape[1] for one in teachers]
    # The teachers' channels side by side, whatever the sizes of their maps.
    ours, theirs = (
        torch.cat([widen(one).mean((2, 3)) for one in maps], dim=1)
        for maps in (projected, teachers)
    )
    products = torch.stack([ours * theirs, ours.square(), theirs.square()])
    inner, *squares = torch.stack([part.sum(-1) for part in products.split(widths, -1)], dim=-1)
    # Lengths of at least 1e-8, so that a map without any value is like nothing.
    first, second = (square.clamp(min=1e-16).rsqrt() for square in squares)
    return inner * first * second


def prediction_cosine(
    first: Float[Tensor, "*#B C"], second: Float[Tensor, "*#B C"]
) -> Float[Tensor, "..."]:
    """Cosine of predictions, which are distributions and so never zero."""
    return (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))


def _pearson_distance(
    first: Tensor, second: Tensor, dim: int, counted: Tensor | None = None
) -> Tensor:
    """1 − Pearson correlation along a dimension of values that count, all by default; others are 0.

    1 where a side does not vary. The smallest number stands beside the product of the lengths, as
    in the authors' code of DIST: predictions that hardly vary then count less than in a cosine that
    only guards its division.
    """
    if counted is None:
        first, second = (values - values.mean(dim, keepdim=True) for values in (first, second))
    else:
        share = counted / counted.sum(dim, keepdim=True)
        first, second = (
            (values - (values * share).sum(dim, keepdim=True)) * counted
            for values in (first, second)
        )
    # Lengths of at least 1e-12, which have derivatives.
    squares = [values.square().sum(dim).clamp(min=1e-24) for values in (first, second)]
    return 1 - (first * second).sum(dim) / (squares[0].sqrt() * squares[1].sqrt() + 1e-8)


def dist_divergence(
    student: Float[Tensor, "B C"],
    teachers: Float[Tensor, "M B C"],
    temperature: float,
    known: Known = None,
) -> Float[Tensor, "B M"]:
    """DIST: how badly the student's softened predictions correlate with each teacher's, per sample.

    Huang et al., "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022), per teacher and
    with both of its coefficients at 1:
        dist[b, m] = T² ( 1 − ρ(q(·|x_b), p_m(·|x_b)) + mean_c [1 − ρ(q(c|·), p_m(c|·))] )
    with the Pearson correlation ρ over the classes of a sample, and over the samples of a class.
    The second part belongs to the batch, of all processes together; weighting it per sample
    amounts to weighting it by the batch mean of the weights.

    Args:
        student: Student logits; the only argument that receives a gradient.
        teachers: Logits of the M teachers.
        temperature: Softening T > 0; T² keeps the gradient scale of T = 1.
        known: Which classes each teacher knows; both parts are of these alone.
    """
    q = (of_known(widen(student), known) / temperature).softmax(-1).transpose(0, 1)
    p = functional.softmax(widen(teachers) / temperature, dim=-1).transpose(0, 1)
    counted = None if known is None else known.unsqueeze(0)
    between_classes = _pearson_distance(q, p, dim=2, counted=counted)
    between_samples = _pearson_distance(distributed.gather(q), distributed.gather(p), dim=0)
    if known is None:
        mean = between_samples.mean(1)
    else:
        mean = (between_samples * known).sum(1) / known.sum(1)
    return temperature**2 * (between_classes + mean)


def norm_direction(
    embedded: tuple[Tensor, ...],
    teachers: tuple[Tensor, ...],
    directions: tuple[Tensor, ...],
    targets: Int64[Tensor, " B"],
) -> Float[Tensor, "B M"]:
    """ND: how far the student's feature falls short of its class's direction, per sample.

    Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction"
    (2023), per teacher and without the batch mean:
        nd[b, m] = 1 − s_b · e_{y_b} / max(|s_b|, |f_b^m|)
    where e_c is the unit vector along the mean feature of class c: 0 for a feature that points
    along it and is at least as long as the teacher's.

    Args:
        embedded: The student's feature s in each teacher's space, (B, D_m); receives the gradient.
        teachers: The teachers' features f^m, (B, D_m).
        directions: Mean feature of every class, (C, D_m); of any length.
        targets: True classes.
    """
    columns = []
    for ours, theirs, means in zip(embedded, teachers, directions, strict=True):
        ours, theirs = widen(ours), widen(theirs)
        along = (ours * functional.normalize(widen(means)[targets], dim=1)).sum(1)
        # Never zero, so that a sample on which both features vanish has a gradient.
        length = torch.maximum(ours.norm(dim=1), theirs.norm(dim=1)).clamp(min=1e-8)
        columns.append(1 - along / length)
    return torch.stack(columns, dim=1)
