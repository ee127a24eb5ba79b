"""Compares methods over settings and seeds, as a YAML file describes them.

python experiments/compare.py table1
python experiments/compare.py experiments/configs/benchmark/table1.yaml --jobs 2 --seeds 0,1,2
python experiments/compare.py robustness --methods pg,aver --optimizer.epochs 60

Runs that are finished are not run again: the same command goes on where it was interrupted.
"""

import shutil
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from experiments.comparison import (
    Comparison,
    PlannedRun,
    Selection,
    check_data,
    find_file,
    load_comparison,
)
from experiments.comparison_progress import Board
from experiments.comparison_report import print_comparison, write_comparison
from experiments.comparison_tasks import pool_tasks, run_task
from experiments.config import read_flags
from experiments.console import console
from experiments.experiment import read_result
from experiments.slots import Failure, ProcessSlot, Slot, Task, work_off
from mtkd_env.errors import ConfigError
from mtkd_env.files import write_text

# In the folder of a run that failed.
ERROR = "error.txt"


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="compare.py",
        description=__doc__,
        epilog="Every other flag is one of run.py, for all runs: --optimizer.epochs 60 ...",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", help="YAML file, or the name of one in configs/benchmark")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--output", help="folder (default: runs/NAME OF THE FILE)")
    parser.add_argument("--seeds", help="instead of the file's: 0,1,2")
    parser.add_argument("--methods", help="only these of the file's: pg,aver")
    parser.add_argument("--settings", help="only these of the file's")
    return parser


def parse(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The program's own arguments, and the flags for every run.

    Raises:
        ConfigError: No file first, or a value that cannot be used.
        SystemExit: After `--help`.
    """
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        raise ConfigError(f"expected the comparison's file first, got '{argv[0]}'")
    arguments, flags = _parser().parse_known_args(argv)
    if arguments.jobs < 1:
        raise ConfigError(f"--jobs: expected a number >= 1, got {arguments.jobs}")
    if any(flag.partition("=")[0] == "--seed" for flag in flags):
        raise ConfigError("--seed: cannot be given here; see --seeds")
    return arguments, flags


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def selection(arguments: Namespace) -> Selection:
    """What `--methods`, `--settings` and `--seeds` leave of a comparison.

    Raises:
        ConfigError: A seed that is not a number.
    """
    seeds = _names(arguments.seeds)
    try:
        numbers = None if seeds is None else [int(seed) for seed in seeds]
    except ValueError:
        raise ConfigError(f"--seeds: expected 0,1,2,..., got '{arguments.seeds}'") from None
    return Selection(_names(arguments.methods), _names(arguments.settings), numbers)


def make_slots(jobs: int, folder: Path) -> list[Slot]:
    """As many processes as there are jobs."""
    return [ProcessSlot(folder / f"slot{number}.log") for number in range(1, jobs + 1)]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: cannot make {folder}: {error.strerror}") from error


class Execution:
    """Does the runs of a comparison that are not finished.

    Args:
        comparison: The comparison.
        output: Its folder.
        jobs: Number of runs side by side.
        out: Where progress is shown.
    """

    def __init__(self, comparison: Comparison, output: Path, jobs: int, out: Console) -> None:
        left = [run for run in comparison.runs if read_result(run.folder) is None]
        threads = 1 if jobs > 1 else None
        self._output = output
        self._jobs = jobs
        self._runs = {run_task(run, threads): run for run in left}
        self._board = Board(
            out,
            slots=jobs,
            runs=list(self._runs),
            finished=len(comparison.runs) - len(left),
        )
        self.failures: list[tuple[PlannedRun, Failure]] = []

    def work(self) -> None:
        """Trains the teachers, one pool after the other, then the students."""
        if not self._runs:
            return
        _make_folder(self._output)
        with ExitStack() as stack:
            slots = make_slots(self._jobs, self._output)
            for slot in slots:
                stack.callback(slot.close)
            stack.enter_context(self._board)
            failed = self._train_teachers(slots[:1])
            for task, failure in failed.items():
                self.started(task)
                self.ended(task, failure)
            work_off([task for task in self._runs if task not in failed], slots, self)

    def _train_teachers(self, slots: Sequence[Slot]) -> dict[Task, Failure]:
        """One pool after the other, since they share teachers; gives the runs that lack theirs."""
        pools = dict(pool_tasks(self._runs.values(), self._output / "teachers.jsonl"))
        failures = work_off(list(pools), slots, self._board)
        lacking = {
            run.folder: Failure(f"{pool.name}: {failure.message}", failure.details)
            for pool, failure in failures.items()
            for run in pools[pool]
        }
        return {t: lacking[run.folder] for t, run in self._runs.items() if run.folder in lacking}

    def started(self, task: Task) -> None:
        """A run is about to begin: what an unfinished one has left makes place for it."""
        shutil.rmtree(self._runs[task].folder, ignore_errors=True)
        self._board.started(task)

    def ended(self, task: Task, failure: Failure | None) -> None:
        """A run has ended; its folder says why, if it failed."""
        if failure is not None:
            run = self._runs[task]
            self.failures.append((run, failure))
            write_text(run.folder / ERROR, f"{failure.message}\n\n{failure.details}")
        self._board.ended(task, failure)

    def look(self, tasks: Sequence[Task | None]) -> None:
        """The task of every slot."""
        self._board.look(tasks)


def _report(comparison: Comparison, output: Path, out: Console) -> None:
    """Tables and picture of the runs that are finished."""
    results = [(run, read_result(run.folder)) for run in comparison.runs]
    finished = [(run, result) for run, result in results if result is not None]
    if finished:
        write_comparison(comparison, finished, output)
        print_comparison(out, comparison, finished, output)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; gives its exit code."""
    out = console()
    try:
        arguments, flags = parse(sys.argv[1:] if argv is None else argv)
        path = find_file(arguments.file)
        output = Path(arguments.output or f"runs/{path.stem}")
        comparison = load_comparison(path, read_flags(flags), selection(arguments), output)
        check_data(comparison)
        execution = Execution(comparison, output, arguments.jobs, out)
        execution.work()
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command goes on with the runs that are left\n")
        return 130
    _report(comparison, output, out)
    for run, failure in execution.failures:
        sys.stderr.write(f"failed: {run.name}: {failure.message}; see {run.folder / ERROR}\n")
    return 1 if execution.failures else 0


if __name__ == "__main__":
    sys.exit(main())
