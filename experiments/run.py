"""Trains a student under one method, or under several with commas between them, side by side.

mtkd run --algo ppo
mtkd run --algo pg,ppo,aver --optimizer.epochs 60 --seed 1
mtkd run --resume runs/digits_ppo_seed0_20260131-120000
torchrun --nproc-per-node 2 experiments/run.py --recipe cifar100_shufflenetv2 --algo pg
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from experiments.config import ExperimentConfig, parse_arguments, take
from experiments.console import ConsoleProgress, console, draw_curves, print_results
from experiments.experiment import Result, run_config, run_experiment
from experiments.running.device import together
from experiments.running.failures import program
from experiments.running.log import read_rows
from mtkd_env import distributed
from mtkd_env.files import user_path


@program("a run folder without result.json is unfinished")
def main(argv: Sequence[str]) -> int:
    """Runs the program; gives its exit code."""
    runs = planned(argv)
    for config, _ in runs:
        config.check_agent()
    with together(runs[0][0].device):
        complete(runs)
    return 0


def complete(runs: Sequence[tuple[ExperimentConfig, Path | None]]) -> None:
    """Does runs one after the other; of several processes, one shows how it goes."""
    shows = distributed.rank() == 0
    out = console(quiet=not shows)
    results: list[Result] = []
    for config, folder in runs:
        with closing(ConsoleProgress(out)) as progress:
            result = run_experiment(config, progress, folder, resume=folder is not None)
        if shows:
            # Not what the result of a folder that was moved, or is somebody else's, says of itself.
            draw(result, folder or Path(result.folder))
        results.append(result)
    print_results(out, results)


def planned(argv: Sequence[str]) -> list[tuple[ExperimentConfig, Path | None]]:
    """The runs that a command line asks for, with their folders where those are there already.

    Raises:
        ConfigError: Anything that cannot be used; with `--resume`, a flag that would make it
            another run.
    """
    named, flags = take(argv, "--resume")
    if not named:
        return [(config, _own_folder(config)) for config in parse_arguments(flags)]
    folder = user_path(named[-1])
    return [(run_config(folder, flags), folder)]


def _own_folder(config: ExperimentConfig) -> Path | None:
    """The folder that a run is told to write to, if it is a run's own and not one of many."""
    folder = Path(config.output)
    return folder if (folder / "config.yaml").is_file() else None


def draw(result: Result, folder: Path) -> None:
    """Draws the curves of a finished run into its folder."""
    title = f"{result.algo} on {result.dataset}: {result.student}, seed {result.seed}"
    draw_curves(read_rows(folder), folder / "curves.png", title)


if __name__ == "__main__":
    sys.exit(main())
