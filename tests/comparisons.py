"""A comparison small enough for tests, and results without runs."""

from pathlib import Path
from typing import Any

from experiments.comparison.plan import Comparison, Selection, load_comparison
from experiments.experiment import Result

TEACHERS = ("resnet8", "wrn_16_1")

# Teachers and students that take seconds.
BASE = """
title: Trial
baseline: aver
base:
  teachers:
    teachers:
      - {network: resnet8, width: 0.25}
      - {network: wrn_16_1, width: 0.25}
    recipe: {epochs: 1}
  data: {train_size: 64, batch_size: 16}
  student: {network: resnet8, width: 0.125}
  optimizer: {epochs: 2}
  device: cpu
"""


EVERYTHING = Selection()


def load(
    folder: Path, text: str, *flags: str, selection: Selection = EVERYTHING, base: str = BASE
) -> Comparison:
    """The comparison that a text describes; runs are kept in `folder`."""
    path = folder / "trial.yaml"
    path.write_text(base + text, encoding="utf-8")
    return load_comparison(path, flags, selection, folder / "out")


def make_result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "method": changes.get("algo", "pg"),
        "setting": "",
        "metric": "test accuracy",
        "algo": "pg",
        "dataset": "digits",
        "student": "resnet8",
        "seed": 0,
        "epochs": 2,
        "teachers": dict.fromkeys(TEACHERS, 0.9),
        "last": 0.8125,
        "best": 0.875,
        "best_epoch": 1,
        "weights": {"resnet8": 0.75, "wrn_16_1": 0.25},
        "score": 0.5,
        "score_logit": 0.25,
        "score_feature": 0.75,
        "seconds": 10.0,
        "teacher_seconds": 1.0,
        "folder": "runs/somewhere",
        "digests": {},
        "versions": {},
        "skipped": 0,
        "fidelities": {},
    }
    return Result(**(values | changes))
