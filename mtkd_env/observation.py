"""What the agent sees of every sample: Equ. 3-5.

Blocks of numbers per teacher, concatenated over the teachers in the order of Equ. 5, optionally
standardised per column.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from mtkd_env import distributed, losses
from mtkd_env.errors import lookup
from mtkd_env.types import DistillState, TeacherOutputs

# (B, width) of one teacher each: what it says, word for word.
OUTPUT_BLOCKS: Mapping[str, Callable[[TeacherOutputs, int], Tensor]] = {
    "feature": lambda teachers, m: teachers.features[m],
    "logits": lambda teachers, m: teachers.scores[m],
}

# The same of what is made of that with the classes or the student.
MADE_BLOCKS: Mapping[str, Callable[[DistillState, int], Tensor]] = {
    "cross_entropy": lambda state, m: state.teacher_cross_entropy[:, m : m + 1],
    "similarity": lambda state, m: state.similarity[:, m : m + 1],
    "divergence": lambda state, m: state.divergence[:, m : m + 1],
}

# Which blocks an observation has; the two parts are the ablation of Table 6(b). That of
# `LabelFreeObserver` is its own.
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
}

LABEL_FREE = "label_free"

# Blocks of what is the same for all teachers, behind theirs.
SHARED_BLOCKS = ("mean/probabilities", "student/probabilities", "student/pseudo_cross_entropy")

# Blocks that look at the sample's label.
LABELLED_BLOCKS = frozenset({"cross_entropy"})

# Numbers that have no bound are cut at so much, since nothing standardises them.
CLIP = 8.0


def needs_label(observation: str) -> bool:
    """Whether an observation looks at the sample's label."""
    return not LABELLED_BLOCKS.isdisjoint(OBSERVATIONS[observation])


@dataclass(frozen=True, slots=True)
class ShortObservation:
    """A raw observation without what a store of teacher outputs has of it.

    Attributes:
        keys: Where the store has the outputs.
        made: All blocks that are not outputs, in the order of the observation.
    """

    keys: Int64[Tensor, " B"]
    made: Float[Tensor, "B R"]


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

    def reset(self) -> None:
        """Forgets all rows."""
        self.count = 0
        self.mean.zero_()
        self.squares.zero_()

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

    def __call__(self, rows: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
        """Rows with mean 0 and variance 1 per column; unchanged before the first update."""
        if self.count == 0:
            return rows
        deviation = (self.squares / self.count).sqrt().clamp(min=1e-6)
        scaled = (rows.double() - self.mean) / deviation
        return scaled.clamp(-self.clip, self.clip).to(rows.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The statistics."""
        return {"count": self.count, "mean": self.mean.clone(), "squares": self.squares.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.count = int(state["count"])
        self.mean.copy_(state["mean"])
        self.squares.copy_(state["squares"])


class Observer:
    """Lays out and computes raw observations.

    Args:
        observation: A name in `OBSERVATIONS`.
        names: Names of the teachers.
        feature_dims: Feature width D_m of each teacher.
        num_classes: C.

    Attributes:
        layout: Slice of the observation for every `teacher/block`.
        width: F, the length of an observation; Σ_m (D_m + C + 3) for all blocks.
        needs_label: Whether it looks at the sample's label.
    """

    def __init__(
        self,
        observation: str,
        *,
        names: tuple[str, ...],
        feature_dims: tuple[int, ...],
        num_classes: int,
    ) -> None:
        self._blocks = lookup(OBSERVATIONS, observation, "observation")
        self.needs_label = needs_label(observation)
        self.layout: dict[str, slice] = {}
        start = 0
        for name, feature_dim in zip(names, feature_dims, strict=True):
            widths = {"feature": feature_dim, "logits": num_classes}
            for block in self._blocks:
                stop = start + widths.get(block, 1)
                self.layout[f"{name}/{block}"] = slice(start, stop)
                start = stop
        self.width = start

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
        return ShortObservation(keys, torch.cat(self._made(state), dim=1))

    def restore(self, short: ShortObservation, teachers: TeacherOutputs) -> Float[Tensor, "B F"]:
        """The raw observation that was made short, bit for bit.

        Args:
            short: What `shorten` gave.
            teachers: What the store has under its keys; the feature maps are not looked at.
        """
        return self._join(teachers, short.made.split(1, dim=1))

    def _made(self, state: DistillState) -> list[Tensor]:
        teachers = range(len(state.teachers.logits))
        made = [name for name in self._blocks if name in MADE_BLOCKS]
        return [MADE_BLOCKS[name](state, m).float() for m in teachers for name in made]

    def _join(self, teachers: TeacherOutputs, made: Iterable[Tensor]) -> Float[Tensor, "B F"]:
        """All blocks in their order; those that are made have one column each."""
        rest = iter(made)
        blocks = [
            OUTPUT_BLOCKS[name](teachers, m).float() if name in OUTPUT_BLOCKS else next(rest)
            for m in range(len(teachers.logits))
            for name in self._blocks
        ]
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
        self.needs_label = False
        widths = {"probabilities": num_classes}
        teachers = [f"{name}/{block}" for name in names for block in OBSERVATIONS[LABEL_FREE]]
        self.layout = {}
        start = 0
        for block in (*teachers, *SHARED_BLOCKS):
            stop = start + widths.get(block.rpartition("/")[2], 1)
            self.layout[block] = slice(start, stop)
            start = stop
        self.width = start

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
            functional.cosine_similarity(probabilities, own.unsqueeze(1), dim=-1),
        ]
        blocks = torch.cat([probabilities, torch.stack(per_teacher, dim=-1)], dim=-1)
        gap = losses.cross_entropy(student, pseudo).clamp(max=CLIP).unsqueeze(1)
        return torch.cat([blocks.flatten(1), mean, own, gap], dim=1)

    def shorten(self, state: DistillState) -> None:
        """None: there is little that a store would have of it."""
        del state


def make_observer(
    observation: str, *, names: tuple[str, ...], feature_dims: tuple[int, ...], num_classes: int
) -> Observer:
    """What computes an observation by its name; see `Observer` for the arguments."""
    if observation == LABEL_FREE:
        return LabelFreeObserver(names, num_classes)
    return Observer(observation, names=names, feature_dims=feature_dims, num_classes=num_classes)
