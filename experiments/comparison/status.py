"""How far a comparison is, read from its folders; whoever works on it is not asked."""

import time
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rich.console import Console

from experiments.comparison.execution import ERROR
from experiments.comparison.plan import Comparison, PlannedRun
from experiments.comparison.progress import describe, duration, rows_of
from experiments.console import plain_table
from experiments.running.lock import is_running


class State(StrEnum):
    """What has become of a run."""

    DONE = "done"
    RUNNING = "running"
    FAILED = "failed"
    WAITING = "waiting"


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        run: The run.
        state: What has become of it.
        progress: Its last epoch, of how many, and the accuracy; empty before the first.
        silence: Seconds since the last epoch; none before the first.
        error: Why it failed, in one line.
    """

    run: PlannedRun
    state: State
    progress: str = ""
    silence: float | None = None
    error: str = ""


def run_status(run: PlannedRun, now: float) -> RunStatus:
    """How far a run is.

    Args:
        run: The run.
        now: The time, on the clock of files [s].
    """
    if run.result is not None:
        return RunStatus(run, State.DONE)
    task, error = run.task(), run.folder / ERROR
    rows = rows_of(task)
    progress = describe(task, rows) if rows else ""
    silence = now - task.log.stat().st_mtime if rows else None
    if is_running(run.folder):
        return RunStatus(run, State.RUNNING, progress, silence)
    if error.is_file():
        message = error.read_text(encoding="utf-8").partition("\n")[0]
        return RunStatus(run, State.FAILED, progress, silence, message)
    return RunStatus(run, State.WAITING, progress, silence)


def print_status(console: Console, comparison: Comparison) -> None:
    """Counts of all runs, and a line for every one that has been begun and is not finished."""
    now = time.time()
    statuses = [run_status(run, now) for run in comparison.runs]
    counts = Counter(status.state for status in statuses)
    begun = (State.RUNNING, State.FAILED)
    if told := [status for status in statuses if status.state in begun or status.progress]:
        table = plain_table(None, [], [])
        for heading in ("run", "state", "last epoch", "ago", "why"):
            table.add_column(heading, overflow="fold")
        for status in told:
            ago = "" if status.silence is None else duration(max(0.0, status.silence))
            table.add_row(status.run.name, status.state, status.progress, ago, status.error)
        console.print(table)
    summary = ", ".join(f"{counts[state]} {state}" for state in State)
    console.print(f"{comparison.title}: {len(statuses)} runs: {summary}")
    if others := len(_folders(comparison) - {run.folder for run in comparison.runs}):
        console.print(
            f"besides, {others} in the same folder that are none of these; runs begun with flags "
            "are counted with the same flags"
        )


def _folders(comparison: Comparison) -> set[Path]:
    """All runs beside those of a comparison, its own among them, whatever they were made with."""
    return {path for run in comparison.runs for path in run.folder.parent.glob("*/")}
