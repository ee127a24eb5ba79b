import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import run, train_teachers

POOL = """
teachers:
  - {network: resnet8, width: 0.125}
  - {network: resnet8, width: 0.125, kind: permuted}
  - {network: resnet8, width: 0.125, kind: random}
recipe: {epochs: 2}
batch_size: 32
"""

Start = Callable[..., int]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts the program with few images, a small pool, and a cache of its own."""
    pool = tmp_path / "pool.yaml"
    pool.write_text(POOL, encoding="utf-8")
    flags = ["--teachers", str(pool), "--data.train_size", "64", "--device", "cpu"]
    folders = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "runs")]
    return lambda *others: train_teachers.main([*flags, *folders, *others])


def checkpoints(folder: Path) -> dict[str, int]:
    """When each file of the cache was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("cache/teachers/*/*")}


def test_teachers_are_trained_once(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start() == 0
    shown = capsys.readouterr().out
    for name in ("resnet8", "resnet8-permuted"):
        assert f"trained teacher {name}: 2 epochs, loss" in shown
    assert "trained teacher resnet8-random" not in shown
    kept = checkpoints(tmp_path)
    assert sorted(name.rpartition("-")[0] for name in kept) == ["resnet8", "resnet8-permuted"]
    assert f"kept in {tmp_path / 'cache' / 'teachers'}" in shown
    assert start() == 0
    again = capsys.readouterr().out
    assert "trained teacher" not in again
    assert checkpoints(tmp_path) == kept
    # The table is the same, whether they were trained or found.
    assert again[again.index("Teachers") :] == shown[shown.index("Teachers") :]
    assert "resnet8-random" in again


def test_runs_with_the_same_flags_find_them(
    start: Start,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert start() == 0
    kept = checkpoints(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(train_teachers, "main", run.main)
    flags = ["--algo", "aver", "--optimizer.epochs", "1", "--student.width", "0.125"]
    assert start(*flags, "--seed", "9", "--data.batch_size", "16") == 0
    assert "trained teacher" not in capsys.readouterr().out
    assert checkpoints(tmp_path) == kept


def test_other_images_need_other_teachers(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start() == 0
    kept = checkpoints(tmp_path)
    assert start("--data.train_size", "65") == 0
    assert "trained teacher" in capsys.readouterr().out
    assert checkpoints(tmp_path).items() > kept.items()


def test_losses_go_to_tensorboard(start: Start, tmp_path: Path) -> None:
    assert start() == 0
    events = EventAccumulator(str(tmp_path / "runs" / "teachers" / "tensorboard")).Reload()
    expected = {"resnet8/cross_entropy", "resnet8-permuted/cross_entropy"}
    assert set(events.Tags()["scalars"]) == expected
    assert [event.step for event in events.Scalars("resnet8/cross_entropy")] == [1, 2]


def test_mistakes_are_told_in_one_line(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "--data.dataset digit": "did you mean 'digits'?",
        "--teachers.recipe.epochs 0": "epochs: expected at least 1",
        "--teachers.recipe.epoch 1": "did you mean '--teachers.recipe.epochs'?",
        "--device cuda:99": "device: cannot use 'cuda:99'",
    }
    for flags, message in cases.items():
        assert start(*flags.split()) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert shown.count("\n") == 1
        assert message in shown


def test_an_interrupted_training_goes_on_where_it_was(
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = train_teachers.ConsoleProgress.teacher

    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as during:
        during.setattr(train_teachers.ConsoleProgress, "teacher", interrupt)
        assert start() == 130
    expected = "stopped after step 2; to go on, ask for the same teachers again\n"
    assert capsys.readouterr().err.endswith(expected)
    (kept,) = checkpoints(tmp_path)
    assert kept.endswith(".checkpoints")
    epochs: list[tuple[str, int]] = []

    def note(self: Any, name: str, epoch: int, total: int, loss: float) -> None:
        epochs.append((name, epoch))
        report(self, name, epoch, total, loss)

    monkeypatch.setattr(train_teachers.ConsoleProgress, "teacher", note)
    assert start() == 0
    assert epochs == [("resnet8", 2), ("resnet8-permuted", 1), ("resnet8-permuted", 2)]
    assert all(name.endswith(".pt") for name in checkpoints(tmp_path))
