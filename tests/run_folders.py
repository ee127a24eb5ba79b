"""Folders of runs as runs leave them, written by hand."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from comparisons import TEACHERS, make_result
from experiments.config import parse_arguments
from experiments.gallery import Gallery, write_gallery
from experiments.running.log import read_rows

CLASSES, IMAGES = 3, 4


def write_run(
    folder: Path,
    *flags: str,
    accuracies: tuple[float, ...] = (0.25, 0.5),
    recorded: bool = False,
    weights: dict[str, float] | None = None,
    **changes: Any,
) -> None:
    """A finished run.

    Args:
        folder: Its folder.
        flags: Its configuration, as flags of mtkd run.
        accuracies: Test accuracy of every epoch.
        recorded: Whether it has a breakdown, a gallery and coefficients of the fusion.
        weights: Mean weights in every epoch.
        changes: Other entries of the result.
    """
    folder.mkdir(parents=True)
    (config,) = parse_arguments(flags)
    shares = weights or {TEACHERS[0]: 0.75, TEACHERS[1]: 0.25}
    values = {
        "algo": config.algo,
        "method": config.method or changes.get("algo", config.algo),
        "setting": config.setting,
        "seed": config.seed,
        "epochs": len(accuracies),
        "last": accuracies[-1],
        "best": max(accuracies),
        "weights": shares,
        "teachers": shares,
        "versions": {"torch": "2"},
    }
    result = make_result(**values | changes)
    rows = [_row(i + 1, accuracy, shares, result.score) for i, accuracy in enumerate(accuracies)]
    if recorded:
        rows = [row | _coefficients(row["epoch"]) for row in rows]
        rows = [row | {"agent/updates": 10 * row["epoch"] if result.score else 0} for row in rows]
        _write_lines(folder / "breakdown.jsonl", [breakdown(list(shares))])
        write_gallery(gallery(len(shares)), folder)
    _write_lines(folder / "metrics.jsonl", rows)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    change_config(folder, algo=result.algo)
    (folder / "result.json").write_text(json.dumps(asdict(result)), encoding="utf-8")


def comparable(folder: Path) -> list[dict[str, Any]]:
    """What a run says of its epochs, but for the time that they took."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(folder)]


def change_config(folder: Path, **changes: Any) -> None:
    """Adds keys to the configuration of a run."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) | changes
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _row(epoch: int, accuracy: float, shares: dict[str, float], score: float) -> dict[str, Any]:
    weights = {
        f"weights/{head}/{name}": share
        for head in ("logit", "feature")
        for name, share in shares.items()
    }
    return {"epoch": epoch, "test/accuracy": accuracy, "score": score, **weights}


def _coefficients(epoch: int) -> dict[str, float]:
    return {
        f"fusion/{head}/{part}": value
        for head in ("logit", "feature")
        for part, value in zip(
            ("generator", "confidence", "divergence"),
            (epoch / 10, 0.5, 0.5 - epoch / 10),
            strict=True,
        )
    }


def breakdown(teachers: list[str]) -> dict[str, Any]:
    """The first teacher is always right; the last class has no images."""
    count = len(teachers)
    by_class = [[0.5 + 0.1 * c - 0.2 * m for m in range(count)] for c in range(CLASSES - 1)]
    by_class.append([None] * count)
    right = {"count": [4] + [3] * (count - 1), "logit": [0.75] * count, "feature": [0.625] * count}
    wrong = {
        "count": [0] + [1] * (count - 1),
        "logit": [None] + [0.125] * (count - 1),
        "feature": [None] + [0.0625] * (count - 1),
    }
    return {
        "epoch": 2,
        "teachers": teachers,
        "class": {"count": [2, 2, 0], "logit": by_class, "feature": by_class},
        "right": right,
        "wrong": wrong,
        "classes": [f"class {n}" for n in range(CLASSES)],
        "accuracy": {
            "count": [2, 2, 0],
            "student": [0.5, 1.0, None],
            "teachers": [[1.0, 0.0, None]] * count,
        },
    }


def gallery(teachers: int, channels: int = 1) -> Gallery:
    """Images with weights; on the third the last teacher is wrong."""
    draw = np.random.default_rng(0)
    weights = draw.dirichlet(np.ones(teachers), IMAGES).astype(np.float32)
    correct = np.ones((IMAGES, teachers), dtype=bool)
    correct[2, -1] = False
    return Gallery(
        images=draw.integers(0, 256, (IMAGES, channels, 8, 8), dtype=np.uint8),
        index=np.array([7, 5, 3, 1]),
        targets=np.array([0, 1, 2, 0]),
        logit=weights,
        feature=weights[::-1].copy(),
        correct=correct,
        names=np.array(["0", "1", "2", "0"]),
    )
