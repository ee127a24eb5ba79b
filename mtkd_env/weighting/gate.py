"""GATE: a small network that learns from labelled images which teacher to ask."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Adam

from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError, check_not_negative
from mtkd_env.losses import mixture_log_likelihood, predictive_entropy, teacher_cross_entropy
from mtkd_env.seeding import derive_seed, seeded
from mtkd_env.types import DistillState, Known, TeacherWeights
from mtkd_env.weighting.base import Weighting

# Numbers of Adam steps that cross-validation chooses from.
STEPS = (10, 20, 30, 50, 75, 100, 150, 200, 300)
# It ends where so many further ones in turn were no better.
PATIENCE = 3


def gate_inputs(logits: Float[Tensor, "M B C"], known: Known = None) -> Float[Tensor, "B I"]:
    """What a gate sees: every teacher's probabilities, their entropies, the mean probabilities."""
    probabilities = logits.float().softmax(-1)
    flat = probabilities.transpose(0, 1).flatten(1)
    return torch.cat([flat, predictive_entropy(logits, known), probabilities.mean(0)], dim=1)


# Weights (*K, in, out) and biases (*K, 1, out) of a network, or of K of them.
Layers = list[tuple[Tensor, Tensor]]


def scores(layers: Layers, inputs: Float[Tensor, "N I"]) -> Float[Tensor, "*K N M"]:
    """What a network answers, or K of them side by side: linear layers with ReLUs between."""
    *hidden, (weight, bias) = layers
    for own, shift in hidden:
        inputs = (inputs @ own + shift).relu()
    return inputs @ weight + bias


class GateFit(NamedTuple):
    """A network after so many steps of Adam, and how likely it made images that were left out.

    Attributes:
        steps: Steps of Adam.
        left_out: Sum of log-likelihoods over the folds, each under the network without it [nats].
        layers: Weight and bias of every layer of the network that is fitted by all images.
    """

    steps: int
    left_out: float
    layers: Layers


class Gate(Weighting):
    """Weights by a supervised network on the teachers' outputs alone, the same in both heads.

    A mixture of experts whose experts are frozen (Jacobs et al., "Adaptive Mixtures of Local
    Experts", 1991): the network is fitted before training on the labelled images by the mixture's
    likelihood, mean of log Σ_m w^m p^m(y). How long is chosen by cross-validation. No reinforcement
    learning; the rival of agents that spend the same labels.

    Args:
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
        self._logits, self._targets = known.teachers.logits, known.targets

    @cached_property
    def fit(self) -> GateFit:
        """The network, fitted when it is first asked: as long as images left out grow likelier."""
        best, worse = None, 0
        for fit in self._fits():
            if best is None or fit.left_out > best.left_out:
                best, worse = fit, 0
            elif (worse := worse + 1) == PATIENCE:
                break
        assert best is not None
        return best

    def _fits(self) -> Iterator[GateFit]:
        """The network after every number of `STEPS`.

        It is fitted side by side with those of the folds, which begin alike and each leave some
        images out.
        """
        inputs = gate_inputs(self._logits, self._known)
        cross_entropy = teacher_cross_entropy(self._logits, self._targets, self._known)
        seen = self._seen().to(inputs.device)
        shares = seen / seen.sum(1, keepdim=True)
        layers = self._start(len(seen), inputs.shape[1])
        parameters = [part for layer in layers for part in layer]
        optimizer = Adam(parameters, lr=self._lr, weight_decay=self._weight_decay, fused=True)

        def likelihoods() -> Float[Tensor, "K N"]:
            return mixture_log_likelihood(scores(layers, inputs).softmax(-1), cross_entropy)

        for step in range(1, STEPS[-1] + 1):
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                (-(likelihoods() * shares).sum()).backward()
            optimizer.step()
            if step in STEPS:
                with torch.no_grad():
                    left_out = float((likelihoods() * (1 - seen)).sum())
                whole = [
                    (own[-1].detach().clone(), shift[-1].detach().clone()) for own, shift in layers
                ]
                yield GateFit(step, left_out, whole)

    def _seen(self) -> Float[Tensor, "K N"]:
        """Which images each network is fitted by: without one fold each, and the last by all."""
        random = torch.Generator().manual_seed(derive_seed(self.seed, "folds"))
        order = torch.randperm(len(self._targets), generator=random)
        seen = torch.ones(self._folds + 1, len(order))
        for fold, left_out in enumerate(order.tensor_split(self._folds)):
            seen[fold, left_out] = 0
        return seen

    def _start(self, count: int, width: int) -> Layers:
        """So many networks that have not learned yet and are all alike."""
        widths = [width, *self._hidden, len(self._logits)]
        with seeded(derive_seed(self.seed, "weighting")):
            linear = [nn.Linear(*ends) for ends in pairwise(widths)]

        def repeated(part: Tensor) -> Tensor:
            return part.detach().to(self._logits.device).repeat(count, 1, 1).requires_grad_()

        return [(repeated(layer.weight.T), repeated(layer.bias)) for layer in linear]

    @torch.no_grad()
    def __call__(self, state: DistillState) -> TeacherWeights:
        """Weights by the network, the same in both heads."""
        inputs = gate_inputs(state.teachers.logits, self._known)
        weights = scores(self.fit.layers, inputs).softmax(1)
        return TeacherWeights(logit=weights, feature=weights)

    def state_dict(self) -> dict[str, Any]:
        """The network; it does not change any more."""
        return self.fit._asdict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the network that `state_dict` gave."""
        self.fit = GateFit(**state)
