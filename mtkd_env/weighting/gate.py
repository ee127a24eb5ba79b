"""GATE: a small network that learns from labelled images which teacher to ask."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.optim import Adam

from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError, check_not_negative
from mtkd_env.losses import mixture_log_likelihood, predictive_entropy
from mtkd_env.seeding import derive_seed, seeded
from mtkd_env.types import DistillState, Known, TeacherWeights
from mtkd_env.weighting.base import Weighting

# Numbers of Adam steps that cross-validation chooses from.
STEPS = (10, 20, 30, 50, 75, 100, 150, 200, 300)


def gate_inputs(logits: Float[Tensor, "M B C"], known: Known = None) -> Float[Tensor, "B I"]:
    """What a gate sees: every teacher's probabilities, their entropies, the mean probabilities."""
    probabilities = logits.float().softmax(-1)
    flat = probabilities.transpose(0, 1).flatten(1)
    return torch.cat([flat, predictive_entropy(logits, known), probabilities.mean(0)], dim=1)


def gate_likelihood(
    network: nn.Module,
    logits: Float[Tensor, "M B C"],
    targets: Int64[Tensor, " B"],
    known: Known = None,
) -> Float[Tensor, ""]:
    """Mean log-likelihood of labelled images under the gate's mixture of the teachers [nats]."""
    weights = network(gate_inputs(logits, known)).softmax(1)
    return mixture_log_likelihood(weights, logits, targets, known).mean()


class Gate(Weighting):
    """Weights by a supervised network on the teachers' outputs alone, the same in both heads.

    A mixture of experts whose experts are frozen (Jacobs et al., "Adaptive Mixtures of Local
    Experts", 1991): the network is fitted before training on the labelled images by the mixture's
    likelihood, mean of log Σ_m w^m p^m(y). How long is chosen by cross-validation. No reinforcement
    learning; the rival of agents that spend the same labels.

    Args:
        distiller: See `Weighting`; its labelled images are learned from.
        seed: Seed of the network's start and of the folds.
        hidden: Widths of the hidden layers.
        lr: Learning rate of Adam.
        weight_decay: L2 coefficient of Adam.
        folds: Parts of the labelled images in the cross-validation.

    Raises:
        ConfigError: A negative number, a width below 1, or fewer labelled images than folds.
    """

    def __init__(
        self,
        distiller: Distiller,
        *,
        seed: int = 0,
        hidden: Sequence[int] = (64, 64),
        lr: float = 2e-3,
        weight_decay: float = 1e-3,
        folds: int = 5,
    ) -> None:
        super().__init__(distiller, seed=seed)
        check_not_negative(lr=lr, weight_decay=weight_decay)
        if any(width < 1 for width in hidden):
            raise ConfigError(f"hidden: expected widths >= 1, got {list(hidden)}")
        if folds < 2:
            raise ConfigError(f"folds: expected at least 2, got {folds}")
        self._hidden, self._lr, self._weight_decay = tuple(hidden), lr, weight_decay
        known = distiller.reference.labelled
        assert known.teachers is not None
        if len(known.targets) < folds:
            raise ConfigError(
                f"data.labelled: expected at least {folds} labelled images, one for each of the "
                f"gate's folds, got {len(known.targets)}"
            )
        self._folds, self._known = folds, known.teachers.known

    @cached_property
    def steps(self) -> int:
        """Steps of Adam that the network is fitted by."""
        known = self.distiller.reference.labelled
        assert known.teachers is not None
        return self._choose_steps(known.teachers.logits, known.targets, self._folds)

    @cached_property
    def network(self) -> nn.Module:
        """The network, fitted when it is first asked."""
        known = self.distiller.reference.labelled
        assert known.teachers is not None
        *_, (_, network) = self._fit(known.teachers.logits, known.targets, self.steps)
        return network

    def _choose_steps(
        self, logits: Float[Tensor, "M N C"], targets: Int64[Tensor, " N"], folds: int
    ) -> int:
        """The number of steps after which images that were left out are most likely."""
        random = torch.Generator().manual_seed(derive_seed(self.seed, "folds"))
        order = torch.randperm(len(targets), generator=random).to(targets.device)
        totals = dict.fromkeys(STEPS, 0.0)
        for left_out in order.tensor_split(folds):
            kept = order[~torch.isin(order, left_out)]
            for steps, network in self._fit(logits[:, kept], targets[kept], STEPS[-1]):
                found = gate_likelihood(
                    network, logits[:, left_out], targets[left_out], self._known
                )
                totals[steps] += float(found.detach()) * len(left_out)
        return max(totals, key=lambda steps: totals[steps])

    def _fit(
        self, logits: Float[Tensor, "M N C"], targets: Int64[Tensor, " N"], most: int
    ) -> Iterator[tuple[int, nn.Module]]:
        """The network after every number of `STEPS` up to the largest, with that number."""
        widths = [gate_inputs(logits[:, :1]).shape[1], *self._hidden]
        with seeded(derive_seed(self.seed, "weighting")):
            layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
            network = nn.Sequential(*layers, nn.Linear(widths[-1], len(logits)))
        network.to(logits.device)
        optimizer = Adam(network.parameters(), lr=self._lr, weight_decay=self._weight_decay)
        for step in range(1, most + 1):
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                (-gate_likelihood(network, logits, targets, self._known)).backward()
            optimizer.step()
            if step in STEPS:
                yield step, network

    @torch.no_grad()
    def __call__(self, state: DistillState) -> TeacherWeights:
        """Weights by the network, the same in both heads."""
        weights = self.network(gate_inputs(state.teachers.logits, self._known)).softmax(1)
        return TeacherWeights(logit=weights, feature=weights)

    def state_dict(self) -> dict[str, Any]:
        """The network; it does not change any more."""
        return {"steps": self.steps, "network": self.network.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the network that `state_dict` gave."""
        self.steps = int(state["steps"])
        self.network.load_state_dict(state["network"])
