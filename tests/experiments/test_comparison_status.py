import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from comparisons import load, make_result
from experiments import compare
from experiments.comparison.plan import Comparison, PlannedRun
from experiments.comparison.status import State, print_status, run_status
from experiments.console import console
from experiments.running.lock import run_lock
from mtkd_env.files import write_text

FIVE = "methods: {aver: {}, pg: {}, camkd: {}, none: {}, ebkd: {}}\n"


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return load(tmp_path, FIVE)


@pytest.fixture
def runs(comparison: Comparison) -> dict[str, PlannedRun]:
    return {run.method: run for run in comparison.runs}


def write_epochs(run: PlannedRun, epochs: int, *, age: float = 0.0) -> None:
    """What a run has told so far, the last of it so many seconds ago."""
    rows = [{"epoch": epoch, "test/accuracy": 0.25 * epoch} for epoch in range(1, epochs + 1)]
    path = run.folder / "metrics.jsonl"
    # The last line is being written.
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows) + '{"epo')
    told = time.time() - age
    os.utime(path, (told, told))


def finish(run: PlannedRun) -> None:
    write_text(run.folder / "result.json", json.dumps(asdict(make_result(algo=run.method))))


def fail(run: PlannedRun) -> None:
    write_text(run.folder / "error.txt", "loss became [NaN]\n\nTraceback ...\n")


def test_a_run_that_was_never_begun_waits(runs: dict[str, PlannedRun]) -> None:
    status = run_status(runs["aver"], time.time())
    assert (status.state, status.progress, status.silence) == (State.WAITING, "", None)


def test_a_run_that_was_interrupted_waits_with_what_it_has(runs: dict[str, PlannedRun]) -> None:
    run = runs["aver"]
    write_epochs(run, 1)
    os.utime(run.folder / "metrics.jsonl", (1000.0, 1000.0))
    status = run_status(run, 1090.0)
    assert (status.state, status.silence) == (State.WAITING, 90.0)
    assert status.progress == "epoch 1/2  25.00%"


def test_a_run_runs_while_a_process_has_its_lock(runs: dict[str, PlannedRun]) -> None:
    run = runs["aver"]
    run.folder.mkdir(parents=True)
    with run_lock(run.folder):
        assert run_status(run, time.time()).state is State.RUNNING
    assert run_status(run, time.time()).state is State.WAITING


def test_a_failed_run_says_why_until_it_is_finished(runs: dict[str, PlannedRun]) -> None:
    run = runs["aver"]
    fail(run)
    status = run_status(run, time.time())
    assert (status.state, status.error) == (State.FAILED, "loss became [NaN]")
    finish(run)
    assert run_status(run, time.time()).state is State.DONE


def test_the_status_counts_all_runs_and_shows_those_that_were_begun(
    comparison: Comparison, runs: dict[str, PlannedRun]
) -> None:
    finish(runs["aver"])
    fail(runs["pg"])
    write_epochs(runs["camkd"], 1, age=3600)
    write_epochs(runs["none"], 2)
    out = console(width=100, record=True)
    with run_lock(runs["none"].folder):
        print_status(out, comparison)
    shown = out.export_text()
    lines = {line.split("seed")[0].strip(): line for line in shown.splitlines() if "seed 0" in line}
    assert list(lines) == ["pg", "camkd", "none"]
    assert "failed" in lines["pg"]
    assert "loss became [NaN]" in lines["pg"]
    assert "epoch 1/2  25.00%" in lines["camkd"]
    assert "1:00:0" in lines["camkd"]
    assert "running" in lines["none"]
    assert "Trial: 5 runs: 1 done, 1 running, 1 failed, 2 waiting" in shown


def test_runs_that_were_begun_with_other_flags_are_counted_apart(tmp_path: Path) -> None:
    for run in load(tmp_path, FIVE, "--optimizer.epochs", "7").runs[:2]:
        write_epochs(run, 1)
    out = console(width=100, record=True)
    print_status(out, load(tmp_path, FIVE))
    shown = out.export_text()
    assert "5 runs: 0 done, 0 running, 0 failed, 5 waiting" in shown
    assert "besides, 2 in the same folder that are none of these" in shown


def test_the_status_is_shown_while_the_folder_is_in_use_and_starts_nothing(
    comparison: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del comparison  # Its file is there.
    argv = [str(tmp_path / "trial.yaml"), "--output", str(tmp_path / "out"), "--status"]
    assert compare.main(argv) == 0
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with run_lock(tmp_path / "out"):
        assert compare.main(argv) == 0
    assert "5 runs: 0 done, 0 running, 0 failed, 5 waiting" in capsys.readouterr().out
