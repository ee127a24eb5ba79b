"""What every benchmark is given, and what it gives back."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, RenderableType

from experiments.benchmarks.variants import Variant
from experiments.config import ExperimentConfig, parse_arguments
from experiments.console import ConsoleProgress, live_bar
from experiments.experiment import build
from mtkd_env import Assembly

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What the command line asks of a benchmark.

    Attributes:
        flags: The flags of mtkd run.
        methods: What to compare; by default what the benchmark is about.
        steps: SGD steps that a method does in a round.
        rounds: Number of rounds.
        epochs: Points of the student's training [epochs].
        out: Where progress is shown.
        variants: Flags that every method is measured with as well.
        axes: What a cost is measured against; by default all that the benchmark knows.
    """

    flags: Sequence[str]
    methods: Sequence[str] | None
    steps: int
    rounds: int
    epochs: Sequence[int]
    out: Console
    variants: Sequence[Variant] = ()
    axes: Sequence[str] | None = None

    def configs(self, methods: Sequence[str], *flags: str) -> dict[str, ExperimentConfig]:
        """The configuration of every method, checked before anything is built.

        Args:
            methods: Names that `--algo` takes.
            flags: Flags besides the user's own.

        Raises:
            ConfigError: An unknown name, key or value.
        """
        algos = ["--algo", ",".join(methods)]
        configs = parse_arguments([*self.flags, *flags, *algos], "mtkd benchmark")
        for config in configs:
            config.check_agent()
        return dict(zip(methods, configs, strict=True))

    def build(self, config: ExperimentConfig) -> Assembly:
        """Images, teachers and an environment; trains teachers that are not there."""
        with closing(ConsoleProgress(self.out)) as progress:
            return build(config, progress)

    def count(self, things: Collection[T], title: str) -> Iterator[T]:
        """Shows on the console how far an iteration is; off a terminal in ten lines or fewer."""
        total = len(things)
        # Drawn between two measurements, not by a thread that would be part of them.
        with live_bar(self.out, auto_refresh=False) as bar:
            shown = bar.track(things, task_id=bar.add_task(title, total=total, text=""))
            for done, thing in enumerate(shown, start=1):
                yield thing
                if not self.out.is_terminal and done * 10 // total > (done - 1) * 10 // total:
                    self.out.print(f"{title}: {done}/{total}")


@dataclass(frozen=True)
class Outcome:
    """What a benchmark has found.

    Attributes:
        tables: What is printed.
        notes: What the reader must know of the numbers, a line each.
        values: All numbers; JSON can hold them, with dataclasses as their fields.
        draw: Draws the picture into a PNG.
    """

    tables: Sequence[RenderableType]
    notes: Sequence[str]
    values: Mapping[str, Any]
    draw: Callable[[Path], None]


@dataclass(frozen=True)
class Benchmark:
    """An entry of `BENCHMARKS`.

    Attributes:
        measure: Measures; raises `ConfigError` for what it cannot use before it builds anything.
        about: What it measures, for the help.
        rounds: Number of rounds by default.
        flags: Names of the flags that mean something to it, besides `--rounds` and `--json`.
        steps: SGD steps in a round by default.
        epochs: Points of the student's training by default.
    """

    measure: Callable[[Request], Outcome]
    about: str
    rounds: int
    flags: Collection[str] = ("methods",)
    steps: int = 1
    epochs: Sequence[int] = ()
