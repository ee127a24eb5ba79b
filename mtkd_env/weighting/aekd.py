"""AEKD: the convex combination of the teachers' gradients that all of them agree with most."""

from functools import cache
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from mtkd_env import distributed, losses
from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError
from mtkd_env.types import DistillState, Known, TeacherWeights
from mtkd_env.weighting.base import Weighting

# Every partition of the teachers is tried, which grows as 2^M and more.
MOST_TEACHERS = 8
# Relative to the mean of the diagonal: makes the solution unique, and equal for equal gradients.
RIDGE = 1e-9
# Distance from the box within which a solution of the equations counts as inside.
TOLERANCE = 1e-9

ZERO, CAP, FREE = 0, 1, 2


@cache
def _partitions(size: int, cap: float) -> Tensor:
    """Every way to have each coordinate at zero, at the cap, or free: (P, size)."""
    most = int(1 / cap + 1e-9)
    rows = [row for row in product((ZERO, CAP, FREE), repeat=size) if row.count(CAP) <= most]
    return torch.tensor(rows)


def _stationary(gram: Tensor, partitions: Tensor, cap: float) -> Tensor:
    """Stationary points of aᵀ G a / 2 with sum 1, one for every partition: (N, P, M).

    Solves G a = λ in the free coordinates, a = 0 or a = cap in the others, Σ a = 1. Without free
    coordinates λ is set to zero instead of the last equation.
    """
    size = gram.shape[-1]
    free = (partitions == FREE).to(gram)
    some = free.any(1).to(gram)
    system = gram.new_zeros(len(gram), len(partitions), size + 1, size + 1)
    system[..., :size, :size] = gram.unsqueeze(1) * free.unsqueeze(-1)
    system[..., :size, :size] += torch.diag_embed(1 - free)
    system[..., :size, size] = -free
    system[..., size, :size] = some.unsqueeze(-1)
    system[..., size, size] = 1 - some
    right = gram.new_zeros(len(partitions), size + 1, 1)
    right[:, :size, 0] = cap * (partitions == CAP).to(gram)
    right[:, size, 0] = some
    # Unlike `solve`, it does not wait for the device to tell whether a system is singular; the
    # ridge keeps them from it.
    solution, _ = torch.linalg.solve_ex(system, right.expand(len(gram), -1, -1, -1))
    return solution[..., :size, 0]


def min_norm_weights(gram: Float[Tensor, "N M M"], cap: float) -> Float[Tensor, "N M"]:
    """Solves N small quadratic programs: min aᵀ G a with Σ a = 1 and 0 ≤ a ≤ cap.

    Exactly, up to rounding in float64 and a relative ridge of 1e-9 that makes the solution unique:
    of all partitions of the coordinates into those at zero, at the cap, and free, the optimal one
    is tried as well, and the best feasible stationary point is the optimum.

    Args:
        gram: Inner products of the M vectors of every problem.
        cap: Largest coordinate, at least 1/M.
    """
    size = gram.shape[-1]
    gram = gram.double()
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-300)
    gram = gram / scale + RIDGE * torch.eye(size, device=gram.device, dtype=gram.dtype)
    partitions = _partitions(size, cap).to(gram.device, non_blocking=True)
    points = _stationary(gram, partitions, cap)
    inside = ((points >= -TOLERANCE) & (points <= cap + TOLERANCE)).all(-1)
    feasible = inside & ((points.sum(-1) - 1).abs() <= TOLERANCE)
    values = torch.einsum("npi,nij,npj->np", points, gram, points)
    best = torch.where(feasible, values, torch.inf).argmin(1)
    solution = points[torch.arange(len(points), device=points.device), best].clamp(min=0)
    return solution / solution.sum(-1, keepdim=True)


def logit_gradients(
    student: Float[Tensor, "B C"],
    teachers: Float[Tensor, "M B C"],
    temperature: float,
    known: Known = None,
) -> Float[Tensor, "M C"]:
    """Batch mean of the gradient of every teacher's KL with respect to the student's logits.

    In closed form, without backward: T (p_T(z^S) − p_T(z^m)).
    """
    pull = losses.kd_pull(student.float(), teachers.float(), temperature, known)
    return temperature * distributed.mean(pull.mean(1))


@torch.enable_grad()
def feature_gradients(state: DistillState) -> Float[Tensor, "M N"]:
    """Gradient of every teacher's FitNet term with respect to the maps F of the whole batch.

    One backward through each regressor; the state's graph stays usable. Not the batch mean, as for
    the logits: the regressor's batch norm makes a gradient sum to zero over batch and pixels, and
    what a mean over the batch leaves of it is mostly noise.
    """
    rows = []
    for ours, theirs in zip(state.projected, state.teachers.whole_maps, strict=True):
        distance = losses.feature_mse((ours,), (theirs,)).sum()
        (gradient,) = torch.autograd.grad(distance, state.student.feature_map, retain_graph=True)
        rows.append(gradient.float().flatten())
    return torch.stack(rows)


class AEKD(Weighting):
    """Weights a, the same for all samples of a batch: min |Σ_m a_m g_m|² with 0 ≤ a_m ≤ cap.

    Du et al., "Agree to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient Space"
    (NeurIPS 2020). g_m is the gradient of teacher m's term: with respect to the student's logits,
    averaged over the batch, and with respect to its last maps.

    The official code casts the problem as a one-class SVM; here it is solved exactly. There the
    feature gradients are scaled to unit length and the solution is scaled back (a_m / |g_m|,
    renormalised), the logit gradients are not; so here.

    Deviations: the published hints are at the second stage through strided convolutions, with β =
    100 and α = 0.9; here they are the same as every method's. Without a feature term
    (`features=False`, or a state without a graph) the feature weights are 1/M.

    Args:
        cap: Largest weight of a teacher, before feature weights are scaled back; 1/M and less
            give AVER. Published: 0.6.
        features: Whether the feature weights are solved for.

    Raises:
        ConfigError: More than 8 teachers, or a cap that is not in (0, 1].
    """

    needs_maps = True

    def __init__(
        self, distiller: Distiller, *, seed: int = 0, cap: float = 0.6, features: bool = True
    ) -> None:
        super().__init__(distiller, seed=seed)
        teachers = len(distiller.teachers)
        if teachers > MOST_TEACHERS:
            raise ConfigError(f"aekd: solves for up to {MOST_TEACHERS} teachers, got {teachers}")
        if not 0 < cap <= 1:
            raise ConfigError(f"cap: expected a number in (0, 1], got {cap}")
        # Below 1/M, such as 0.6 for a single teacher, no weights would sum to 1.
        self._cap = max(cap, 1 / teachers)
        self._features = features

    def __call__(self, state: DistillState) -> TeacherWeights:
        """One row of weights, repeated for every sample."""
        with torch.no_grad():
            teachers, temperature = state.teachers, self.distiller.distillation.temperature
            gradients = logit_gradients(
                state.student.logits, teachers.logits, temperature, teachers.known
            )
        logit = self._solve(_gram(gradients))
        feature = torch.full_like(logit, 1 / len(logit))
        if self._features and state.student.feature_map.requires_grad:
            gram = distributed.total(_gram(feature_gradients(state)))
            lengths = gram.diagonal().sqrt().clamp(min=1e-30)
            feature = self._solve(gram / torch.outer(lengths, lengths)) / lengths.float()
            feature = feature / feature.sum()
        size = len(state.divergence)
        return TeacherWeights(logit.expand(size, -1), feature.expand(size, -1))

    def _solve(self, gram: Float[Tensor, "M M"]) -> Float[Tensor, " M"]:
        return min_norm_weights(gram.unsqueeze(0), self._cap)[0].float()


def _gram(gradients: Float[Tensor, "M N"]) -> Float[Tensor, "M M"]:
    """Inner products of the teachers' gradients."""
    gradients = gradients.double()
    return gradients @ gradients.T
