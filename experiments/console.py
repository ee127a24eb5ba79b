"""What the console shows of runs: live progress and tables; and the picture of one run."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogFormatter, MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from experiments import training
from experiments.config import ExperimentConfig
from experiments.drawing import LENGTH, drawn, picture
from experiments.experiment import Result, mean_weights
from experiments.running.signals import end_unread
from experiments.training import CHOSEN_BY
from mtkd_env.imports import name_of
from mtkd_env.vector import StepRecord

# Seconds without a line, off a terminal, after which a teacher in training is told of.
SILENCE = 60.0


def describe_epoch(row: dict[str, Any], epochs: int) -> str:
    """One line for an epoch: loss, accuracies, mean weight of each teacher, agent score."""
    weights = mean_weights(row, teachers_of(row))
    validation = f"val accuracy {row[CHOSEN_BY]:6.2%}  " if CHOSEN_BY in row else ""
    return (
        f"epoch {row['epoch']:>3}/{epochs}  loss {row['loss/total']:7.3f}  "
        f"CE {row['loss/cross_entropy']:6.3f}  {validation}"
        f"test accuracy {row['test/accuracy']:6.2%}  "
        f"weights {' '.join(f'{weight:.2f}' for weight in weights.values())}  "
        f"agent score {row['score']:z5.2f}"
    )


def teachers_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The teachers' names, from a row of metrics."""
    prefix = "weights/logit/"
    return tuple(name.removeprefix(prefix) for name in row if name.startswith(prefix))


class ConsoleProgress(training.Progress):
    """Shows a run while it goes on: a line an epoch, and on a terminal a live bar below.

    Args:
        console: Where to write.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._teacher: tuple[Progress, TaskID, str] | None = None
        self._told = time.monotonic()

    def teacher(self, name: str, epoch: int, epochs: int, loss: float) -> None:
        """A teacher has been trained for another epoch."""
        if not self._console.is_terminal:
            self._tell_teacher(name, epoch, epochs, loss)
            return
        if self._teacher is None or self._teacher[2] != name:
            bar = live_bar(self._console)
            bar.start()
            self._teacher = bar, bar.add_task(f"teacher {name}", total=epochs, text=""), name
        bar, task, _ = self._teacher
        bar.update(task, completed=epoch, text=f"loss {loss:.3f}")
        if epoch == epochs:
            self.close()

    def _tell_teacher(self, name: str, epoch: int, epochs: int, loss: float) -> None:
        """A line at the end of a training, and now and then before."""
        if epoch == epochs:
            self._console.print(f"trained teacher {name}: {epochs} epochs, loss {loss:.3f}")
        elif time.monotonic() - self._told >= SILENCE:
            self._console.print(f"teacher {name}: epoch {epoch}/{epochs}, loss {loss:.3f}")
        else:
            return
        self._told = time.monotonic()

    def note(self, text: str) -> None:
        """Something about the teachers is worth a line."""
        self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Gives the terminal back, if a teacher's training was interrupted."""
        if self._teacher is not None:
            self._teacher[0].stop()
            self._teacher = None

    @contextmanager
    def training(self, config: ExperimentConfig, steps: int) -> Iterator[None]:
        """Shows the student's training until the context ends."""
        name = name_of(config.algo)
        if not self._console.is_terminal:
            self._console.print(f"{name}: {steps} steps, seed {config.seed}")
        with live_bar(self._console) as self._bar:
            self._task = self._bar.add_task(name, total=steps, text="")
            yield

    def step(self, record: StepRecord) -> None:
        """The student made a step."""
        del record
        if self._bar is not None:
            self._bar.advance(self._task)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """An epoch ended."""
        self._console.print(describe_epoch(row, epochs), soft_wrap=True)


def plain_column(form: str, style: str = "none") -> TextColumn:
    """A column of a live bar with a text that is no markup."""
    return TextColumn(form, style=style, markup=False)


def live_bar(console: Console, *, auto_refresh: bool = True) -> Progress:
    """A bar of steps done, with times and a text behind it; off a terminal nothing.

    Args:
        console: Where to write.
        auto_refresh: Whether a thread draws it; else it is drawn as things are tracked.
    """
    return Progress(
        plain_column("{task.description}", "bold"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        plain_column("{task.fields[text]}"),
        console=console,
        auto_refresh=auto_refresh,
        disable=not console.is_terminal,
    )


def plain_table(title: str | None, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table: columns of texts, then columns of numbers, by their headings."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in texts:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def result_table(results: Sequence[Result]) -> Table:
    """Students side by side, a row for each run; weights and scores are those of the last epoch."""
    teachers = list(results[0].teachers)
    chosen = ["val\nlast", "val\nbest"] if validated(results) else []
    numbers = [*chosen, "test\nlast", "test\nbest", "agent\nscore"]
    numbers += [*(f"weight\n{teacher}" for teacher in teachers), "\nseconds"]
    table = plain_table("Students", ["method"], numbers)
    for result in results:
        shares = [result.validation[which] for which in ("last", "best") if chosen]
        cells = [f"{share:.2%}" for share in (*shares, result.last, result.best)]
        weights = [f"{result.weights[teacher]:.3f}" for teacher in teachers]
        score, seconds = f"{result.score:z.3f}", f"{result.seconds:.1f}"
        table.add_row(result.algo, *cells, score, *weights, seconds)
    return table


def validated(results: Sequence[Result]) -> bool:
    """Whether validation images chose the best epoch of runs side by side, which share them."""
    return all(result.validation for result in results)


def print_results(console: Console, results: Sequence[Result]) -> None:
    """The tables of teachers and students, and where the runs are."""
    teachers = plain_table("Teachers", ["name"], ["test accuracy"])
    for name, accuracy in results[0].teachers.items():
        teachers.add_row(name, f"{accuracy:.2%}")
    console.print(teachers)
    console.print(result_table(results))
    on_test = "the highest, chosen on test."
    on_val = "after the epoch that is best on the validation images (val)."
    console.print(
        "last: accuracy after the last epoch, the result; "
        f"best: {on_val if validated(results) else on_test}\n"
        "agent score: 0 is equal weights, 1 all weight on each sample's best teacher.",
    )
    for result in results:
        console.print(f"{result.algo}: {result.folder}", soft_wrap=True)


def draw_curves(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws accuracy, losses and the weight of each teacher over the epochs into a PNG."""
    with picture(path, (15, 4)) as figure:
        epochs = [row["epoch"] for row in rows]
        accuracy, losses, weights = figure.subplots(1, 3)
        for split in ("val", "test"):
            if f"{split}/accuracy" in rows[0]:
                values = [100 * row[f"{split}/accuracy"] for row in rows]
                accuracy.plot(epochs, values, label=split)
        accuracy.set(title="Student accuracy", ylabel="accuracy [%]")
        for name in ("total", "cross_entropy", "kd", "feature"):
            losses.plot(epochs, [row[f"loss/{name}"] for row in rows], label=name.replace("_", " "))
        losses.set(title="Losses (training, teachers' mean)", ylabel="loss", yscale="log")
        losses.yaxis.set_major_formatter(LogFormatter())
        losses.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        teachers = teachers_of(rows[0])
        for teacher in teachers:
            values = [mean_weights(row, teachers)[teacher] for row in rows]
            weights.plot(epochs, values, label=drawn(teacher))
        weights.axhline(1 / len(teachers), color="grey", linestyle=":", label="uniform")
        weights.set(title="Mean weight of each teacher", ylabel="weight", ylim=(0, None))
        for axes in (accuracy, losses, weights):
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        figure.suptitle(drawn(title, 2 * LENGTH))


class _Console(Console):
    """A console whose reader may leave."""

    def on_broken_pipe(self) -> None:
        """Ends the program with a checkpoint, where it keeps any."""
        self.quiet = True
        end_unread()


def console(*, width: int | None = None, **arguments: Any) -> Console:
    """The console of all programs: texts are shown as they are, whatever is written in them.

    Args:
        width: Characters in a line; off a terminal by default as many as a line an epoch needs.
        arguments: Any other argument of `Console`.
    """
    if width is None and not sys.stdout.isatty():
        width = 140
    return _Console(width=width, markup=False, emoji=False, highlight=False, **arguments)
