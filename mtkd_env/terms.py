"""Which losses the logit and the feature terms of Equ. 2 are made of, by name.

Every loss gives one value per sample and teacher, so that all share the teachers' weights. To add
one: a function in `losses`, and a line in a table.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mtkd_env import losses
from mtkd_env.errors import ConfigError, check_name, check_not_negative
from mtkd_env.options import Options
from mtkd_env.types import Known, TeacherOutputs

Terms = str | Mapping[str, float]

NONE = "none"


@dataclass(frozen=True, slots=True)
class Comparison:
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


Term = Callable[[Comparison], Tensor]

LOGIT_TERMS: Mapping[str, Term] = {
    "kd": lambda c: losses.kd_divergence(*c.predictions),
    "dist": lambda c: losses.dist_divergence(*c.predictions),
    "kd_of_mean": lambda c: losses.kd_of_mean(*c.predictions),
}

FEATURE_TERMS: Mapping[str, Term] = {
    "mse": lambda c: losses.feature_mse(c.projected, c.teachers.feature_maps),
    "nd": lambda c: losses.norm_direction(c.embedded, c.teachers.features, c.directions, c.targets),
}

# Terms that compare the student's feature with class means of the teachers' features.
NEED_DIRECTIONS = frozenset({"nd"})


def parse_terms(terms: Terms, known: Collection[str], path: str) -> dict[str, float]:
    """The losses of one head with their coefficients.

    Args:
        terms: A name, `none`, or names with coefficients.
        known: The names that there are.
        path: How messages call the argument.

    Raises:
        ConfigError: An unknown name, or a coefficient that is negative or not finite.
    """
    if isinstance(terms, str):
        check_name({*known, NONE}, terms, path)
        return {} if terms == NONE else {terms: 1.0}
    for name, coefficient in terms.items():
        check_name(known, name, path)
        check_not_negative(**{f"{path}.{name}": coefficient})
    return dict(terms)


@dataclass(frozen=True)
class Distillation(Options):
    """What the teachers add to the student's loss (Equ. 2).

    Attributes:
        alpha: α, weight of the logit terms.
        beta: β, weight of the feature terms.
        temperature: T, softening of the logit terms; the paper never states it, its code has 4.
        logit: Losses of the logit terms: kd, dist, none, or names with coefficients.
        feature: Losses of the feature terms: mse, nd, none, or names with coefficients.

    Raises:
        ConfigError: A weight that is negative, a temperature that is not positive, one of them
            infinite or NaN, or an unknown loss.
    """

    alpha: float = 1.0
    beta: float = 5.0
    temperature: float = 4.0
    logit: str | dict[str, float] = "kd"
    feature: str | dict[str, float] = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(alpha=self.alpha, beta=self.beta)
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature: expected a finite number > 0, got {self.temperature}")
        parse_terms(self.logit, LOGIT_TERMS, "logit")
        parse_terms(self.feature, FEATURE_TERMS, "feature")

    @property
    def logit_terms(self) -> dict[str, float]:
        """The losses of the logit terms with their coefficients."""
        return parse_terms(self.logit, LOGIT_TERMS, "logit")

    @property
    def feature_terms(self) -> dict[str, float]:
        """The losses of the feature terms with their coefficients."""
        return parse_terms(self.feature, FEATURE_TERMS, "feature")

    @property
    def needs_directions(self) -> bool:
        """Whether feature terms need the class means of the teachers' features."""
        return not NEED_DIRECTIONS.isdisjoint(self.feature_terms)


def combine(
    coefficients: Mapping[str, float],
    table: Mapping[str, Term],
    comparison: Comparison,
    known: Mapping[str, Tensor],
) -> Float[Tensor, "B M"]:
    """The losses of one head, summed with their coefficients; zeros where there are none.

    Args:
        coefficients: What `parse_terms` gave.
        table: The losses of the head.
        comparison: What is compared.
        known: Losses that have been computed already.
    """
    total: Tensor | None = None
    for name, coefficient in coefficients.items():
        loss = known[name] if name in known else table[name](comparison)
        scaled = loss if coefficient == 1 else coefficient * loss
        total = scaled if total is None else total + scaled
    if total is None:
        shape = len(comparison.targets), len(comparison.teachers.logits)
        return torch.zeros(shape, device=comparison.logits.device)
    return total
