import csv
import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from comparisons import BASE, TEACHERS, make_result
from experiments import compare
from experiments.comparison import distillation as comparison_tasks
from experiments.comparison.distillation import Distillation
from experiments.comparison.plan import PlannedRun
from experiments.comparison.progress import Board, duration
from experiments.config import ExperimentConfig, parse_arguments
from experiments.console import console
from experiments.executors import Failure, Task
from experiments.executors.cluster import RunResources
from experiments.experiment import Result, run_experiment
from experiments.running.lock import run_lock
from experiments.running.result import read_result
from experiments.training import Progress
from tasks import Inline

THREE = """
methods:
  aver: {}
  "pg (alignment)": {algo: pg, env: {reward: alignment}}
  none: {}
seeds: [0, 1]
"""

Start = Callable[..., int]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Runs and pools that were begun; they take no time, and a high learning rate fails."""
    seen = SimpleNamespace(runs=[], pools=[], drawn=[], executor=None)

    def run(config: ExperimentConfig, progress: Progress, folder: Path, *, resume: bool) -> None:
        assert isinstance(progress, Progress)
        assert resume
        folder.mkdir(parents=True, exist_ok=True)
        seen.runs.append((config, folder))
        row = {"epoch": 1, "test/accuracy": 0.5}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        if config.optimizer.lr > 1000:
            raise FloatingPointError("loss/total became NaN")
        accuracy = 0.5 + config.seed / 8 + (config.algo == "pg") / 4
        result = make_result(
            algo=config.algo,
            method=config.method,
            setting=config.setting,
            seed=config.seed,
            last=accuracy,
            folder=str(folder),
        )
        (folder / "result.json").write_text(json.dumps(asdict(result)), encoding="utf-8")

    def pool(spec: Any, *_: Any, **arguments: Any) -> None:
        seen.pools.append(spec)
        arguments["progress"](spec.teachers[0].label, 1, 1, 0.5)
        if spec.recipe.lr > 1000:
            raise FloatingPointError("a teacher became NaN")

    def executor(jobs: int, folder: Path) -> Inline:
        seen.executor = Inline(jobs, folder)
        return seen.executor

    def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
        assert rows
        assert (path.parent / "result.json").exists()
        seen.drawn.append((path, title))

    monkeypatch.setattr(comparison_tasks, "run_experiment", run)
    monkeypatch.setattr("experiments.experiment.build_pool", pool)
    monkeypatch.setattr(comparison_tasks, "draw_curves", draw)
    monkeypatch.setattr(compare, "LocalExecutor", executor)
    return seen


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Writes a comparison and starts the main program; results go to `tmp_path / "out"`."""

    def start_it(text: str, *flags: str) -> int:
        path = tmp_path / "trial.yaml"
        path.write_text(BASE + text, encoding="utf-8")
        return compare.main([str(path), "--output", str(tmp_path / "out"), *flags])

    return start_it


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Runs.


def test_every_run_is_done_once_and_kept(
    done: SimpleNamespace, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(THREE) == 0
    assert len(done.runs) == 6
    assert len(done.pools) == 1
    assert done.executor.closed
    out = tmp_path / "out"
    curves = {folder / "curves.png" for _, folder in done.runs}
    assert {path for path, _ in done.drawn} == curves
    assert "pg (alignment) seed 1" in {title for _, title in done.drawn}
    assert {folder.parent for _, folder in done.runs} == {out / "runs"}
    found = {(row["method"], row["seed"]): row for row in rows(out / "runs.csv")}
    assert len(found) == 6
    assert float(found["pg (alignment)", "1"]["last"]) == 0.875
    summary = {row["method"]: row for row in rows(out / "comparison.csv")}
    assert float(summary["pg (alignment)"]["difference_mean"]) == 0.25
    assert (out / "comparison.md").read_text(encoding="utf-8").startswith("# Trial\n")
    shown = capsys.readouterr().out
    assert "[6/6]" in shown
    assert "+25.00" in shown


def test_finished_runs_are_not_run_again(
    done: SimpleNamespace, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(THREE, "--seeds", "0") == 0
    done.runs.clear()
    assert start(THREE, "--seeds", "0,1", "--methods", "aver,none") == 0
    assert [(config.algo, config.seed) for config, _ in done.runs] == [("aver", 1), ("none", 1)]
    done.runs.clear()
    done.pools.clear()
    capsys.readouterr()
    assert start(THREE, "--seeds", "0") == 0
    assert not done.runs
    assert not done.pools
    # What is finished is reported all the same.
    assert "test" in capsys.readouterr().out


def test_a_changed_configuration_is_another_run(done: SimpleNamespace, start: Start) -> None:
    assert start(THREE) == 0
    done.runs.clear()
    changed = THREE.replace("reward: alignment", "reward: aggregate")
    assert start(changed) == 0
    assert {config.algo for config, _ in done.runs} == {"pg"}
    done.runs.clear()
    assert start(changed, "--optimizer.lr", "0.3") == 0
    assert len(done.runs) == 6


def test_an_unfinished_run_finds_what_it_has_left(done: SimpleNamespace, start: Start) -> None:
    assert start(THREE) == 0
    _, folder = done.runs[0]
    (folder / "result.json").unlink()
    (folder / "checkpoints").mkdir()
    (folder / "error.txt").touch()
    done.runs.clear()
    assert start(THREE) == 0
    assert [path for _, path in done.runs] == [folder]
    assert (folder / "checkpoints").exists()
    assert not (folder / "error.txt").exists()


def test_every_pool_of_teachers_is_trained_once(done: SimpleNamespace, start: Start) -> None:
    text = """
methods: {aver: {}, none: {}}
settings:
  a: {}
  b: {data: {batch_size: 8}}
  c: {teachers: {recipe: {epochs: 2}}}
  d: {data: {train_size: 32}}
"""
    assert start(text) == 0
    # The batch size is the student's.
    assert [spec.recipe.epochs for spec in done.pools] == [1, 2, 1]


@pytest.mark.parametrize(("flags", "threads"), [([], None), (["--jobs", "2"], 1)], ids=str)
def test_runs_side_by_side_take_a_thread_each(
    flags: list[str], threads: int | None, done: SimpleNamespace, start: Start
) -> None:
    assert start(THREE, *flags) == 0
    assert {config.threads for config, _ in done.runs} == {threads}
    assert done.executor.jobs == (2 if flags else 1)
    done.runs.clear()
    assert start(THREE, *flags, "--threads", "3", "--seeds", "7") == 0
    assert {config.threads for config, _ in done.runs} == {3}


# What goes wrong.


def test_a_run_that_fails_costs_only_itself(
    done: SimpleNamespace, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = THREE + "paper: {aver: 3}\n"
    text = text.replace("none: {}", "none: {optimizer: {lr: 1e9}}")
    assert start(text) == 1
    assert len(done.runs) == 6
    shown = capsys.readouterr().err.splitlines()
    assert [line.partition(";")[0] for line in shown] == [
        f"failed: none seed {seed}: loss/total became NaN" for seed in (0, 1)
    ]
    failed = [folder for config, folder in done.runs if config.algo == "none"]
    for folder in failed:
        error = (folder / "error.txt").read_text(encoding="utf-8")
        assert error.startswith("loss/total became NaN\n\nTraceback")
    methods = [row["method"] for row in rows(tmp_path / "out" / "comparison.csv")]
    assert methods == ["aver", "pg (alignment)"]
    # And it is tried again.
    done.runs.clear()
    assert start(text) == 1
    assert [folder for _, folder in done.runs] == failed


def test_runs_without_their_teachers_are_not_begun(
    done: SimpleNamespace, start: Start, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = "methods: {aver: {}}\nsettings: {good: {}, bad: {teachers: {recipe: {lr: 1e9}}}}\n"
    assert start(text) == 1
    assert [config.teachers.recipe.lr for config, _ in done.runs] == [0.05]
    assert "failed: aver bad seed 0: teachers bad: a teacher became NaN" in capsys.readouterr().err
    (error,) = (tmp_path / "out").glob("runs/*/error.txt")
    assert error.parent.name.startswith("aver-bad-seed0-")


def test_an_interrupted_comparison_says_how_it_goes_on(
    done: SimpleNamespace,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison_tasks, "run_experiment", interrupted)
    assert start(THREE) == 130
    assert capsys.readouterr().err.startswith("interrupted: the same command goes on")
    assert done.executor.closed


MISTAKES = {
    "unknown method": (["--methods", "avr"], "did you mean 'aver'?"),
    "unknown setting": (["--settings", "a"], "unknown setting 'a'"),
    "word for seeds": (["--seeds", "a"], "--seeds: expected 0,1,2,..., got 'a'"),
    "word for pools": (["--pools", "0,b"], "--pools: expected 0,1,2,..., got '0,b'"),
    "one seed": (["--seed", "1"], "--seed: cannot be given here; see --seeds"),
    "no jobs": (["--jobs", "0"], "--jobs: expected a number >= 1, got 0"),
    "word for jobs": (["--jobs", "x"], "--jobs: expected a number >= 1, got 'x'"),
    "negative retries": (["--retries", "-1"], "--retries: expected a number >= 0, got -1"),
    "unknown executor": (["--executor", "rai"], "unknown --executor 'rai'; did you mean 'ray'?"),
    "cluster of this machine": (
        ["--address", "auto"],
        "--address: means nothing without --executor ray",
    ),
    "share of a GPU": (["--gpus-per-run", "0.5"], "--gpus-per-run: means nothing without"),
    "cores": (["--cpus-per-run", "2"], "--cpus-per-run: means nothing without --executor ray"),
    "unknown flag": (["--optimizer.lrr", "1"], "did you mean '--optimizer.lr'?"),
    "no images": (["--data.dataset", "npz"], "path"),
    "a method": (["--algo", "pg"], "see --methods"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_in_one_line_before_anything_starts(
    case: str, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = MISTAKES[case]
    assert start(THREE, *flags) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert message in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: file"),
        (["--jobs", "2", "table1"], "expected the comparison's file first, got '--jobs'"),
        (["tabel1"], "did you mean 'table1'?"),
        (["no/such.yaml"], "comparison: no/such.yaml: No such file"),
        (["."], "unknown comparison '.'"),
    ],
    ids=str,
)
def test_the_file_comes_first(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_file_cannot_be_the_folder(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").touch()
    assert start(THREE) == 2
    assert "--output: cannot make" in capsys.readouterr().err


def test_a_folder_in_use_is_refused(
    done: SimpleNamespace, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with run_lock(tmp_path / "out"):
        assert start(THREE) == 2
        shown = capsys.readouterr().err
        assert f"{tmp_path / 'out'} is in use by process {os.getpid()}" in shown
        assert not done.runs
    assert start(THREE) == 0


def test_a_cluster_is_given_what_was_asked_for(
    done: SimpleNamespace, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def on_ray(address: str, resources: Any, *, most: int | None, shared: list[Path]) -> Inline:
        asked.append((address, resources, most, shared))
        return Inline(most or 1, tmp_path)

    monkeypatch.setattr(compare, "RayExecutor", on_ray)
    monkeypatch.setenv("MTKD_CACHE", str(tmp_path / "cache"))
    flags = ["--executor", "ray", "--address", "host:6379", "--jobs", "3"]
    assert start(THREE, *flags, "--cpus-per-run", "2", "--gpus-per-run", "0.5") == 0
    shared = [tmp_path / "out", tmp_path / "cache"]
    assert asked == [("host:6379", RunResources(2.0, 0.5), 3, shared)]
    assert {config.threads for config, _ in done.runs} == {2}
    assert len(done.runs) == 6
    # What is finished asks nobody.
    assert start(THREE, "--executor", "ray") == 0
    assert len(asked) == 1


def test_help_names_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    flags = ("--jobs", "--output", "--seeds", "--methods", "--settings", "mtkd run", "--status")
    for flag in (*flags, "--executor", "--address", "--gpus-per-run", "--retries"):
        assert flag in shown


# Progress.

NEVER = partial(print, "never called")


def make_task(name: str, folder: Path, epochs: int = 4) -> Task:
    return Task(name, NEVER, folder / f"{name}.jsonl", epochs)


def write_epochs(task: Task, epochs: int) -> None:
    lines = [json.dumps({"epoch": e, "test/accuracy": 0.125 * e}) for e in range(1, epochs + 1)]
    # The last line is being written.
    task.log.write_text("\n".join([*lines, '{"epoch": 9']), encoding="utf-8")


def test_the_board_shows_what_is_being_done_and_the_time_left(tmp_path: Path) -> None:
    shown_on = console(width=100, force_terminal=True, record=True)
    tasks = [make_task(name, tmp_path) for name in ("one", "two", "three")]
    now = [100.0]
    with Board(shown_on, runs=tasks, finished=1, clock=lambda: now[0]) as board:
        board.started(tasks[0])
        write_epochs(tasks[0], 2)
        now[0] += 60
        board.look([tasks[0], tasks[1]])
        (whole, *lines) = board._bars.tasks
        # Two of twelve epochs took a minute.
        assert whole.fields["text"] == "1/4  0:05:00 left"
        assert (whole.completed, whole.total) == (2, 12)
        assert [line.description for line in lines] == ["one", "two"]
        assert [line.fields["text"] for line in lines] == ["epoch 2/4  25.00%", "starting"]
        board.ended(tasks[0], None)
        board.look([tasks[1]])
        assert board._bars.tasks == [whole, lines[1]]
        assert whole.fields["text"] == "2/4  0:02:00 left"
        board.retried(tasks[1], Failure("was killed", "", died=True))
        board.ended(tasks[1], Failure("went wrong", ""))
    shown = shown_on.export_text()
    assert "[2/4] two: was killed; it is tried again" in shown
    assert "[3/4] two failed: went wrong" in shown


def test_epochs_that_were_done_before_are_no_measure_of_the_time_left(tmp_path: Path) -> None:
    shown_on = console(width=100, force_terminal=True, record=True)
    tasks = [make_task(name, tmp_path) for name in ("one", "two")]
    write_epochs(tasks[0], 3)
    now = [0.0]
    with Board(shown_on, runs=tasks, clock=lambda: now[0]) as board:
        (whole,) = board._bars.tasks
        board.started(tasks[0])
        now[0] += 60
        board.look(tasks[:1])
        assert (whole.completed, whole.fields["text"]) == (3, "0/2")
        write_epochs(tasks[0], 4)
        board.look(tasks[:1])
        # One epoch took a minute, and four are left.
        assert whole.fields["text"] == "0/2  0:04:00 left"


def test_off_a_terminal_every_run_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [make_task(name, tmp_path) for name in ("one", "two [2]")]
    now = [0.0]
    with Board(console(width=140), runs=tasks, clock=lambda: now[0]) as board:
        for task in tasks:
            board.started(task)
            write_epochs(task, 4)
            now[0] += 3600
            board.look([task])
            board.ended(task, None)
            board.look([])
    assert capsys.readouterr().out.splitlines() == [
        "[1/2] one: epoch 4/4  50.00%, 1:00:00 left",
        "[2/2] two [2]: epoch 4/4  50.00%",
    ]


def test_teachers_are_shown_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config,) = parse_arguments([])
    ((task, users),) = Distillation().teachers([config], tmp_path / "teachers.jsonl")
    assert (task.name, task.epochs, users) == ("teachers", 48, [0])
    board = Board(console(width=100), runs=[])
    board.ended(task, None)
    assert "teachers: ready" in capsys.readouterr().out
    row = {"teacher": "resnet8", "epoch": 3, "epochs": 12, "loss": 0.5}
    task.log.write_text(json.dumps(row) + "\n", encoding="utf-8")
    board.look([task])
    assert board._bars.tasks[1].fields["text"] == "resnet8 epoch 3/12"


def test_durations_are_hours_minutes_and_seconds() -> None:
    assert [duration(seconds) for seconds in (0.4, 61, 3599.6, 90000)] == [
        *("0:00:00", "0:01:01", "1:00:00", "25:00:00")
    ]


# In processes.


@pytest.mark.slow
def test_two_processes_do_what_one_does(
    start: Start,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Other tests may have trained the same teachers before.
    monkeypatch.setenv("MTKD_CACHE", str(tmp_path / "cache"))
    text = "methods: {aver: {}, pg: {}}\n"
    handler = signal.getsignal(signal.SIGINT)
    assert start(text, "--jobs", "2") == 0
    assert signal.getsignal(signal.SIGINT) is handler
    shown = capfd.readouterr()
    assert not shown.err
    assert "[2/2]" in shown.out
    out = tmp_path / "out"
    folders = sorted((out / "runs").iterdir())
    assert all((folder / "curves.png").exists() for folder in folders)
    assert [folder.name.split("-")[0] for folder in folders] == ["aver", "pg"]
    trained = (out / "teachers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["teacher"] for line in trained] == list(TEACHERS)
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    found = read_result(Result, folders[1])
    assert found is not None
    # The teachers are there, and the same run in this process comes to the same.
    (config,) = parse_arguments(["--config", str(folders[1] / "config.yaml")])
    expected = run_experiment(config, Progress(), tmp_path / "again")
    assert (found.last, found.weights) == (expected.last, expected.weights)


def test_a_run_takes_its_task_along(tmp_path: Path) -> None:
    (config,) = parse_arguments(["--optimizer.epochs", "3"])
    task = PlannedRun("pg", "half", config, tmp_path / "run", Distillation()).task(threads=1)
    assert (task.name, task.epochs) == ("pg half seed 0", 3)
    assert task.log == tmp_path / "run" / "metrics.jsonl"
