"""Table, numbers and the picture of how much memory methods take relative to equal weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from experiments.benchmarks.bars import draw_bars
from experiments.benchmarks.base import Outcome
from experiments.benchmarks.timing import (
    HIGH,
    LOW,
    Percentiles,
    describe_machine,
    ratio_percentiles,
)
from experiments.benchmarks.timing_report import REFERENCE, ratio_cells
from experiments.config import ExperimentConfig
from experiments.console import plain_table

# Bytes in every round by name (`before`, `peak`, `history`), by method.
Peaks = dict[str, list[dict[str, int]]]

TITLE = f"Peak memory of a training, as a ratio to {REFERENCE}"

MEGA = 1e6

ON_HOST = (
    "peak: resident memory of the whole process, libraries included; where the system cannot "
    "forget an earlier peak (anywhere but on Linux), that of loading the teachers too"
)
ON_DEVICE = "peak: tensors on the device"


@dataclass(frozen=True)
class MemoryReport:
    """Peaks of several methods, and how to show them.

    Attributes:
        peaks: The peaks; those of `REFERENCE` among them.
        epochs: Epochs of every training after the warm-up.
        config: Configuration of the reference.
        device: Where the students were trained.
    """

    peaks: Peaks
    epochs: int
    config: ExperimentConfig
    device: torch.device

    def outcome(self) -> Outcome:
        """Table, notes, numbers and picture."""
        return Outcome([self._table()], self._notes(), self._values(), self._draw)

    def _ratios(self) -> dict[str, Percentiles]:
        """Every method's peak over the reference's of the same round."""
        return ratio_percentiles(self.peaks, REFERENCE, "peak")

    def _table(self) -> Table:
        sizes = ["peak\nMB", "training\nMB", "history\nMB"]
        table = plain_table(TITLE, ["method"], ["ratio", f"{LOW}-{HIGH} %", *sizes])
        ratios = self._ratios()
        for name, found in self.peaks.items():
            medians = self._medians(found)
            sizes = [f"{medians[kind] / MEGA:.2f}" for kind in ("peak", "training", "history")]
            table.add_row(name, *ratio_cells(ratios[name]), *sizes)
        return table

    def _medians(self, found: Sequence[Mapping[str, int]]) -> dict[str, float]:
        """Bytes by name; `training` is what came on top of images, teachers and student."""
        counted = [{**one, "training": one["peak"] - one["before"]} for one in found]
        return {kind: Percentiles.of([one[kind] for one in counted]).median for kind in counted[0]}

    def _notes(self) -> list[str]:
        return [
            f"{self._rounds} processes a method, in turns; each a warm-up and {self.epochs} "
            "epochs, without evaluations",
            ON_DEVICE if self.device.type == "cuda" else ON_HOST,
            "training: the part of it that came on top of images, teachers and student",
            "history: the most that the agent kept to learn from; a replay buffer counts whole, "
            "of which the peak has only what was filled",
        ]

    @property
    def _rounds(self) -> int:
        return len(self.peaks[REFERENCE])

    def _values(self) -> dict[str, Any]:
        return {
            "title": TITLE,
            "reference": REFERENCE,
            "rounds": self._rounds,
            "epochs": self.epochs,
            "machine": describe_machine(self.device),
            "configuration": self.config.to_yaml(),
            "methods": {
                name: {
                    "ratio": asdict(self._ratios()[name]),
                    "bytes": self._medians(found),
                    "bytes_by_round": found,
                }
                for name, found in self.peaks.items()
            },
        }

    def _draw(self, path: Path) -> None:
        draw_bars(path, self._ratios(), title=TITLE, label=f"peak / {REFERENCE}'s")
