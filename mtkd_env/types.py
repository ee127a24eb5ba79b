"""The values that travel between the rooms of the package: one batch, and what is known of it.

All tensors of one value lie on one device. Symbols: B batch, M teachers, C classes, D feature
width, K channels, H and W height and width of a feature map.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mtkd_env.errors import ConfigError

# Stands for the class of an image whose label is hidden or was never there.
UNKNOWN = -1

# Logit of a class that a teacher does not know: its probability is 0 at any temperature up to 100,
# and float16 holds it.
UNKNOWN_LOGIT = -30000.0

# Which of the C classes each of M teachers knows; None for all of them.
Known = Bool[Tensor, "M C"] | None


@dataclass(frozen=True, slots=True)
class Batch:
    """A mini-batch of normalised images.

    Attributes:
        inputs: Images, normalised per channel.
        targets: Class of each image, `UNKNOWN` without a label; of a mixed one, that of its largest
            part.
        index: Position of each image in its split, the same in every epoch.
        mixture: Share of every class in each image where images are mixed (mixup, cutmix).
        teachers: What the teachers know of the images, if they were asked already.
        keys: Where a store keeps that, if one does; see `mtkd_env.teachers.store`.
    """

    inputs: Float[Tensor, "B K H W"]
    targets: Int64[Tensor, " B"]
    index: Int64[Tensor, " B"]
    mixture: Float[Tensor, "B C"] | None = None
    teachers: "TeacherOutputs | None" = None
    keys: Int64[Tensor, " B"] | None = None

    @property
    def labels(self) -> Int64[Tensor, " B"] | Float[Tensor, "B C"]:
        """What a cross-entropy compares predictions with: the mixture if any, else the classes."""
        return self.targets if self.mixture is None else self.mixture

    @property
    def labelled(self) -> Bool[Tensor, " B"]:
        """Which images have a label."""
        return self.targets != UNKNOWN


@dataclass(frozen=True, slots=True)
class NetworkOutput:
    """What a network knows of a batch.

    Attributes:
        logits: Class scores z before the softmax.
        feature: Input f of the classifier.
        feature_map: Last feature map F, before pooling.
    """

    logits: Float[Tensor, "B C"]
    feature: Float[Tensor, "B D"]
    feature_map: Float[Tensor, "B K H W"]


@dataclass(frozen=True, slots=True)
class TeacherOutputs:
    """What the M teachers know of a batch; no tensor carries a gradient.

    Attributes:
        logits: Class scores of every teacher.
        features: One (B, D_m) tensor per teacher; widths may differ.
        feature_maps: One (B, K_m, H_m, W_m) tensor per teacher.
        averaged: Whether the maps are their means over the pixels, H and W are 1; see
            `whole_maps`.
        known: Which classes each teacher knows; all of them if it is None. The others have
            `UNKNOWN_LOGIT`.
    """

    logits: Float[Tensor, "M B C"]
    features: tuple[Tensor, ...]
    feature_maps: tuple[Tensor, ...]
    known: Known = None
    averaged: bool = False

    @property
    def whole_maps(self) -> tuple[Tensor, ...]:
        """The feature maps, for whoever looks at their pixels.

        Raises:
            ConfigError: A store has kept only their means.
        """
        if self.averaged:
            raise ConfigError(
                "teachers.store.maps: expected true, because whole feature maps are looked at; by "
                "default a store keeps their means alone where distillation.beta is 0"
            )
        return self.feature_maps

    def take(self, rows: slice | Tensor) -> "TeacherOutputs":
        """What they know of some of the images."""
        return replace(
            self,
            logits=self.logits[:, rows],
            features=tuple(feature[rows] for feature in self.features),
            feature_maps=tuple(one[rows] for one in self.feature_maps),
        )

    @property
    def scores(self) -> Float[Tensor, "M B C"]:
        """Logits to compute with as they are: of unknown classes, the sample's smallest known."""
        if self.known is None:
            return self.logits
        unknown = ~self.known.unsqueeze(1)
        least = self.logits.masked_fill(unknown, torch.inf).amin(-1, keepdim=True)
        return torch.where(unknown, least, self.logits)


@dataclass(frozen=True)
class BatchEvidence:
    """What rewards, observations and weightings may ask of a batch, and the loss need not know.

    Attributes:
        projected: The student's feature map in the space of each teacher's, r_m(F).
        teacher_cross_entropy: Each teacher's own CE_i^m [nats].
        distance: Mean squared distance of r_m(F) and F^m; no gradient.
        similarity: Cosine of r_m(f) and f^m; no gradient.
    """

    projected: tuple[Tensor, ...]
    teacher_cross_entropy: Float[Tensor, "B M"]
    distance: Float[Tensor, "B M"]
    similarity: Float[Tensor, "B M"]


@dataclass(frozen=True, slots=True)
class DistillState:
    """A batch, seen by the student and by its teachers, before the student learns from it.

    Holds all that the loss (Equ. 2), the observation (Equ. 3-5) and the weights (Equ. 9-14) need.

    The student's side (`student`, `projected`, `cross_entropy`, `kd`, `feature`) carries the graph
    that `Distiller.update` back-propagates through; whoever only reads it detaches.

    Attributes:
        batch: The images and their classes.
        student: The student's own output.
        teachers: The teachers' outputs.
        cross_entropy: The student's CE_i [nats].
        kd: Logit term of each teacher that the student is trained by; the KL of Equ. 2 unless
            other losses are chosen.
        feature: Feature term of each teacher that the student is trained by; the mean squared
            distance of Equ. 2 unless other losses are chosen, and 0 where β is.
        divergence: KL(teacher || student) at temperature T, times T²; no gradient.
        evidence: What else there is to know, made when it is first asked for.
        direction: What the rewards `heldout` and `cross` look along, G of `mtkd_env.worth`.
        credit: R of every teacher, where the reward has needed it already.
    """

    batch: Batch
    student: NetworkOutput
    teachers: TeacherOutputs
    cross_entropy: Float[Tensor, " B"]
    kd: Float[Tensor, "B M"]
    feature: Float[Tensor, "B M"]
    divergence: Float[Tensor, "B M"]
    evidence: BatchEvidence
    direction: Float[Tensor, "C D1"] | None = None
    credit: Float[Tensor, "B M"] | None = None

    @property
    def projected(self) -> tuple[Tensor, ...]:
        """The student's feature map in the space of each teacher's, r_m(F)."""
        return self.evidence.projected

    @property
    def teacher_cross_entropy(self) -> Float[Tensor, "B M"]:
        """Each teacher's own CE_i^m [nats]."""
        return self.evidence.teacher_cross_entropy

    @property
    def distance(self) -> Float[Tensor, "B M"]:
        """Mean squared distance of r_m(F) and F^m; no gradient."""
        return self.evidence.distance

    @property
    def similarity(self) -> Float[Tensor, "B M"]:
        """Cosine of r_m(f) and f^m; no gradient."""
        return self.evidence.similarity


@dataclass(frozen=True, slots=True)
class TeacherWeights:
    """How much each teacher counts for each sample; rows lie on the simplex.

    Attributes:
        logit: Weights of the logit terms.
        feature: Weights of the feature terms.
        parts: What the weights were fused from (`generator`, `confidence`, `divergence`), each a
            `TeacherWeights` without parts; empty for weights that were not fused.
    """

    logit: Float[Tensor, "B M"]
    feature: Float[Tensor, "B M"]
    parts: Mapping[str, "TeacherWeights"] = field(default_factory=dict)

    @classmethod
    def uniform(cls, like: Float[Tensor, "B M"]) -> "TeacherWeights":
        """Weights 1/M in both heads, on the device of `like`; they carry no graph."""
        weights = torch.full_like(like, 1 / like.shape[1], requires_grad=False)
        return cls(logit=weights, feature=weights)


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The terms of Equ. 2 per sample, before the mean over the batch; detached.

    Attributes:
        cross_entropy: CE_i.
        kd: Logit term of each teacher, unweighted.
        feature: Feature term of each teacher, unweighted.
        total: cross_entropy + α Σ_m w_l kd + β Σ_m w_f feature.
    """

    cross_entropy: Float[Tensor, " B"]
    kd: Float[Tensor, "B M"]
    feature: Float[Tensor, "B M"]
    total: Float[Tensor, " B"]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same dataclasses, mappings, tuples and lists, with a function of every tensor in them."""
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        names = [entry.name for entry in fields(value)]
        return replace(value, **{n: map_tensors(function, getattr(value, n)) for n in names})
    if isinstance(value, Mapping):
        return {name: map_tensors(function, entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        parts = [map_tensors(function, entry) for entry in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
