"""What a run measures: sums on the device during an epoch, one transfer at its end."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from agents.policy_gradient import entropy
from mtkd_env import distributed
from mtkd_env.action import PARTS, WeightFusion
from mtkd_env.env import StepRecord
from mtkd_env.errors import ConfigError
from mtkd_env.files import named_errors, sync
from mtkd_env.reward import minmax_center
from mtkd_env.types import TeacherWeights

HEADS = ("logit", "feature")

# Steps between two looks at what is on the device, for which the host has to wait.
WINDOW = 100

# Samples that a message names; there may be a whole batch of them.
NAMED = 8

HINT = "a lower optimizer.lr, distillation.alpha or distillation.beta may help"

# The files of a run with one line an epoch.
LINES = ("metrics.jsonl", "breakdown.jsonl")


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


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Adds values to sums of the same names, in place."""
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


def _averaged(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums that, if each process has them, come to the same together as its own."""
    return {name: distributed.mean(value) for name, value in sums.items()}


def _on(device: torch.device | str, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in sums.items()}


class EpochMeter:
    """Means over all steps since the last reading; subscribes to an environment."""

    def __init__(self, teachers: Sequence[str]) -> None:
        self._teachers = teachers
        self._sums: dict[str, Tensor] = {}
        self.steps = 0

    def __call__(self, record: StepRecord) -> None:
        """Takes a step into account; nothing leaves the device."""
        _add(self._sums, step_means(record))
        self.steps += 1

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

    def state_dict(self) -> dict[str, Any]:
        """What has been added up since the last reading, by each of several processes."""
        return {"sums": _averaged(self._sums), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Goes on from what `state_dict` gave."""
        self._sums = _on(device, state["sums"])
        self.steps = state["steps"]


class BreakdownMeter:
    """Mean weights by class, and by whether the teacher is right, over the steps of an epoch.

    Subscribes to an environment; nothing leaves the device before it is read.

    Args:
        teachers: Names of the M teachers.
        num_classes: Number of classes C.
        device: Device of the environment.
    """

    def __init__(
        self, teachers: Sequence[str], num_classes: int, device: torch.device | str
    ) -> None:
        self._teachers = list(teachers)
        self._classes = torch.arange(num_classes, device=device)
        self._sums: dict[str, Tensor] = {}

    def __call__(self, record: StepRecord) -> None:
        """Takes a step into account."""
        _add(self._sums, breakdown_sums(record, self._classes))

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

    def state_dict(self) -> dict[str, Any]:
        """What has been added up since the last reading, by each of several processes."""
        return {"sums": _averaged(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Goes on from what `state_dict` gave."""
        self._sums = _on(device, state["sums"])


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
    return {
        "class": members @ weights,
        "class/count": members.sum(1),
        "right": (weights * right).sum(1),
        "right/count": right.sum(0),
        "wrong": (weights * (1 - right)).sum(1),
        "wrong/count": (1 - right).sum(0),
    }


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


@torch.no_grad()
def watched_terms(record: StepRecord) -> dict[str, Tensor]:
    """What has to be finite in a step, as columns (B, ...), causes before what they bring about."""
    return {
        "loss/cross_entropy": record.losses.cross_entropy.unsqueeze(1),
        "loss/kd": record.losses.kd,
        "loss/feature": record.losses.feature,
        "weights/logit": record.weights.logit,
        "weights/feature": record.weights.feature,
        "loss/total": record.losses.total.unsqueeze(1),
        "teacher_rewards": record.rewards.teacher,
        "reward": record.rewards.scalar.unsqueeze(1),
    }


class FiniteWatch:
    """Finds the first step in which a loss, a weight or a reward is NaN or infinite.

    Subscribes to an environment; the host waits for the device only every so many steps.

    Args:
        window: Steps between two checks.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        # Of every step since the last check: its number, what is finite (B, K), and the samples.
        self._steps: list[tuple[int, Tensor, Tensor]] = []
        self._widths: dict[str, int] = {}

    def __call__(self, record: StepRecord) -> None:
        """Takes a step into account.

        Raises:
            FloatingPointError: See `check`.
        """
        terms = watched_terms(record)
        self._widths = {name: values.shape[1] for name, values in terms.items()}
        finite = torch.cat([values.float() for values in terms.values()], dim=1).isfinite()
        self._steps.append((record.step + 1, finite, record.index))
        if len(self._steps) == self._window:
            self.check()

    def check(self) -> None:
        """Looks at the steps since the last check.

        Raises:
            FloatingPointError: In one of them something was NaN or infinite. Names the steps that
                were looked at, the first bad one, the terms, and the samples' positions in the
                training split.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        fine = torch.stack([finite.all() for _, finite, _ in steps]).tolist()
        if all(fine):
            return
        number, finite, index = steps[fine.index(False)]
        samples = index[~finite.all(1)].tolist()
        raise FloatingPointError(
            f"{', '.join(self._bad_terms(finite))} became NaN or infinite in step {number} (of "
            f"steps {steps[0][0]} to {steps[-1][0]}, the first) for {_some(samples)} of "
            f"{len(index)} samples; {HINT}"
        )

    def _bad_terms(self, finite: Tensor) -> list[str]:
        columns = finite.all(0).split(list(self._widths.values()))
        pairs = zip(self._widths, columns, strict=True)
        return [name for name, fine in pairs if not bool(fine.all())]


def _some(samples: Sequence[int]) -> str:
    """`sample 3, 17, 24 and 5 more`."""
    named = ", ".join(str(sample) for sample in samples[:NAMED])
    more = len(samples) - NAMED
    return f"sample {named} and {more} more" if more > 0 else f"sample {named}"


@torch.no_grad()
def check_module(module: nn.Module, steps: int, hint: str = HINT) -> None:
    """Checks parameters and running statistics.

    Args:
        module: The student and what it is trained with.
        steps: SGD steps so far, for the message.
        hint: What may help, for the message.

    Raises:
        FloatingPointError: One holds NaN or infinity; names the first.
    """
    tensors = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
    fine = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    for name, good in zip(tensors, fine, strict=True):
        if not good:
            raise FloatingPointError(f"{name} became NaN or infinite by step {steps}; {hint}")


def check_row(row: Mapping[str, Any], steps: int) -> None:
    """Checks a row of metrics.

    Args:
        row: The row.
        steps: SGD steps so far, for the message.

    Raises:
        FloatingPointError: A value is NaN or infinite; names the first.
    """
    for name, value in row.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} became NaN or infinite in epoch {row['epoch']} (up to step {steps}); "
                f"{HINT}"
            )


class MetricsLog:
    """Writes one row an epoch to `metrics.jsonl` and to TensorBoard, and to `breakdown.jsonl`.

    Args:
        folder: The run's folder.
        state: What `state_dict` gave, to go on from there: what was written since then is cut off.
        lines: The files with one line each; the first is that of the rows.
        clock: What in a row says when it was: a whole number that grows from row to row.

    Attributes:
        rows: All rows so far.

    Raises:
        ConfigError: A file is shorter than it was.
        OSError: Something cannot be written; here and in all methods. Names the folder.
    """

    def __init__(
        self,
        folder: Path,
        state: Mapping[str, int] | None = None,
        *,
        lines: Sequence[str] = LINES,
        clock: str = "epoch",
    ) -> None:
        self.folder = folder
        self._lines = lines
        self._clock = clock
        if state is not None:
            for name in lines:
                _cut(folder / name, state[name])
        self._about_folder = partial(named_errors, folder)
        with self._about_folder(), ExitStack() as opened:
            self._files = [
                opened.enter_context((folder / name).open("a", encoding="utf-8")) for name in lines
            ]
            self.rows: list[dict[str, Any]] = read_rows(folder, lines[0])
            purged = self.rows[-1][clock] + 1 if self.rows else 1
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purged)
            opened.callback(self._writer.close)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._about_folder():
            self._opened.close()

    def state_dict(self) -> dict[str, int]:
        """The sizes [bytes] of the files, all of which is then on disk."""
        with self._about_folder():
            self._writer.flush()
            for name in self._lines:
                sync(self.folder / name)
        return {name: (self.folder / name).stat().st_size for name in self._lines}

    def write(self, row: dict[str, Any]) -> None:
        """One row; epochs count from 1."""
        self.rows.append(row)
        with self._about_folder():
            self._write_line(self._files[0], row)
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, row[self._clock])

    def _write_line(self, file: IO[str], values: dict[str, Any]) -> None:
        file.write(json.dumps(values) + "\n")
        file.flush()

    def write_breakdown(self, breakdown: dict[str, Any]) -> None:
        """What the mean weights of one epoch are made of."""
        with self._about_folder():
            self._write_line(self._files[1], breakdown)

    def write_pictures(self, name: str, pictures: Tensor, when: int) -> None:
        """Pictures (N, 3, H, W), uint8, for TensorBoard alone."""
        with self._about_folder():
            self._writer.add_images(name, pictures, when)


class RowsAlone(MetricsLog):
    """Keeps rows and writes nothing: for processes beside the one that does.

    Args:
        folder: The run's folder.
        rows: All rows so far.
    """

    def __init__(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.rows = rows

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is open."""

    def state_dict(self) -> dict[str, int]:
        """Nothing is on disk."""
        return {}

    def write(self, row: dict[str, Any]) -> None:
        """Keeps a row."""
        self.rows.append(row)

    def write_breakdown(self, breakdown: dict[str, Any]) -> None:
        """Does nothing."""

    def write_pictures(self, name: str, pictures: Tensor, when: int) -> None:
        """Does nothing."""


def _cut(path: Path, size: int) -> None:
    """Shortens a file to a size that it has had."""
    found = path.stat().st_size if path.is_file() else 0
    if found < size:
        raise ConfigError(f"{path}: expected at least {size} bytes, found {found}")
    os.truncate(path, size)


def read_rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of one of a run's files, one an epoch."""
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
