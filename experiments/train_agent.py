"""Lets an agent learn once, over many tasks, for pools of teachers that it has never seen.

mtkd train-agent --tasks experiments/configs/tasks/specialists.yaml --algo pg
mtkd train-agent --resume runs/agents/specialists_pg_seed0

The run's folder holds the agent, for `--algo pretrained --agent.load FOLDER` of mtkd run.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.agent_run import ALL, GAIN, AgentRun, AgentRunConfig, run_folder
from experiments.config import CONFIGS, file_layer, parse_values, take
from experiments.console import ConsoleProgress, console
from experiments.running.failures import program
from experiments.running.folder import CONFIG
from mtkd_env.files import user_path
from mtkd_env.imports import TRUST, trust_of

ABOUT = (
    "Lets an agent learn over many tasks, a student each. Layers, later ones win: "
    "configs/agent/ALGO.yaml, --config files, flags. --resume FOLDER goes on with an "
    f"unfinished run. {TRUST} lets files name a module:Name of any module."
)

# Heights of the chart, the lowest first.
BARS = "▁▂▃▄▅▆▇█"


class AgentConsole(ConsoleProgress):
    """Shows the training of an agent: a line a student, and the held-out tasks drawn every pass."""

    def __init__(self, out: Console) -> None:
        super().__init__(out)
        self._out = out

    def student(self, rows: Sequence[Mapping[str, Any]], students: int) -> None:
        """A student is finished."""
        row = rows[-1]
        self._out.print(
            f"student {row['student']:>3}/{students}  {row['task']:<20} "
            f"{row['teachers']} teachers  test accuracy {row['test/accuracy']:6.2%}  "
            f"{row['agent/updates']} updates  {row['seconds']:.0f} s",
            soft_wrap=True,
        )
        for name in [name for name in row if name.startswith(GAIN) or name == ALL]:
            values = [100 * other[name] for other in rows if name in other]
            label = "held out, mean" if name == ALL else name.removeprefix(GAIN)
            self._out.print(
                f"  {label:<20} {values[-1]:+6.2f} points over equal weights  {chart(values)}",
                soft_wrap=True,
            )


def chart(values: Sequence[float]) -> str:
    """A bar for each value, between the smallest (or zero) and the largest (or zero)."""
    low, high = min(0.0, *values), max(0.0, *values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def parse(argv: Sequence[str]) -> tuple[AgentRunConfig, Path | None]:
    """The run that a command line asks for, and its folder where it is to be gone on with.

    Layers, later ones win: configs/agent/ALGO.yaml, `--config` files, flags.

    Raises:
        ConfigError: Anything that cannot be used.
        SystemExit: After `--help` or `--print_config`.
    """
    trust = trust_of(argv)
    resumed, flags = take([flag for flag in argv if flag != TRUST], "--resume")
    named, flags = take(flags, "--config")
    folder = user_path(resumed[-1]) if resumed else None
    layers = [file_layer(folder / CONFIG, flag="--resume")] if folder else []
    layers += [file_layer(user_path(path)) for path in named]
    in_files = [str(layer.values["algo"]) for layer in layers if "algo" in layer.values]
    algo = [AgentRunConfig.algo, *in_files, *take(flags, "--algo")[0]][-1]
    shipped = CONFIGS / "agent" / f"{algo}.yaml"
    if shipped.is_file() and folder is None:
        layers.insert(0, file_layer(shipped))
    with trust.applied():
        config = parse_values(AgentRunConfig, layers, flags, AgentRun.program, ABOUT)
        config.check_agent()
    return config, folder


@program("a run folder without result.json is unfinished")
def main(argv: Sequence[str]) -> int:
    """Runs the program; gives its exit code."""
    config, folder = parse(argv)
    out = console()
    with closing(AgentConsole(out)) as progress, trust_of(argv).applied():
        run = AgentRun(config, progress)
        result = run.complete(folder or run_folder(config), resume=folder is not None)
    out.print(
        f"{result.algo}: {100 * result.last:+.2f} points over equal weights on held-out tasks; "
        f"written to {result.folder}",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
