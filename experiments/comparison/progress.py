"""What a person sees of a comparison while it goes on."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID

from experiments.console import plain_column
from experiments.executors import Failure, Task
from experiments.running.log import parse_rows

# What the names of metrics begin with.
JUDGED = ("test/", "val/")


def rows_of(task: Task) -> list[dict[str, Any]]:
    """What a task has told so far: the complete lines of its log."""
    try:
        content = task.log.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    return parse_rows(content[: content.rfind(b"\n") + 1], task.log)


def done(task: Task, rows: Sequence[dict[str, Any]]) -> float:
    """How far a task is, of its `epochs`; of teachers every line is an epoch."""
    if not rows or "teacher" in rows[-1]:
        return len(rows)
    return float(rows[-1][task.clock])


def describe(task: Task, rows: Sequence[dict[str, Any]]) -> str:
    """How far a task is: epoch or step and the metric, or epoch of a teacher."""
    if not rows:
        return "starting"
    row = rows[-1]
    if "teacher" in row:
        return f"{row['teacher']} epoch {row['epoch']}/{row['epochs']}"
    # The main metric stands first in a row; not every row has it.
    judged = [next((v for k, v in row.items() if k.startswith(JUDGED)), None) for row in rows]
    value = next((f"  {v:.2%}" for v in reversed(judged) if v is not None), "")
    return f"{task.clock} {done(task, rows):g}/{task.epochs}{value}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Board:
    """Shows how many runs are done, the time left, and on a terminal a line for everything begun.

    Args:
        console: Where to write.
        runs: The tasks that count as runs; all others only get a line.
        finished: Runs that were finished before.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        console: Console,
        *,
        runs: Sequence[Task],
        finished: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._runs = set(runs)
        self._finished = finished
        self._total = finished + len(runs)
        self._epochs = sum(task.epochs for task in runs)
        # A run that is resumed has epochs that took no time now.
        self._done = {task: done(task, rows_of(task)) for task in runs}
        self._before = sum(self._done.values())
        self._clock = clock
        self._since: float | None = None
        self._bars = Progress(
            plain_column("{task.description}"),
            BarColumn(bar_width=20),
            plain_column("{task.fields[text]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._all = self._bars.add_task("runs", total=self._epochs or None, text="")
        self._lines: dict[Task, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def started(self, task: Task) -> None:
        """A task is about to begin."""
        if task in self._runs and self._since is None:
            self._since = self._clock()

    def retried(self, task: Task, failure: Failure) -> None:
        """A task has lost its process and waits for another one."""
        self._print(f"{task.name}: {failure.message}; it is tried again")

    def ended(self, task: Task, failure: Failure | None) -> None:
        """A task has ended: a line of its own off a terminal, and everywhere if it failed."""
        if task in self._runs:
            self._finished += 1
            self._done[task] = task.epochs
        if failure is not None:
            self._print(f"{task.name} failed: {failure.message}")
        elif not self._console.is_terminal:
            rows = rows_of(task)
            self._print(f"{task.name}: {describe(task, rows) if rows else 'ready'}")

    def _print(self, text: str) -> None:
        line = f"[{self._finished}/{self._total}] {text}{self._time_left(', {} left')}"
        self._console.print(line, soft_wrap=True)

    def look(self, tasks: Sequence[Task]) -> None:
        """Shows the tasks that are being done."""
        for task in self._lines.keys() - set(tasks):
            self._bars.remove_task(self._lines.pop(task))
        for task in tasks:
            rows = rows_of(task)
            now = done(task, rows)
            if task in self._runs:
                self._done[task] = now
            if task not in self._lines:
                self._lines[task] = self._bars.add_task(task.name, total=task.epochs, text="")
            self._bars.update(self._lines[task], completed=now, text=describe(task, rows))
        text = f"{self._finished}/{self._total}{self._time_left('  {} left')}"
        self._bars.update(self._all, completed=sum(self._done.values()), text=text)

    def _time_left(self, form: str) -> str:
        """The time left at the speed so far, in epochs; nothing before there is one."""
        total = sum(self._done.values())
        now = total - self._before
        if self._since is None or now <= 0 or total >= self._epochs:
            return ""
        elapsed = self._clock() - self._since
        return form.format(duration(elapsed / now * (self._epochs - total)))
