"""Trains the teachers of a pool and keeps them, so that runs find them.

mtkd train-teachers --teachers experiments/configs/pool/digits_permuted.yaml

Takes the flags of mtkd run, so that what it trains is what a run with the same flags looks for.
Interrupted, it goes on where it was when called again.
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from experiments.config import ExperimentConfig, parse_arguments
from experiments.console import ConsoleProgress, console, plain_table
from experiments.experiment import train_teachers
from experiments.running.failures import program
from mtkd_env.files import cache_folder
from mtkd_env.teachers import TeacherPool


def train(config: ExperimentConfig, out: Console) -> TeacherPool:
    """Finds or trains the teachers of a configuration; losses go to TensorBoard."""
    folder = Path(config.output) / "teachers" / "tensorboard"
    with SummaryWriter(str(folder)) as writer, closing(ConsoleProgress(out)) as progress:

        def report(name: str, epoch: int, epochs: int, loss: float) -> None:
            progress.teacher(name, epoch, epochs, loss)
            writer.add_scalar(f"{name}/cross_entropy", loss, epoch)

        return train_teachers(config, report)


def pool_table(pool: TeacherPool) -> Table:
    """Every teacher's result on the test images."""
    table = plain_table("Teachers", ["teacher"], ["test accuracy", "test cross-entropy", "digest"])
    for name, evaluation in pool.evaluations.items():
        accuracy = f"{evaluation.accuracy:.2%}"
        if evaluation.labelled < 1:
            own = evaluation.accuracy / max(evaluation.labelled, 1e-12)
            accuracy += f" ({own:.2%} of its own classes)"
        table.add_row(name, accuracy, f"{evaluation.cross_entropy:.4f}", pool.digests[name][:16])
    return table


@program("call again to go on")
def main(argv: Sequence[str]) -> int:
    """Runs the program; gives its exit code."""
    out = console()
    config = parse_arguments(argv, "mtkd train-teachers")[0]
    pool = train(config, out)
    out.print(pool_table(pool))
    out.print(f"kept in {cache_folder(config.cache) / 'teachers'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
