"""Trains a student under one method, or under several with commas between them, side by side.

python experiments/run.py --algo ppo
python experiments/run.py --algo pg,ppo,aver --optimizer.epochs 60 --seed 1
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from agents import check_agent
from experiments.config import parse_arguments
from experiments.console import ConsoleProgress, console, draw_curves, print_results
from experiments.experiment import Result, run_experiment
from experiments.metrics import read_rows
from mtkd_env.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; gives its exit code."""
    out = console()
    try:
        configs = parse_arguments(sys.argv[1:] if argv is None else argv)
        for config in configs:
            check_agent(config.agent_name, config.agent.arguments)
        results: list[Result] = []
        for config in configs:
            with closing(ConsoleProgress(out)) as progress:
                result = run_experiment(config, progress)
            folder = Path(result.folder)
            title = f"{result.algo} on {result.dataset}: {result.student}, seed {result.seed}"
            draw_curves(read_rows(folder), folder / "curves.png", title)
            results.append(result)
        print_results(out, results)
    except (ConfigError, FloatingPointError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: a run folder without result.json is unfinished\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
