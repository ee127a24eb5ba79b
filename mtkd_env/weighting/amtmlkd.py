"""AMTML-KD: each sample's teachers are weighted by latent factors that are learned."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam

from mtkd_env.distiller import Distiller
from mtkd_env.errors import check_choice, check_not_negative, check_positive
from mtkd_env.optimization import descend
from mtkd_env.seeding import derive_seed, seeded
from mtkd_env.types import DistillState, TeacherWeights
from mtkd_env.weighting.base import Weighting

# Of the student's last map, over all positions.
POOLINGS: Mapping[str, Callable[..., Tensor]] = {"max": torch.amax, "mean": torch.mean}


class LatentFactors(nn.Module):
    """softmax_m( v · (θ_m ∘ x) ) for the globally pooled map x of a sample.

    Args:
        teachers: M.
        channels: K, the channels of the student's last map.
        pooling: In `POOLINGS`.
        start: Standard deviation that θ and v are drawn with.
    """

    def __init__(
        self, teachers: int, channels: int, pooling: str = "max", start: float = 0.1
    ) -> None:
        super().__init__()
        self.theta = nn.Parameter(start * torch.randn(teachers, channels))
        self.v = nn.Parameter(start * torch.randn(channels))
        self._pool = POOLINGS[pooling]

    def forward(self, feature_map: Float[Tensor, "B K H W"]) -> Float[Tensor, "B M"]:
        """Weights of the teachers."""
        pooled = self._pool(feature_map.float(), (2, 3))
        return ((pooled * self.v) @ self.theta.T).softmax(1)

    def penalty(self) -> Tensor:
        """|v|² + Σ_m |θ_m|²."""
        return self.theta.square().sum() + self.v.square().sum()


def mixture_divergence(
    weights: Float[Tensor, "B M"],
    student: Float[Tensor, "B C"],
    teachers: Float[Tensor, "M B C"],
    temperature: float,
) -> Float[Tensor, " B"]:
    """T² KL( Σ_m w^m p_T(z^m) || p_T(z^S) ): divergence from the integrated soft target [nats].

    Its gradient with respect to the student is that of Σ_m w^m KL^m, which `Distiller.update`
    minimises; with respect to the weights it is not.
    """
    p = functional.softmax(teachers.float() / temperature, dim=-1)
    mixture = torch.einsum("bm,mbc->bc", weights, p)
    log_q = functional.log_softmax(student.float() / temperature, dim=-1)
    # Not `special.entr`, whose gradient at a probability of zero is infinite.
    log_mixture = mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()
    return temperature**2 * (mixture * (log_mixture - log_q)).sum(1)


class AMTMLKD(Weighting):
    """Learned weights in the logit head; 1/M, the paper's multi-group hints, in the feature head.

    Liu, Zhang and Wang, "Adaptive Multi-Teacher Multi-level Knowledge Distillation"
    (Neurocomputing 2020). After every batch the latent factors θ, v take a step on
    mean_i T² KL(Σ_m w^m p_m || p_S) + penalty (|v|² + Σ_m |θ_m|²), the student's side fixed.

    Deviations: one stage, in which the factors learn beside the student and by an optimiser of
    their own (the official code trains an adapter first and freezes it); hints compare the last
    map, as for every method, instead of one stage per teacher; no angle term, because a weighting
    adds no loss to the student's; the start, see docs/weightings.md.

    Args:
        lr: Learning rate of Adam.
        penalty: Coefficient of the squared length of the factors. Published: 0.1, under which they
            vanish here and the weights become 1/M.
        pooling: `max`, as in the paper, or `mean`, as in the authors' code.
        start: Standard deviation that the factors are drawn with. It is small, so that learning
            starts from nearly equal weights, but not 0, where nothing would reach θ; the authors'
            code has 1.

    Raises:
        ConfigError: A negative number, a start that is not positive, or an unknown pooling.
    """

    def __init__(
        self,
        distiller: Distiller,
        *,
        seed: int = 0,
        lr: float = 1e-3,
        penalty: float = 1e-3,
        pooling: str = "max",
        start: float = 0.1,
    ) -> None:
        super().__init__(distiller, seed=seed)
        check_not_negative(lr=lr, penalty=penalty)
        check_positive(start=start)
        check_choice(POOLINGS, pooling=pooling)
        sizes = len(distiller.teachers), distiller.student.map_channels
        with seeded(derive_seed(seed, "weighting")):
            factors = LatentFactors(*sizes, pooling, start)
        self.factors = factors.to(distiller.device)
        self.optimizer = Adam(self.factors.parameters(), lr=lr)
        self._penalty = penalty

    @torch.no_grad()
    def __call__(self, state: DistillState) -> TeacherWeights:
        """Weights by the latent factors as they are."""
        weights = self.factors(state.student.feature_map)
        return TeacherWeights(logit=weights, feature=TeacherWeights.uniform(weights).feature)

    def objective(self, state: DistillState) -> Float[Tensor, ""]:
        """What the latent factors minimise on a batch; no gradient reaches the student."""
        weights = self.factors(state.student.feature_map.detach())
        divergence = mixture_divergence(
            weights,
            state.student.logits.detach(),
            state.teachers.logits,
            self.distiller.distillation.temperature,
        )
        return divergence.mean() + self._penalty * self.factors.penalty()

    @torch.enable_grad()
    def after_update(self, state: DistillState) -> None:
        """One step of the latent factors."""
        descend(self.optimizer, [self.objective(state)])

    def state_dict(self) -> dict[str, Any]:
        """Latent factors and their optimiser."""
        return {"factors": self.factors.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.factors.load_state_dict(state["factors"])
        self.optimizer.load_state_dict(state["optimizer"])
