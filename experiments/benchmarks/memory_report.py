"""Table, numbers and the picture of how much memory methods take relative to equal weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch

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


def memory_report(
    peaks: Peaks, epochs: int, config: ExperimentConfig, device: torch.device
) -> Outcome:
    """Table, notes, numbers and picture.

    Args:
        peaks: Peaks of several methods; those of `REFERENCE` among them.
        epochs: Epochs of every training after the warm-up.
        config: Configuration of the reference.
        device: Where the students were trained.
    """
    ratios = ratio_percentiles(peaks, REFERENCE, "peak")
    medians = {name: _medians(found) for name, found in peaks.items()}
    rounds = len(peaks[REFERENCE])
    sizes = ("peak", "training", "history")
    headings = ["ratio", f"{LOW}-{HIGH} %", *(f"{kind}\nMB" for kind in sizes)]
    table = plain_table(TITLE, ["method"], headings)
    for name, own in medians.items():
        texts = [f"{own[kind] / MEGA:.2f}" for kind in sizes]
        table.add_row(name, *ratio_cells(ratios[name]), *texts)
    notes = [
        f"{rounds} processes a method, in turns; each a warm-up and {epochs} epochs, without "
        "evaluations",
        ON_DEVICE if device.type == "cuda" else ON_HOST,
        "training: the part of it that came on top of images, teachers and student",
        "history: the most that the agent kept to learn from; a replay buffer counts whole, "
        "of which the peak has only what was filled",
    ]
    methods = {
        name: {"ratio": asdict(ratios[name]), "bytes": own, "bytes_by_round": peaks[name]}
        for name, own in medians.items()
    }
    values = {
        "title": TITLE,
        "reference": REFERENCE,
        "rounds": rounds,
        "epochs": epochs,
        "machine": describe_machine(device),
        "configuration": config.to_yaml(),
        "methods": methods,
    }
    draw = partial(draw_bars, spreads=ratios, title=TITLE, label=f"peak / {REFERENCE}'s")
    return Outcome([table], notes, values, draw)


def _medians(found: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Bytes by name; `training` is what came on top of images, teachers and student."""
    counted = [{**one, "training": one["peak"] - one["before"]} for one in found]
    return {kind: Percentiles.of([one[kind] for one in counted]).median for kind in counted[0]}
