"""Which losses the logit and the feature terms of Equ. 2 are made of, by name.

Every loss gives one value per sample and teacher, so that all share the teachers' weights. To add
one: a function in `losses`, and a line in a table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mtkd_env import losses
from mtkd_env.errors import check_not_negative, check_positive, check_shape
from mtkd_env.imports import Kind, Named, takes
from mtkd_env.options import Options, fitted
from mtkd_env.types import Known, TeacherOutputs

Terms = Named | Mapping[Named, float]

NONE = "none"


@dataclass(frozen=True, slots=True)
class TermInputs:
    """What a loss term compares: the student's side, with its graph, and the teachers'.

    Attributes:
        logits: The student's logits.
        projected: r_m(F), one (B, K_m, H_m, W_m) tensor per teacher.
        embedded: The student's feature in the feature space of every teacher, one (B, D_m) tensor
            each; empty unless a term asks for it.
        teachers: The teachers' outputs.
        targets: True classes (B,).
        temperature: T of softened predictions.
        directions: Class means of every teacher's features, one (C, D_m) tensor each; empty
            unless a term asks for them.
    """

    logits: Float[Tensor, "B C"]
    projected: tuple[Tensor, ...]
    embedded: tuple[Tensor, ...]
    teachers: TeacherOutputs
    targets: Tensor
    temperature: float
    directions: tuple[Tensor, ...]

    @property
    def predictions(self) -> tuple[Tensor, Tensor, float, Known]:
        """What losses of the logits take."""
        return self.logits, self.teachers.logits, self.temperature, self.teachers.known


Term = Callable[[TermInputs], Tensor]

LOGIT_TERMS: Mapping[str, Term] = {
    "kd": lambda c: losses.kd_divergence(*c.predictions),
    "dist": lambda c: losses.dist_divergence(*c.predictions),
    "kd_of_mean": lambda c: losses.kd_of_mean(*c.predictions),
}

FEATURE_TERMS: Mapping[str, Term] = {
    "mse": lambda c: losses.feature_mse(c.projected, c.teachers.whole_maps),
    "nd": lambda c: losses.norm_direction(c.embedded, c.teachers.features, c.directions, c.targets),
}

# Terms that compare the student's feature with class means of the teachers' features.
NEED_DIRECTIONS = frozenset({"nd"})


EXPECTED = "a function of TermInputs that gives (B, M)"
LOGIT_TERM: Kind[Term] = Kind(LOGIT_TERMS, "logit", takes(1), EXPECTED)
FEATURE_TERM: Kind[Term] = Kind(FEATURE_TERMS, "feature", takes(1), EXPECTED)


def parse_terms(terms: Terms, kind: Kind[Term]) -> dict[Named, float]:
    """The losses of one head with their coefficients.

    Args:
        terms: What `kind` finds, or `none`, or several of these with coefficients.
        kind: The losses that there are; messages call the argument by its name.

    Raises:
        ConfigError: An unknown name, or a coefficient that is negative or not finite.
    """
    if not isinstance(terms, Mapping):
        if terms == NONE:
            return {}
        terms = {terms: 1.0}
    coefficients: dict[Named, float] = fitted(terms, dict[Any, float], kind.what)
    for given, coefficient in coefficients.items():
        kind.find(given)
        check_not_negative(**{f"{kind.what}.{given}": coefficient})
    return coefficients


@dataclass(frozen=True)
class Distillation(Options):
    """What the teachers add to the student's loss (Equ. 2).

    Attributes:
        alpha: α, weight of the logit terms.
        beta: β, weight of the feature terms; at 0 there are none, whatever `feature` says.
        temperature: T, softening of the logit terms; the paper never states it, its code has 4.
        logit: Losses of the logit terms: kd, dist, kd_of_mean, none, or names with coefficients.
            One's own is a function of `TermInputs` that gives (B, M), as `module:name` or as an
            object.
        feature: Losses of the feature terms: mse, nd, none, one's own, or names with coefficients.

    Raises:
        ConfigError: A weight that is negative, a temperature that is not positive, one of them
            infinite or NaN, or an unknown loss.
    """

    alpha: float = 1.0
    beta: float = 5.0
    temperature: float = 4.0
    logit: Terms = "kd"
    feature: Terms = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(alpha=self.alpha, beta=self.beta)
        check_positive(temperature=self.temperature)
        for name, kind in (("logit", LOGIT_TERM), ("feature", FEATURE_TERM)):
            terms = parse_terms(getattr(self, name), kind)
            if isinstance(getattr(self, name), Mapping):
                object.__setattr__(self, name, terms)

    @property
    def logit_terms(self) -> dict[Named, float]:
        """The losses of the logit terms with their coefficients."""
        return parse_terms(self.logit, LOGIT_TERM)

    @property
    def feature_terms(self) -> dict[Named, float]:
        """The losses of the feature terms with their coefficients; none where β is 0."""
        return parse_terms(self.feature, FEATURE_TERM) if self.beta else {}

    @property
    def needs_directions(self) -> bool:
        """Whether feature terms need the class means of the teachers' features."""
        return not NEED_DIRECTIONS.isdisjoint(self.feature_terms)

    @property
    def needs_maps(self) -> bool:
        """Whether feature terms may look at the student's projected maps."""
        return not NEED_DIRECTIONS.issuperset(self.feature_terms)


def combine(
    coefficients: Mapping[Named, float],
    kind: Kind[Term],
    inputs: TermInputs,
    known: Mapping[str, Tensor],
) -> Float[Tensor, "B M"]:
    """The losses of one head, summed with their coefficients; zeros where there are none.

    Args:
        coefficients: What `parse_terms` gave.
        kind: The losses that there are.
        inputs: What is compared.
        known: Losses that have been computed already.

    Raises:
        ConfigError: A loss of another shape.
    """
    shape = len(inputs.targets), len(inputs.teachers.logits)
    total: Tensor | None = None
    for given, coefficient in coefficients.items():
        loss = known[given] if given in known else kind.find(given)(inputs)
        check_shape(f"distillation.{kind.what}", loss, shape)
        scaled = loss if coefficient == 1 else coefficient * loss
        total = scaled if total is None else total + scaled
    if total is None:
        return torch.zeros(shape, device=inputs.logits.device)
    return total
