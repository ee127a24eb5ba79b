"""What the console shows of a task's training while it goes on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

from experiments.console import live_bar

# What the names of losses and of metrics begin with in a row.
LOSS, EVALUATED = "loss/", "val/"


class TaskProgress:
    """A line for every row, and on a terminal a live bar below.

    Args:
        out: Where to write.
    """

    def __init__(self, out: Console) -> None:
        self._out = out
        self._bar = live_bar(out)

    @contextmanager
    def training(self, done: int, steps: int) -> Iterator[None]:
        """Shows a training until the context ends.

        Args:
            done: Steps that are done already.
            steps: Steps of the whole training.
        """
        with self._bar:
            self._task = self._bar.add_task("training", total=steps, completed=done, text="")
            yield

    def step(self) -> None:
        """A step was made."""
        self._bar.advance(self._task)

    def row(self, row: Mapping[str, float]) -> None:
        """A row was written; all are lines but those without an evaluation on a terminal."""
        self._bar.update(self._task, text=f"loss {row['loss/total']:.3f}")
        if self._out.is_terminal and not metrics_of(row):
            return
        terms = {k.removeprefix(LOSS): v for k, v in row.items() if k.startswith(LOSS)}
        total = terms.pop("total")
        parts = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
        shown = "".join(f"  {name} {value:.4f}" for name, value in metrics_of(row).items())
        place = f"epoch {row['epoch']:6.2f}  step {row['step']:>6}  lr {row['lr']:.2e}"
        self._out.print(f"{place}  loss {total:.4f} ({parts}){shown}", soft_wrap=True)


def metrics_of(row: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a row, by their own names."""
    return {k.removeprefix(EVALUATED): v for k, v in row.items() if k.startswith(EVALUATED)}
