"""What a run of distillation measures: sums on the device, one transfer an epoch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from agents.policy_gradient import entropy
from mtkd_env import MTKDVectorEnv, distributed
from mtkd_env.action import PARTS, WeightFusion
from mtkd_env.reward import minmax_center
from mtkd_env.types import UNKNOWN, LossTerms
from mtkd_env.vector import StepRecord

HEADS = ("logit", "feature")

SCALARS = ("loss/total", "loss/cross_entropy", "loss/kd", "loss/feature", "reward")

# What weights are told of apart: by class, and by whether the teacher is right.
PARTITION = ("class", "right", "wrong")

# Steps whose sums are made together: one by one, their many small operations would take longer than
# a small student's own.
TOGETHER = 32

# What is known of some samples, (B,) or (B, M) each.
Columns = Mapping[str, Tensor]


def columns_of(record: StepRecord) -> dict[str, Tensor]:
    """What meters need to know of a step."""
    columns = {
        **{f"loss/{term.name}": getattr(record.losses, term.name) for term in fields(LossTerms)},
        "reward": record.rewards.scalar,
        "teacher_rewards": record.rewards.teacher,
        "targets": record.targets,
        "correct": record.correct,
    }
    for part, weights in {"total": record.weights, **record.weights.parts}.items():
        columns |= {f"weights/{part}/{head}": getattr(weights, head) for head in HEADS}
    return columns


def agent_score(means: Mapping[str, float]) -> dict[str, float]:
    """r(w) / r(oracle) per head and together: 0 for uniform weights, 1 for the oracle's.

    0 as well where the teachers cannot be told apart, as with a single one.
    """
    oracle = means["_score/oracle"]
    scale = 1 / oracle if oracle > 0 else 0.0
    scores = {f"score/{head}": means[f"_score/{head}"] * scale for head in HEADS}
    return {"score": sum(scores.values()) / len(HEADS), **scores}


class EpochMeter:
    """Means over all steps since the last reading; subscribes to an environment.

    Nothing leaves the device before it is read.

    Args:
        teachers: Names of the M teachers.
        num_classes: Number of classes C.

    Attributes:
        steps: Steps since the last reading.
    """

    def __init__(self, teachers: Sequence[str], num_classes: int) -> None:
        self._teachers = list(teachers)
        self._num_classes = num_classes
        self._sums: dict[str, Tensor] = {}
        self._waiting: list[Columns] = []
        self.steps = 0

    def __call__(self, record: StepRecord) -> None:
        """Takes a step into account."""
        columns = columns_of(record)
        # Weights are made of other parts in a warm-up.
        if self._waiting and self._waiting[-1].keys() != columns.keys():
            self._add_up()
        self._waiting.append(columns)
        self.steps += 1
        if self.steps % TOGETHER == 0:
            self._add_up()

    def take(self) -> dict[str, Tensor]:
        """The sums; starts over."""
        self._add_up()
        sums, self._sums, self.steps = self._sums, {}, 0
        return sums

    @torch.no_grad()
    def _add_up(self) -> None:
        if not self._waiting:
            return
        columns = _joined(self._waiting)
        for name, value in (sums_of(columns) | parts_of(columns, self._num_classes)).items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._waiting = []

    def read(self) -> tuple[dict[str, float], dict[str, Any]]:
        """What there is to be said of the steps; starts over. Of several processes, of all samples.

        Returns:
            The means as numbers, vectors as one entry per teacher.
            What the mean weights are made of: `teachers`; `class` with `count` (C) and both heads
            (C, M); `right` and `wrong`, each with `count` (M) and both heads (M). A mean over no
            samples is None.
        """
        sums = self.take()
        breakdown: dict[str, Any] = {"teachers": self._teachers}
        for part in PARTITION:
            total, count = (distributed.total(sums.pop(name)) for name in (part, f"{part}/count"))
            # One count for all teachers of a class, one for each teacher otherwise.
            means = total / (count.unsqueeze(1) if part == "class" else count)
            heads = zip(HEADS, _numbers(means.tolist()), strict=True)
            breakdown[part] = {"count": count.long().tolist(), **dict(heads)}
        return self._means(sums), breakdown

    def _means(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        flat = torch.cat([value.reshape(-1) for value in sums.values()]) / sums["_samples"]
        numbers = iter(distributed.mean(flat).tolist())
        means: dict[str, float] = {}
        for name, value in sums.items():
            if value.ndim == 0:
                means[name] = next(numbers)
            else:
                means.update({f"{name}/{teacher}": next(numbers) for teacher in self._teachers})
        scores = agent_score(means)
        return {k: v for k, v in means.items() if not k.startswith("_")} | scores

    def state_dict(self) -> dict[str, Any]:
        """What has been added up since the last reading, by each of several processes."""
        waiting = _joined(self._waiting).items()
        return {
            "sums": {name: distributed.mean(value) for name, value in self._sums.items()},
            "waiting": {name: distributed.gather(value) for name, value in waiting},
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Goes on from what `state_dict` gave."""
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        waiting = state["waiting"].items()
        mine = {name: distributed.local_part(value).to(device) for name, value in waiting}
        self._waiting = [mine] if mine else []
        self.steps = state["steps"]


def _joined(steps: Sequence[Columns]) -> dict[str, Tensor]:
    """The samples of some steps together."""
    return {name: torch.cat([step[name] for step in steps]) for name in (steps[0] if steps else ())}


def sums_of(columns: Columns) -> dict[str, Tensor]:
    """Sums of losses, rewards, weights, their entropies, and what the agent score is made of.

    Its numerators and denominator: r(w) = Σ_m w · A with the centred advantages A of Equ. 8,
    whatever the agent is paid by; the oracle puts all weight on the best teacher of every
    sample.
    """
    advantages = minmax_center(columns["teacher_rewards"])
    samples = len(advantages)
    # Of what there is for every teacher, the mean over them.
    sums = {name: columns[name].view(samples, -1).mean(1).sum() for name in SCALARS}
    for head in HEADS:
        sums[f"weights/{head}"] = columns[f"weights/total/{head}"].sum(0)
    sums["teacher_rewards"] = columns["teacher_rewards"].sum(0)
    for name in columns:
        if name.startswith("weights/"):
            sums[name.replace("weights", "entropy")] = entropy(columns[name]).sum()
    for head in HEADS:
        sums[f"_score/{head}"] = (columns[f"weights/total/{head}"] * advantages).sum()
    sums["_score/oracle"] = advantages.max(1).values.sum()
    sums["_samples"] = advantages.new_full((), samples)
    return sums


def parts_of(columns: Columns, num_classes: int) -> dict[str, Tensor]:
    """Sums of both heads' weights by class and by whether the teacher is right.

    Returns:
        `class` (2, C, M) with `class/count` (C); `right` and `wrong` (2, M), each with its `count`
        (M) of samples.
    """
    weights = torch.stack([columns[f"weights/total/{head}"] for head in HEADS]).float()
    targets = columns["targets"]
    classes = torch.arange(num_classes, device=targets.device)
    members = (classes.unsqueeze(1) == targets).float()
    right = columns["correct"].float()
    # Of images without a label nobody knows who is right.
    wrong = (targets != UNKNOWN).unsqueeze(1) * (1 - right)
    return {
        "class": members @ weights,
        "class/count": members.sum(1),
        "right": (weights * right).sum(1),
        "right/count": right.sum(0),
        "wrong": (weights * wrong).sum(1),
        "wrong/count": wrong.sum(0),
    }


@torch.no_grad()
def accuracy_by_class(env: MTKDVectorEnv, num_classes: int) -> dict[str, Any]:
    """What student and teachers have right of each class's test images.

    Returns:
        `count` (C), `student` (C) and `teachers` (M, C); a share of no images is None.
    """
    classes = torch.arange(num_classes, device=env.device)
    # Of several processes one may have none of the images.
    right = torch.zeros(1 + len(env.teacher_names), num_classes, device=env.device).double()
    count = torch.zeros_like(right[0])
    for batch in env.splits["test"]():
        teachers = batch.teachers or env.distiller.teachers(batch.inputs)
        student = env.distiller.predict(batch.inputs)
        members = (classes.unsqueeze(1) == batch.targets).double()
        logits = torch.cat([student.logits.unsqueeze(0), teachers.logits])
        right += (logits.argmax(-1) == batch.targets).double() @ members.T
        count += members.sum(1)
    total = distributed.total(count)
    student, *others = _numbers((distributed.total(right) / total).tolist())
    return {"count": total.long().tolist(), "student": student, "teachers": others}


def _numbers(value: Any) -> Any:
    """Nested lists with six decimals, and with None for what is not a number."""
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return None if math.isnan(value) else round(value, 6)


def fusion_coefficients(fusion: WeightFusion) -> dict[str, float]:
    """The coefficients γ as `fusion/head/part`; nothing where they are fixed."""
    if not fusion.learnable:
        return {}
    rows = zip(HEADS, fusion.coefficients.tolist(), strict=True)
    return {
        f"fusion/{head}/{part}": value
        for head, row in rows
        for part, value in zip(PARTS, row, strict=True)
    }
