"""What the agent sees of every sample: Equ. 3-5, and observations without labels.

Blocks of numbers per teacher, concatenated over the teachers in the order of Equ. 5, optionally
standardised per column.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mtkd_env import distributed, losses
from mtkd_env.errors import ConfigError, check_shape
from mtkd_env.imports import Kind, Named, takes
from mtkd_env.reference import ReferenceImages
from mtkd_env.teachers.ensemble import TeacherEnsemble
from mtkd_env.types import DistillState, Known, TeacherOutputs

# (B, width) of every teacher: what it says, word for word.
OUTPUT_BLOCKS: Mapping[str, Callable[[TeacherOutputs], Iterable[Tensor]]] = {
    "feature": lambda teachers: teachers.features,
    "logits": lambda teachers: teachers.scores,
}


@dataclass(frozen=True, slots=True)
class Block:
    """Numbers that are made of a state, the same number for every teacher.

    Attributes:
        compute: Gives them: (B, M), or (B, M, width).
        width: How many for each teacher.
        needs_label: Whether they look at the sample's label.
    """

    compute: Callable[[DistillState], Tensor]
    width: int = 1
    needs_label: bool = True

    @property
    def name(self) -> str:
        """The name of the function."""
        return getattr(self.compute, "__name__", type(self.compute).__name__)

    def __call__(self, state: DistillState) -> Float[Tensor, "B M W"]:
        """The numbers of a batch.

        Raises:
            ConfigError: They have another shape.
        """
        found, rows = self.compute(state), state.divergence.shape
        shape = rows if self.width == 1 else (*rows, self.width)
        check_shape(f"the block {self.name!r} of env.observation", found, shape)
        return found.float().view(*rows, self.width)


# What is made of that with the classes or the student.
MADE_BLOCKS: Mapping[str, Block] = {
    "cross_entropy": Block(lambda state: state.teacher_cross_entropy),
    "similarity": Block(lambda state: state.similarity, needs_label=False),
    "divergence": Block(lambda state: state.divergence, needs_label=False),
}

# Which blocks an observation has of each teacher; the two parts are the ablation of Table 6(b).
# What those without labels mean stands in `LabelFreeObserver` and `RelativeObserver`.
OBSERVATIONS: Mapping[str, tuple[str, ...]] = {
    "all": ("feature", "logits", "cross_entropy", "similarity", "divergence"),
    "performance": ("feature", "logits", "cross_entropy"),
    "gaps": ("similarity", "divergence"),
    "label_free": (
        "probabilities",
        "entropy",
        "pseudo_cross_entropy",
        "pseudo_divergence",
        "agreement",
    ),
    "relative": (
        "entropy",
        "top_probability",
        "margin",
        "consent",
        "agreement",
        "mean_probability",
        "student_probability",
        "mean_divergence",
        "student_divergence",
        "student_similarity",
        "evidence",
        "top_logit",
        "mean_entropy",
        "student_entropy",
        "coverage",
        "mean_coverage",
        "student_coverage",
        "breadth",
        "reliability",
        "mean_reliability",
        "mean_lift",
        "largest_lift",
        "there",
    ),
}

LABEL_FREE, RELATIVE = "label_free", "relative"

# Observations whose numbers are of the order of 1, so that nothing has to standardise them.
UNSCALED = (LABEL_FREE, RELATIVE)

# Says which blocks `relative` has and what they mean: to change with any of it, because policies
# that were trained elsewhere know them as they were.
RELATIVE_VERSION = 2

# Blocks of what is the same for all teachers, behind theirs.
SHARED_BLOCKS = ("mean/probabilities", "student/probabilities", "student/pseudo_cross_entropy")

# By its name, what an observation consists of; None for what the teachers say or is not a function.
Blocks = Mapping[str, Block | None]


def _blocks(names: Iterable[str]) -> Blocks:
    return {name: MADE_BLOCKS.get(name) for name in names}


def _own_block(block: Block) -> Blocks:
    return {block.name: block}


OBSERVATION: Kind[Blocks] = Kind(
    {name: _blocks([name]) for name in (*OUTPUT_BLOCKS, *MADE_BLOCKS)}
    | {name: _blocks(blocks) for name, blocks in OBSERVATIONS.items()},
    "observation",
    lambda found: isinstance(found, Block) or takes(1)(found),
    "a Block, or a function of the state that gives (B, M)",
    lambda found: _own_block(found if isinstance(found, Block) else Block(found)),
)

# Numbers that have no bound are cut at so much, since nothing standardises them.
CLIP = 8.0

# How often a teacher names a class, divided by how often all do, is taken as at least so much.
LEAST_RATIO = 1e-3


def find_blocks(observation: Named | Sequence[Named]) -> Blocks:
    """What an observation consists of, by name, in its order.

    Args:
        observation: What `OBSERVATION` finds, or several of them.

    Raises:
        ConfigError: Something that is no observation, nothing, or two blocks of one name.
    """
    given = observation if isinstance(observation, list | tuple) else [observation]
    found: dict[str, Block | None] = {}
    for one in given:
        blocks = OBSERVATION.find(one)
        if twice := found.keys() & blocks.keys():
            raise ConfigError(f"observation: there are two blocks {min(twice)!r}")
        if len(given) > 1 and isinstance(one, str) and one in UNSCALED:
            raise ConfigError(f"observation: expected {one!r} alone, got {given}")
        found |= blocks
    if not found:
        raise ConfigError("observation: expected at least one block, got none")
    return found


def needs_label(observation: Named | Sequence[Named]) -> bool:
    """Whether an observation looks at the sample's label."""
    return any(
        block is not None and block.needs_label for block in find_blocks(observation).values()
    )


@dataclass(frozen=True, slots=True)
class ShortObservation:
    """A raw observation without what a store of teacher outputs has of it.

    Attributes:
        keys: Where the store has the outputs.
        made: All blocks that are not outputs, in the order of the observation.
    """

    keys: Int64[Tensor, " B"]
    made: Float[Tensor, "B M R"]

    @classmethod
    def joined(cls, parts: Sequence["ShortObservation"]) -> "ShortObservation":
        """The rows of several, one after the other."""
        return cls(torch.cat([one.keys for one in parts]), torch.cat([one.made for one in parts]))


class RunningStandardizer:
    """Standardises columns by the mean and variance of all rows that it was given.

    Args:
        width: Number of columns.
        device: Where the statistics lie.
        clip: Largest absolute value of an output, for columns that hardly ever vary.
    """

    def __init__(self, width: int, device: torch.device, clip: float = 10.0) -> None:
        self.clip = clip
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)
        self._deviation: Tensor | None = None

    def update(self, rows: Float[Tensor, "B F"]) -> None:
        """Takes a batch of rows into account (parallel variance of Chan et al., 1979).

        Of several processes each gives its part of the batch.
        """
        rows = rows.double()
        new = len(rows) * distributed.processes()
        total = self.count + new
        mean = distributed.mean(rows.mean(0))
        delta = mean - self.mean
        squares = distributed.total((rows - mean).square().sum(0))
        self.squares += squares + delta.square() * (self.count * new / total)
        self.mean += delta * (new / total)
        self.count = total
        self._deviation = None

    def __call__(self, rows: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
        """Rows with mean 0 and variance 1 per column; unchanged before the first update."""
        if self.count == 0:
            return rows
        if self._deviation is None:
            self._deviation = (self.squares / self.count).sqrt().clamp(min=1e-6)
        # In float64, as the mean is.
        scaled = (rows - self.mean).div_(self._deviation)
        return scaled.clamp_(-self.clip, self.clip).to(rows.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The statistics."""
        return {"count": self.count, "mean": self.mean.clone(), "squares": self.squares.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.count = int(state["count"])
        self._deviation = None
        self.mean.copy_(state["mean"])
        self.squares.copy_(state["squares"])


class Observer(ABC):
    """Lays out and computes raw observations.

    Args:
        blocks: Name and width of every block, in their order.
        needs_label: Whether it looks at the sample's label.

    Attributes:
        layout: Slice of the observation for every block, named `teacher/block`.
        width: F, the length of an observation.
        needs_label: Whether it looks at the sample's label.
    """

    def __init__(self, blocks: Iterable[tuple[str, int]], *, needs_label: bool = False) -> None:
        self.needs_label = needs_label
        self.layout: dict[str, slice] = {}
        self.width = 0
        for name, width in blocks:
            self.layout[name] = slice(self.width, self.width + width)
            self.width += width

    @abstractmethod
    def __call__(self, state: DistillState) -> Float[Tensor, "B F"]:
        """The raw observation of every sample, detached."""

    def shorten(self, state: DistillState) -> ShortObservation | None:
        """What `OutputObserver.restore` makes the observation of; None if there is no such thing.

        That is where no store has enough of it.
        """
        del state
        return None


class OutputObserver(Observer):
    """The blocks of Equ. 5.

    Args:
        observation: What `find_blocks` takes, but what has an observer of its own.
        teachers: The teachers; of them the names, the widths D_m and C.

    Attributes:
        width: F; Σ_m (D_m + C + 3) for all blocks.
    """

    def __init__(self, observation: Named | Sequence[Named], teachers: TeacherEnsemble) -> None:
        self._blocks = find_blocks(observation)
        super().__init__(
            (
                (f"{name}/{label}", widths[label] if block is None else block.width)
                for name, width in zip(teachers.names, teachers.feature_dims, strict=True)
                for widths in ({"feature": width, "logits": teachers.num_classes},)
                for label, block in self._blocks.items()
            ),
            needs_label=needs_label(observation),
        )
        # In their order, what the teachers say by its name, and neighbours that are made by the
        # width of all together.
        self._runs: list[str | int] = []
        for made, run in groupby(self._blocks.items(), lambda pair: pair[1] is not None):
            pairs = list(run)
            widths = sum(block.width for _, block in pairs if block is not None)
            self._runs += [widths] if made else [name for name, _ in pairs]

    @torch.no_grad()
    def __call__(self, state: DistillState) -> Float[Tensor, "B F"]:
        """Equ. 5: the raw observation of every sample, detached."""
        return self._join(state.teachers, self._made(state))

    @torch.no_grad()
    def shorten(self, state: DistillState) -> ShortObservation | None:
        """What `restore` makes the raw observation of; None if no store has anything of it."""
        keys = state.batch.keys
        if keys is None or OUTPUT_BLOCKS.keys().isdisjoint(self._blocks):
            return None
        return ShortObservation(keys, self._made(state))

    def restore(self, short: ShortObservation, teachers: TeacherOutputs) -> Float[Tensor, "B F"]:
        """The raw observation that was made short, bit for bit.

        Args:
            short: What `shorten` gave.
            teachers: What the store has under its keys; the feature maps are not looked at.
        """
        return self._join(teachers, short.made)

    def _made(self, state: DistillState) -> Float[Tensor, "B M R"]:
        made = [block(state) for block in self._blocks.values() if block is not None]
        none = state.divergence.new_zeros(*state.divergence.shape, 0)
        return torch.cat(made, dim=2) if made else none

    def _join(self, teachers: TeacherOutputs, made: Float[Tensor, "B M R"]) -> Float[Tensor, "B F"]:
        """All blocks in their order, those that are made together where they are neighbours."""
        runs = iter(made.split([run for run in self._runs if isinstance(run, int)], dim=2))
        parts = [
            next(runs).unbind(1) if isinstance(run, int) else OUTPUT_BLOCKS[run](teachers)
            for run in self._runs
        ]
        blocks = [block.float() for teacher in zip(*parts, strict=True) for block in teacher]
        return torch.cat(blocks, dim=1)


class LabelFreeObserver(Observer):
    """An observation without the sample's label, the teachers' features or their maps.

    Per teacher, all at temperature 1: its probabilities (C); their entropy [nats]; its
    cross-entropy with the class that the teachers' mean finds most likely, in place of the label,
    /4; KL(teacher || student) / 4; cosine of its probabilities and the student's. Then, once, the
    mean of the teachers' probabilities (C), the student's (C), and its cross-entropy with that
    class. All numbers are of the order of 1, so they need no standardising.

    Args:
        names: Names of the teachers.
        num_classes: C.
    """

    def __init__(self, names: tuple[str, ...], num_classes: int) -> None:
        teachers = [f"{name}/{block}" for name in names for block in OBSERVATIONS[LABEL_FREE]]
        super().__init__(
            (block, num_classes if block.endswith("/probabilities") else 1)
            for block in (*teachers, *SHARED_BLOCKS)
        )

    @torch.no_grad()
    def __call__(self, state: DistillState) -> Float[Tensor, "B F"]:
        """The raw observation of every sample, detached."""
        logits, known = state.teachers.logits.float(), state.teachers.known
        probabilities = logits.softmax(-1).transpose(0, 1)
        student = state.student.logits.detach().float()
        own = student.softmax(1)
        mean = probabilities.mean(1)
        pseudo = mean.argmax(1)
        per_teacher = [
            losses.predictive_entropy(logits, known),
            (losses.teacher_cross_entropy(logits, pseudo, known) / 4).clamp(max=CLIP),
            (losses.kd_divergence(student, logits, 1.0, known) / 4).clamp(max=CLIP),
            losses.prediction_cosine(probabilities, own.unsqueeze(1)),
        ]
        blocks = torch.cat([probabilities, torch.stack(per_teacher, dim=-1)], dim=-1)
        gap = losses.cross_entropy(student, pseudo).clamp(max=CLIP).unsqueeze(1)
        return torch.cat([blocks.flatten(1), mean, own, gap], dim=1)


def upbringing(
    class_probabilities: Float[Tensor, "M C"], agreement: Float[Tensor, "M M C"]
) -> dict[str, Tensor]:
    """What shows, without labels, what each teacher was raised on; see `RelativeObserver`.

    What a `ReferenceImages` knows, in numbers that mean the same for any C.

    Returns:
        `coverage` ρ and `reliability` r (M, C), `breadth` (M,), the entropy of P_m, and `mean_lift`
        and `largest_lift` (M,), over the other teachers.
    """
    count, classes = class_probabilities.shape
    smallest = torch.finfo(torch.float32).tiny
    ratio = class_probabilities / class_probabilities.mean(0).clamp(min=smallest)
    # Who names a class more often than others do counts more among those who say it is one.
    seconded = torch.einsum("nc,mnc->mc", ratio / count, agreement)
    by_chance = class_probabilities @ class_probabilities.T
    agreed = agreement.sum(2)
    lift = ((agreed + LEAST_RATIO / classes) / (by_chance + LEAST_RATIO / classes)).log()
    lift = lift / math.log(classes)
    others = ~torch.eye(count, dtype=torch.bool, device=lift.device)
    largest = lift.masked_fill(~others, -torch.inf).amax(1) if count > 1 else lift.new_zeros(1)
    return {
        "coverage": ratio.clamp(LEAST_RATIO, 1 / LEAST_RATIO).log(),
        "breadth": torch.special.entr(class_probabilities).sum(1) / math.log(classes),
        "reliability": seconded / class_probabilities.clamp(min=smallest),
        "mean_lift": (lift * others).sum(1) / max(1, count - 1),
        "largest_lift": largest,
    }


class RelativeObserver(Observer):
    """An observation that means the same for any data set and any teachers, without labels.

    The same K + 1 numbers of every teacher, at temperature 1. None depends on the order of the
    classes or of the teachers, on C, or on what is added to all logits of a teacher. With p the
    teacher's probabilities, p̄ their mean over the teachers, q the student's:

    | Block | Meaning |
    |---|---|
    | `entropy`, `mean_entropy`, `student_entropy` | entropy of p, p̄ and q, divided by log C |
    | `top_probability`, `margin` | largest of p, and its distance to the second largest |
    | `consent` | p of the class that p̄ finds most likely |
    | `agreement` | share of the teachers with the same most likely class |
    | `mean_probability`, `student_probability` | p̄ and q of the teacher's most likely class |
    | `mean_divergence`, `student_divergence` | KL(p ‖ p̄) and KL(p ‖ q), divided by 4 |
    | `student_similarity` | cosine of p and q |
    | `evidence`, `top_logit` | log-mean-exp and maximum of the centred logits, divided by 10 |
    | `coverage` | ρ of the teacher's most likely class |
    | `mean_coverage`, `student_coverage` | Σ_c p̄_c ρ_c and Σ_c q_c ρ_c |
    | `breadth` | entropy of P, divided by log C |
    | `reliability`, `mean_reliability` | r of the teacher's most likely class, and Σ_c p̄_c r_c |
    | `mean_lift`, `largest_lift` | of the other teachers |
    | `there` | 1; 0 in the zeros that stand for teachers that are not there |

    P is the teacher's mean of p over all of the student's images, and ρ = log(P / mean of all
    teachers' P), clamped to ±log 1000: which classes it names more often than others do, which are
    those that it was raised on. r is how far others second the teacher where it names a class,
    Σ_n s_n mean(p·p_n) / P with the share s_n of teacher n in all teachers' P: above all those who
    know the class, as Dawid and Skene (1979) tell good raters from bad ones. Lift is how much more
    often than by chance two teachers agree, log(mean of p·p′ / P·P′) / log C: 1 for two that are
    always right, 0 for one that guesses, less for one that has learned wrong names.

    Args:
        names: Names of the teachers.
        reference: Has the student's images.

    Attributes:
        features_per_teacher: K + 1.
    """

    features_per_teacher = len(OBSERVATIONS[RELATIVE])

    def __init__(self, names: tuple[str, ...], reference: ReferenceImages) -> None:
        super().__init__(
            (f"{name}/{block}", 1) for name in names for block in OBSERVATIONS[RELATIVE]
        )
        self._reference = reference

    @cached_property
    def _raised(self) -> dict[str, Tensor]:
        """Looks at all of the student's images, once."""
        return upbringing(self._reference.class_probabilities, self._reference.agreement)

    @torch.no_grad()
    def __call__(self, state: DistillState) -> Float[Tensor, "B F"]:
        """The raw observation of every sample, detached."""
        probabilities = state.teachers.logits.float().softmax(-1)
        student = state.student.logits.detach().float()
        columns = {
            **_spread(state.teachers, probabilities),
            **_beside_others(state.teachers, probabilities, student),
            **_beside_upbringing(self._raised, probabilities, student.softmax(1)),
            "there": torch.ones_like(state.divergence),
        }
        rows = [columns[name].expand_as(state.divergence) for name in OBSERVATIONS[RELATIVE]]
        return torch.stack(rows, dim=-1).flatten(1)


def _spread(teachers: TeacherOutputs, probabilities: Float[Tensor, "M B C"]) -> dict[str, Tensor]:
    """How sure each teacher is."""
    first, second = probabilities.topk(2).values.unbind(-1)
    logits, count = _centred(teachers)
    evidence = logits.logsumexp(-1) - count.log()
    return {
        "entropy": _entropy_share(teachers.logits, teachers.known),
        "top_probability": first.T,
        "margin": (first - second).T,
        "evidence": (evidence / 10).clamp(max=CLIP).T,
        "top_logit": (logits.amax(-1) / 10).clamp(max=CLIP).T,
    }


def _centred(teachers: TeacherOutputs) -> tuple[Float[Tensor, "M B C"], Float[Tensor, "M 1"]]:
    """Logits minus their mean over the classes that the teacher knows, and how many these are."""
    logits, known = teachers.logits.float(), teachers.known
    if known is None:
        known = torch.ones_like(logits[:, 0], dtype=torch.bool)
    count, unknown = known.sum(1, keepdim=True), ~known.unsqueeze(1)
    mean = logits.masked_fill(unknown, 0).sum(-1) / count
    return (logits - mean.unsqueeze(-1)).masked_fill(unknown, -torch.inf), count.float()


def _beside_others(
    teachers: TeacherOutputs, probabilities: Float[Tensor, "M B C"], student: Float[Tensor, "B C"]
) -> dict[str, Tensor]:
    """Each teacher beside the other ones and beside the student."""
    mean, own = probabilities.mean(0), student.softmax(1)
    top, likely = probabilities.argmax(-1), mean.argmax(1)
    apart = losses.kd_divergence(student, teachers.logits, 1.0, teachers.known)
    to_mean = losses.divergence_from(
        probabilities, mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    )
    return {
        "consent": _at(probabilities, likely.expand_as(top)),
        "agreement": (top.unsqueeze(0) == top.unsqueeze(1)).float().mean(0).T,
        "mean_probability": _at(mean, top),
        "student_probability": _at(own, top),
        "mean_divergence": to_mean / 4,
        "student_divergence": (apart / 4).clamp(max=CLIP),
        "student_similarity": losses.prediction_cosine(probabilities, own).T,
        "mean_entropy": _entropy_share(mean.log().unsqueeze(0)),
        "student_entropy": _entropy_share(student.unsqueeze(0)),
    }


def _beside_upbringing(
    raised: Mapping[str, Tensor], probabilities: Float[Tensor, "M B C"], own: Float[Tensor, "B C"]
) -> dict[str, Tensor]:
    """Each sample beside what each teacher was raised on."""
    top, mean = probabilities.argmax(-1), probabilities.mean(0)
    coverage, reliability = raised["coverage"], raised["reliability"]
    return {
        **raised,
        "coverage": coverage.gather(1, top).T,
        "mean_coverage": mean @ coverage.T,
        "student_coverage": own @ coverage.T,
        "reliability": reliability.gather(1, top).T,
        "mean_reliability": mean @ reliability.T,
    }


def _at(
    probabilities: Float[Tensor, "*M B C"], classes: Int64[Tensor, "M B"]
) -> Float[Tensor, "B M"]:
    """The probabilities of some classes."""
    wide = probabilities.expand(*classes.shape, -1)
    return wide.gather(-1, classes.unsqueeze(-1)).squeeze(-1).T


def _entropy_share(logits: Float[Tensor, "M B C"], known: Known = None) -> Float[Tensor, "B M"]:
    """Entropies, 1 for who has no idea."""
    return losses.predictive_entropy(logits, known) / math.log(logits.shape[-1])


def make_observer(
    observation: Named | Sequence[Named],
    teachers: TeacherEnsemble,
    reference: Callable[[], ReferenceImages],
) -> Observer:
    """What computes an observation.

    Args:
        observation: What `find_blocks` takes.
        teachers: The teachers.
        reference: Gives the images beside the batches, of which `relative` needs the student's.

    Raises:
        ConfigError: No observation, or no such images.
    """
    if observation == LABEL_FREE:
        return LabelFreeObserver(teachers.names, teachers.num_classes)
    if observation == RELATIVE:
        return RelativeObserver(teachers.names, reference())
    return OutputObserver(observation, teachers)
