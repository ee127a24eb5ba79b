"""What a run of distillation measures: sums on the device, one transfer an epoch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agents.policy_gradient import entropy
from mtkd_env import MTKDVectorEnv, distributed
from mtkd_env.action import PARTS, WeightFusion
from mtkd_env.reward import minmax_center
from mtkd_env.types import UNKNOWN, TeacherWeights
from mtkd_env.vector import StepRecord

HEADS = ("logit", "feature")


@torch.no_grad()
def step_means(record: StepRecord) -> dict[str, Tensor]:
    """Means over the batch of what one step says, scalars and one vector (M,) per head."""
    means = {
        "loss/total": record.losses.total.mean(),
        "loss/cross_entropy": record.losses.cross_entropy.mean(),
        "loss/kd": record.losses.kd.mean(),
        "loss/feature": record.losses.feature.mean(),
        "reward": record.rewards.scalar.mean(),
        "weights/logit": record.weights.logit.mean(0),
        "weights/feature": record.weights.feature.mean(0),
        "teacher_rewards": record.rewards.teacher.mean(0),
    }
    for part, weights in {"total": record.weights, **record.weights.parts}.items():
        means[f"entropy/{part}/logit"] = entropy(weights.logit).mean()
        means[f"entropy/{part}/feature"] = entropy(weights.feature).mean()
    return {**means, **_score_terms(record.weights, record.rewards.teacher)}


def _score_terms(weights: TeacherWeights, teacher_rewards: Tensor) -> dict[str, Tensor]:
    """Numerators and denominator of the agent score.

    r(w) = Σ_m w · A with the centred advantages A of Equ. 8, whatever the agent is paid by; the
    oracle puts all weight on the best teacher of every sample.
    """
    advantages = minmax_center(teacher_rewards)
    return {
        "_score/logit": (weights.logit * advantages).sum(1).mean(),
        "_score/feature": (weights.feature * advantages).sum(1).mean(),
        "_score/oracle": advantages.max(1).values.mean(),
    }


def agent_score(means: Mapping[str, float]) -> dict[str, float]:
    """r(w) / r(oracle) per head and together: 0 for uniform weights, 1 for the oracle's.

    0 as well where the teachers cannot be told apart, as with a single one.
    """
    oracle = means["_score/oracle"]
    scale = 1 / oracle if oracle > 0 else 0.0
    scores = {f"score/{head}": means[f"_score/{head}"] * scale for head in HEADS}
    return {"score": sum(scores.values()) / len(HEADS), **scores}


class _Meter:
    """Sums over the steps since the last reading; nothing leaves the device before.

    Args:
        teachers: Names of the M teachers.
    """

    def __init__(self, teachers: Sequence[str]) -> None:
        self._teachers = list(teachers)
        self._sums: dict[str, Tensor] = {}
        self.steps = 0

    def _add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """What has been added up since the last reading.

        Of several processes: what, if each had it, would come to the same together.
        """
        sums = {name: distributed.mean(value) for name, value in self._sums.items()}
        return {"sums": sums, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Goes on from what `state_dict` gave."""
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.steps = state["steps"]


class EpochMeter(_Meter):
    """Means over all steps since the last reading; subscribes to an environment."""

    def __call__(self, record: StepRecord) -> None:
        """Takes a step into account."""
        self._add(step_means(record))

    def read(self) -> dict[str, float]:
        """The means as numbers, vectors as one entry per teacher; starts over.

        Of several processes, those over the samples of all.
        """
        flat = torch.cat([value.reshape(-1) for value in self._sums.values()]) / self.steps
        numbers = iter(distributed.mean(flat).tolist())
        means: dict[str, float] = {}
        for name, value in self._sums.items():
            if value.ndim == 0:
                means[name] = next(numbers)
            else:
                means.update({f"{name}/{teacher}": next(numbers) for teacher in self._teachers})
        self._sums, self.steps = {}, 0
        scores = agent_score(means)
        return {k: v for k, v in means.items() if not k.startswith("_")} | scores


class BreakdownMeter(_Meter):
    """Mean weights by class, and by whether the teacher is right, over the steps of an epoch.

    Subscribes to an environment.

    Args:
        teachers: Names of the M teachers.
        num_classes: Number of classes C.
        device: Device of the environment.
    """

    def __init__(
        self, teachers: Sequence[str], num_classes: int, device: torch.device | str
    ) -> None:
        super().__init__(teachers)
        self._classes = torch.arange(num_classes, device=device)

    def __call__(self, record: StepRecord) -> None:
        """Takes a step into account."""
        self._add(breakdown_sums(record, self._classes))

    def read(self) -> dict[str, Any]:
        """Means and numbers of samples by class and by correctness; starts over.

        Returns:
            `teachers`; `class` with `count` (C) and both heads (C, M); `right` and `wrong`, each
            with `count` (M) and both heads (M). A mean over no samples is None.
        """
        sums = {name: distributed.total(value) for name, value in self._sums.items()}
        self._sums = {}
        breakdown: dict[str, Any] = {"teachers": self._teachers}
        for group in ("class", "right", "wrong"):
            count = sums[f"{group}/count"]
            # One count for all teachers of a class, one for each teacher otherwise.
            means = sums[group] / (count.unsqueeze(1) if group == "class" else count)
            values = dict(zip(HEADS, means, strict=True))
            breakdown[group] = {
                "count": count.long().tolist(),
                **{head: _numbers(value.tolist()) for head, value in values.items()},
            }
        return breakdown


@torch.no_grad()
def breakdown_sums(record: StepRecord, classes: Tensor) -> dict[str, Tensor]:
    """What one step adds to a breakdown: sums of both heads' weights, numbers of samples.

    Args:
        record: The step.
        classes: All classes (C,), on the record's device.

    Returns:
        `class` (2, C, M) with `class/count` (C); `right` and `wrong` (2, M), each with its
        `count` (M).
    """
    weights = torch.stack([record.weights.logit, record.weights.feature]).float()
    members = (classes.unsqueeze(1) == record.targets).float()
    right = record.correct.float()
    # Of images without a label nobody knows who is right.
    wrong = (record.targets != UNKNOWN).unsqueeze(1) * (1 - right)
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
        state = env.distiller.examine(replace(batch, teachers=teachers))
        members = (classes.unsqueeze(1) == batch.targets).double()
        logits = torch.cat([state.student.logits.unsqueeze(0), teachers.logits])
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
