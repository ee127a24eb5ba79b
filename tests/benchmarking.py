"""Benchmarks of seconds: the main program with a small configuration, and images already there."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import benchmark
from experiments.config import ExperimentConfig, parse_arguments
from mtkd_env import Assembly
from mtkd_env.teachers import TeacherPool
from sketches import pictures
from tiny import make_tiny_env, training_set

TEACHERS = [
    {"network": "resnet8", "width": 0.125, "kind": "random"},
    {"network": "wrn_16_1", "width": 0.125, "kind": "random"},
]

STEPS_PER_EPOCH = 2

SMALL = (
    *("--teachers", json.dumps({"teachers": TEACHERS})),
    *("--data.train_size", "32", "--data.batch_size", "16"),
    *("--student.width", "0.125", "--device", "cpu"),
)


def start(what: str, *flags: str) -> int:
    """Runs the main program, which draws; gives its exit code."""
    with pictures():
        return benchmark.main(["--what", what, *SMALL, *flags])


def config_of(algo: str, *flags: str) -> ExperimentConfig:
    return parse_arguments([*SMALL, "--algo", algo, *flags])[0]


def tiny_assembly() -> Assembly:
    env = make_tiny_env()
    return Assembly(env, training_set(), TeacherPool(env.distiller.teachers, {}, {}))


def read(path: Path) -> dict[str, Any]:
    """The JSON file of a benchmark, beside which there is a picture."""
    assert path.with_suffix(".png").stat().st_size > 10_000
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def one_line_error(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error
