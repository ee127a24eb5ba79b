"""Tables, numbers and the picture of how well rewards agree with what teachers are worth."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich.table import Table

from experiments.benchmarks.base import Outcome
from experiments.benchmarks.usefulness import TERMS, TRUTHS
from experiments.config import ExperimentConfig
from experiments.console import plain_table
from experiments.drawing import drawn, picture

# What the picture shows: the others are the student's own training images.
DRAWN = "held-out"

MEANING = {"sample": "the sample", "batch": "its batch", "held-out": "held-out images"}


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
    """

    pool: str
    epoch: int
    teachers: int
    samples: int
    accuracy: float
    constant: dict[str, dict[str, float]]

    @property
    def chance(self) -> float:
        """Share of the best teachers that is found by drawing one."""
        return 1 / self.teachers


@dataclass(frozen=True)
class Agreement:
    """How well one reward agrees with one truth at one point of a student's training.

    Attributes:
        pool: Name of the pool of teachers.
        epoch: Epochs of training.
        term: `logit` (KL) or `feature`.
        truth: Whose cross-entropy is to fall.
        reward: Name of the reward.
        timing: Whether it is of the student before or after its step.
        best: Share of the samples whose best teacher is the one with the highest reward.
        tau: Kendall's τ-b over the teachers, mean over the samples.
        silent: Whether it pays all teachers of a sample the same, so that it ranks none.
    """

    pool: str
    epoch: int
    term: str
    truth: str
    reward: str
    timing: str
    best: float
    tau: float
    silent: bool


@dataclass(frozen=True)
class SignalReport:
    """Agreements of several rewards at several points, and how to show them.

    Attributes:
        points: The points.
        agreements: The agreements at each of them.
        configs: Configuration of student and teachers, by the name of the pool.
        held_out: Name of the split that images are held out in.
    """

    points: Sequence[TrainingPoint]
    agreements: Sequence[Agreement]
    configs: Mapping[str, ExperimentConfig]
    held_out: str

    def outcome(self) -> Outcome:
        """Tables, notes, numbers and picture."""
        tables = [self._table(truth) for truth in TRUTHS]
        return Outcome(tables, self._notes(), self._values(), self._draw)

    def _paid(self, *, silent: bool) -> list[tuple[str, str]]:
        """Rewards and their timing: those that rank no teachers, or all others."""
        pairs = [(one.reward, one.timing) for one in self.agreements]
        speak = {(one.reward, one.timing) for one in self.agreements if not one.silent}
        return [pair for pair in dict.fromkeys(pairs) if (pair not in speak) == silent]

    def _select(
        self, point: TrainingPoint, term: str, truth: str
    ) -> dict[tuple[str, str], Agreement]:
        place = point.pool, point.epoch, term, truth
        return {
            (one.reward, one.timing): one
            for one in self.agreements
            if (one.pool, one.epoch, one.term, one.truth) == place
        }

    def _table(self, truth: str) -> Table:
        title = f"Best teacher found [%], and Kendall's tau; truth: CE of {MEANING[truth]}"
        paid = self._paid(silent=False)
        headings = ["epoch", "student\n[%]", "chance", "one\nteacher"]
        headings += [f"{reward}\n{timing}" for reward, timing in paid]
        table = plain_table(title, ["pool", "term"], headings)
        for _, term, rows in self._groups():
            for point in rows:
                found = self._select(point, term, truth)
                shares = point.accuracy, point.chance, point.constant[term][truth]
                cells = [f"{100 * share:.1f}" for share in shares]
                pairs = [f"{100 * found[one].best:.1f} {found[one].tau:+.2f}" for one in paid]
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
        return {
            "configurations": {pool: config.to_yaml() for pool, config in self.configs.items()},
            "held_out": self.held_out,
            "points": [{**asdict(point), "chance": point.chance} for point in self.points],
            "agreements": [asdict(one) for one in self.agreements],
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
            found = [self._select(point, term, DRAWN)[reward, timing] for point in points]
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
