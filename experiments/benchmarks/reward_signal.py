"""Does a reward pay for the teachers that truly help? At several points of a student's training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from rich.table import Table
from torch import Tensor

from experiments.benchmarks.base import Outcome, Request
from experiments.benchmarks.usefulness import (
    TERMS,
    TRUTHS,
    by_term,
    finds_best,
    kendall,
    most_frequent_share,
    usefulness,
)
from experiments.config import CONFIGS, ExperimentConfig, parse_arguments
from experiments.console import plain_table
from experiments.drawing import drawn, picture
from mtkd_env import MTKDVectorEnv
from mtkd_env.env import CHOICES
from mtkd_env.errors import ConfigError, check_name
from mtkd_env.reward import REWARDS, RewardFunction, make_reward
from mtkd_env.types import Batch, TeacherWeights

# Who trains the student; which samples are easy, and so what helps them, depends on it.
TRAINER = "aver"

# The pool that is there unless another one is named, as against those that are broken on purpose.
CLEAN = "clean"
NAMED = "configured"

# What the picture shows: the others are the student's own training images.
DRAWN = "held-out"

MEANING = {"sample": "the sample", "batch": "its batch", "held-out": "held-out images"}

# A reward and whether it is of the student before or after its step.
Paid = tuple[str, str]


@dataclass(frozen=True)
class Agreement:
    """How well one reward agrees with one truth at one point of a student's training.

    Attributes:
        best: Share of the samples whose best teacher is the one with the highest reward.
        tau: Kendall's τ-b over the teachers, mean over the samples.
        silent: Whether it pays all teachers of a sample the same, so that it ranks none.
    """

    best: float
    tau: float
    silent: bool


@dataclass(frozen=True)
class TrainingPoint:
    """A point of a student's training.

    Attributes:
        pool: Name of the pool of teachers.
        epoch: Epochs of training.
        teachers: M.
        samples: Samples that were looked at.
        accuracy: Accuracy of the student on the images that were held out.
        constant: Share of the samples whose best teacher is the one that is best most often, by
            term and truth: what an agent could reach that always takes the same teacher.
        agreements: Of every reward with every truth, by term (`logit`, the KL, or `feature`), truth
            (whose cross-entropy is to fall) and what is paid.
    """

    pool: str
    epoch: int
    teachers: int
    samples: int
    accuracy: float
    constant: dict[str, dict[str, float]]
    agreements: Mapping[tuple[str, str, Paid], Agreement]

    @property
    def chance(self) -> float:
        """Share of the best teachers that is found by drawing one."""
        return 1 / self.teachers


def pools(request: Request) -> dict[str, list[str]]:
    """Flags that select every pool: the configured one; unless the user named it, others too.

    Those are the files `configs/pool/DATASET_*.yaml`.
    """
    config = request.configs([TRAINER])[TRAINER]
    if config.teachers != parse_arguments([])[0].teachers:
        return {NAMED: []}
    prefix = f"{config.data.dataset}_"
    shipped = sorted(CONFIGS.glob(f"pool/{prefix}*.yaml"))
    others = {path.stem.removeprefix(prefix): ["--teachers", str(path)] for path in shipped}
    return {CLEAN: [], **others}


def measure(request: Request) -> Outcome:
    """Compares every reward with the true first-order usefulness of the teachers.

    Raises:
        ConfigError: An unknown reward, a point after the end of the training, a single teacher,
            more batches than an epoch has.
    """
    rewards = list(dict.fromkeys(request.methods or REWARDS))
    for reward in rewards:
        check_name(REWARDS, reward, "reward")
    configs = {
        name: request.configs([TRAINER], *flags)[TRAINER] for name, flags in pools(request).items()
    }
    for name, config in configs.items():
        _check(name, config, request.epochs)
    points: list[TrainingPoint] = []
    for name, config in configs.items():
        env = request.build(config).env
        env.reset(seed=config.seed)
        held_out = "val" if "val" in env.splits else "test"
        points.extend(training_points(request, env, held_out, name, rewards))
    return SignalReport(points, configs, held_out).outcome()


def _check(name: str, config: ExperimentConfig, epochs: Sequence[int]) -> None:
    if len(config.teachers.asked) < 2:
        raise ConfigError(f"teachers: the pool '{name}' has one teacher, and nothing to rank")
    if epochs[-1] >= config.optimizer.epochs:
        raise ConfigError(
            f"--epochs: expected less than optimizer.epochs = {config.optimizer.epochs}, "
            f"got {epochs[-1]}"
        )


def training_points(
    request: Request, env: MTKDVectorEnv, held_out: str, pool: str, rewards: Sequence[str]
) -> Iterator[TrainingPoint]:
    """Looks at a student while it learns under equal weights: at the batches after some epochs.

    Args:
        request: What was asked for.
        env: The student and its teachers, at the beginning.
        held_out: Name of the split that images are held out in.
        pool: Name of the pool.
        rewards: Names of the rewards.
    """
    if request.rounds > env.steps_per_epoch:
        raise ConfigError(
            f"--rounds: expected at most the {env.steps_per_epoch} batches of an epoch, "
            f"got {request.rounds}"
        )
    images: Batch = next(iter(env.splits[held_out]()))
    paying: dict[Paid, RewardFunction] = {
        (name, timing): make_reward(name, env.distiller, timing=timing)
        for name, timing in product(rewards, CHOICES["reward_timing"])
    }
    for epoch in request.count(request.epochs, f"{pool}: points of the training"):
        while env.steps < epoch * env.steps_per_epoch:
            env.distill(TeacherWeights.uniform(env.state.divergence))
        accuracy = env.evaluate(held_out).accuracy
        looks = [look(env, paying, images) for _ in range(request.rounds)]
        truths = {
            truth: by_term(torch.cat([known[truth] for known, _ in looks])) for truth in TRUTHS
        }
        credits = {paid: torch.cat([given[paid] for _, given in looks]) for paid in paying}
        yield TrainingPoint(
            pool=pool,
            epoch=epoch,
            teachers=len(env.teacher_names),
            samples=request.rounds * env.num_envs,
            accuracy=accuracy,
            constant={
                term: {truth: most_frequent_share(truths[truth][term]) for truth in TRUTHS}
                for term in TERMS
            },
            agreements={
                (term, truth, paid): agreement(credits[paid], truths[truth][term])
                for truth, paid, term in product(TRUTHS, credits, TERMS)
            },
        )


def agreement(credit: Tensor, useful: Tensor) -> Agreement:
    """How well a reward (B, M) agrees with what teachers are worth (B, M)."""
    return Agreement(
        best=float(finds_best(credit, useful).mean()),
        tau=float(kendall(credit, useful).mean()),
        silent=bool((credit == credit[:, :1]).all()),
    )


def look(
    env: MTKDVectorEnv, rewards: Mapping[Paid, RewardFunction], held_out: Batch
) -> tuple[dict[str, Tensor], dict[Paid, Tensor]]:
    """What the teachers are worth on the batch that waits, and what each reward pays them for it.

    The student makes its step on the batch, under equal weights.

    Returns:
        Truth → usefulness (B, 2·M), and reward → advantages (B, M).
    """
    state = env.state
    known = usefulness(env.distiller, state, held_out)
    weights = TeacherWeights.uniform(state.divergence)
    # Before the step, as an environment does with its own reward.
    seen = {key: reward.observe(state) for key, reward in rewards.items()}
    env.distill(weights)
    updated = env.distiller.revisit(state)
    paid = {key: reward(seen[key], weights, updated).advantages for key, reward in rewards.items()}
    return known, paid


@dataclass(frozen=True)
class SignalReport:
    """Agreements of several rewards at several points, and how to show them.

    Attributes:
        points: The points.
        configs: Configuration of student and teachers, by the name of the pool.
        held_out: Name of the split that images are held out in.
    """

    points: Sequence[TrainingPoint]
    configs: Mapping[str, ExperimentConfig]
    held_out: str

    def outcome(self) -> Outcome:
        """Tables, notes, numbers and picture."""
        tables = [self._table(truth) for truth in TRUTHS]
        return Outcome(tables, self._notes(), self._values(), self._draw)

    def _paid(self, *, silent: bool) -> list[Paid]:
        """Rewards and their timing: those that rank no teachers, or all others."""
        found = [pair for point in self.points for pair in point.agreements.items()]
        speak = {paid for (_, _, paid), one in found if not one.silent}
        every = dict.fromkeys(paid for (_, _, paid), _ in found)
        return [paid for paid in every if (paid not in speak) == silent]

    def _table(self, truth: str) -> Table:
        title = f"Best teacher found [%], and Kendall's tau; truth: CE of {MEANING[truth]}"
        paid = self._paid(silent=False)
        headings = ["epoch", "student\n[%]", "chance", "one\nteacher"]
        headings += [f"{reward}\n{timing}" for reward, timing in paid]
        table = plain_table(title, ["pool", "term"], headings)
        for _, term, rows in self._groups():
            for point in rows:
                found = [point.agreements[term, truth, one] for one in paid]
                shares = point.accuracy, point.chance, point.constant[term][truth]
                cells = [f"{100 * share:.1f}" for share in shares]
                pairs = [f"{100 * one.best:.1f} {one.tau:+.2f}" for one in found]
                table.add_row(point.pool, term, str(point.epoch), *cells, *pairs)
            table.add_section()
        return table

    def _groups(self) -> Iterator[tuple[str, str, list[TrainingPoint]]]:
        """Pool, term and the points of the training."""
        for pool, term in product(dict.fromkeys(point.pool for point in self.points), TERMS):
            yield pool, term, [point for point in self.points if point.pool == pool]

    def _notes(self) -> list[str]:
        samples = self.points[0].samples
        chance = self.points[0].chance
        error = 100 * (chance * (1 - chance) / samples) ** 0.5
        silent = dict.fromkeys(reward for reward, _ in self._paid(silent=True))
        notes = [
            "truth: inner product of the gradients of a cross-entropy and of a teacher's term of a "
            "sample, exact; batch norms use the statistics of their batch as constants",
            f"held-out: up to 512 images of the split '{self.held_out}'; the student learns under "
            "equal weights",
            "one teacher: always the one that is best most often, known only in hindsight",
            "tau: 1 the same order of the teachers, 0 no agreement, -1 the opposite order",
            f"{samples} samples a point: at chance, a standard error of at least {error:.1f} %",
        ]
        if silent:
            names = ", ".join(silent)
            notes.append(f"not shown, because they pay all teachers of a sample the same: {names}")
        return notes

    def _values(self) -> dict[str, Any]:
        agreements = [
            {"pool": point.pool, "epoch": point.epoch, "term": term, "truth": truth}
            | {"reward": reward, "timing": timing, **asdict(one)}
            for point in self.points
            for (term, truth, (reward, timing)), one in point.agreements.items()
        ]
        points = [{**vars(point), "chance": point.chance} for point in self.points]
        for point in points:
            del point["agreements"]
        return {
            "configurations": {pool: config.to_yaml() for pool, config in self.configs.items()},
            "held_out": self.held_out,
            "points": points,
            "agreements": agreements,
        }

    def _draw(self, path: Path) -> None:
        groups = list(self._groups())
        columns = len(groups) // len(TERMS)
        with picture(path, (1.5 + 4.2 * columns, 6.5)) as figure:
            panels = figure.subplots(len(TERMS), columns, sharey=True, squeeze=False)
            for place, (pool, term, points) in enumerate(groups):
                axes = panels[place % len(TERMS)][place // len(TERMS)]
                self._draw_panel(axes, term, points)
                axes.set_title(f"{drawn(pool)} pool, {term} term")
            for row in panels:
                row[0].set_ylabel("best teacher found [%]")
            handles, labels = panels[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
            figure.suptitle(f"Does a reward find the best teacher? Truth: CE of {MEANING[DRAWN]}")

    def _draw_panel(self, axes: Axes, term: str, points: Sequence[TrainingPoint]) -> None:
        paid = self._paid(silent=False)
        names = list(dict.fromkeys(reward for reward, _ in paid))
        places, width = np.arange(len(points)), 0.8 / max(1, len(paid))
        for number, (reward, timing) in enumerate(paid):
            found = [point.agreements[term, DRAWN, (reward, timing)] for point in points]
            axes.bar(
                places + width * (number - (len(paid) - 1) / 2),
                [100 * one.best for one in found],
                width,
                color=f"C{names.index(reward)}",
                alpha=1.0 if timing == "before" else 0.5,
                label=f"{reward}, {timing} the step",
            )
        constant = [100 * point.constant[term][DRAWN] for point in points]
        left, right = places - 0.4, places + 0.4
        axes.hlines(constant, left, right, "black", "--", label="always the same teacher")
        axes.axhline(100 * points[0].chance, color="grey", linestyle=":", label="chance")
        axes.set_xticks(places, [str(point.epoch) for point in points])
        axes.set_xlabel("epochs of training")
        axes.grid(axis="y", alpha=0.3)
