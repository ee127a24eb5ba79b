r"""Compares methods over settings, seeds and pools of teachers, as a YAML file describes them.

mtkd compare table1
mtkd compare experiments/configs/benchmark/table1.yaml --jobs 2 --seeds 0,1,2
mtkd compare robustness --methods pg,aver --optimizer.epochs 60
mtkd compare table1 --executor ray --address auto --gpus-per-run 0.5
mtkd compare table1 --status
mtkd compare table4 --data COCO --settings '*_resnet18' \
    --weights baseline:resnet18=EXPORT1 --weights mtkd_rl:resnet18=EXPORT2
torchrun --nproc-per-node 8 experiments/compare.py table5 --data CITYSCAPES ...

Runs that are finished are not run again: the same command goes on where it was interrupted. The
tables show what was asked for, and what else in the folder is finished of the file.
On a cluster, the working folder, --output and the cache of teachers must be on a file system that
all nodes share, and the project must be installed on each of them.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

from rich.console import Console

from experiments.comparison.execution import ERROR, Execution
from experiments.comparison.plan import (
    Comparison,
    Selection,
    find_file,
    load_comparison,
)
from experiments.comparison.report import find_finished, print_comparison, write_comparison
from experiments.comparison.status import print_status
from experiments.console import console
from experiments.executors import Executor, HereExecutor, LocalExecutor
from experiments.executors.cluster import RayExecutor, RunResources
from experiments.running.device import together
from experiments.running.failures import Parser, at_least, names, numbers, program
from mtkd_env import distributed
from mtkd_env.errors import ConfigError, check_name
from mtkd_env.files import user_path

EXECUTORS = ("local", "ray")

# Flags that say something to Ray only.
RAY_FLAGS = ("address", "cpus_per_run", "gpus_per_run")


def _parser() -> Parser:
    parser = Parser(
        prog="mtkd compare",
        description=__doc__,
        epilog="Every other flag is one of mtkd run, or mtkd transfer, for all runs: "
        "--optimizer.epochs 60 ...; ",
    )
    parser.add_argument("file", help="YAML file, or the name of one in configs")
    parser.add_argument("--output", help="folder (default: runs/NAME OF THE FILE)")
    parser.add_argument("--seeds", type=numbers, help="instead of the file's: 0,1,2")
    parser.add_argument(
        "--pools", type=numbers, help="seeds of pools of teachers, instead of the file's: 0,1,2"
    )
    parser.add_argument("--methods", type=names, help="only these of the file's: pg,aver")
    parser.add_argument(
        "--settings", type=names, help="only these, with * for anything: 'mask_*,retina*'"
    )
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="METHOD:RESNET=PATH",
        help="of detectors and segmenters: an export, or random; may be given several times",
    )
    parser.add_argument("--status", action="store_true", help="show how far it is, and do nothing")
    parser.add_argument("--executor", default="local", help="local (default) or ray")
    parser.add_argument(
        "--jobs", type=at_least(1), help="runs side by side (default: 1; on ray all that have room)"
    )
    parser.add_argument(
        "--retries", type=at_least(0), default=2, help="of a run whose process died (default: 2)"
    )
    ray = parser.add_argument_group("ray", "only with --executor ray")
    ray.add_argument(
        "--address",
        help="of a cluster: auto, HOST:PORT, ray://HOST:PORT "
        "(default: $RAY_ADDRESS, or a Ray of this machine that ends with the program)",
    )
    ray.add_argument("--cpus-per-run", type=float, help="also its threads (default: 1)")
    ray.add_argument(
        "--gpus-per-run", type=float, help="may be a share: 0.5 (default: 1 if there are any)"
    )
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
    if any(flag.partition("=")[0] == "--seed" for flag in flags):
        raise ConfigError("--seed: cannot be given here; see --seeds")
    check_name(EXECUTORS, arguments.executor, "--executor")
    for name in RAY_FLAGS:
        if arguments.executor != "ray" and getattr(arguments, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: means nothing without --executor ray")
    return arguments, flags


def make_execution(
    arguments: Namespace, comparison: Comparison, output: Path, out: Console
) -> Execution:
    """What does the runs that are left, on the executor that was asked for.

    Raises:
        ConfigError: Resources that cannot be asked for.
    """
    jobs = arguments.jobs or 1
    threads = 1 if jobs > 1 else None
    make: Callable[[], Executor]
    if arguments.executor == "ray":
        cpus = 1.0 if arguments.cpus_per_run is None else arguments.cpus_per_run
        resources = RunResources(cpus, arguments.gpus_per_run)
        shared = {path for run in comparison.runs for path in comparison.kind.shared(run.config)}
        folders = [output, *sorted(shared)]
        make = partial(
            RayExecutor, arguments.address, resources, most=arguments.jobs, shared=folders
        )
        threads = resources.threads
    else:
        make = HereExecutor if distributed.launched() else partial(LocalExecutor, jobs, output)
    return Execution(comparison, output, make, out, threads=threads, retries=arguments.retries)


@program("the same command goes on with the runs that are left")
def main(argv: Sequence[str]) -> int:
    """Runs the program; gives its exit code."""
    arguments, flags = parse(argv)
    path = find_file(arguments.file)
    output = user_path(arguments.output or f"runs/{path.stem}")
    chosen = Selection(**{one.name: getattr(arguments, one.name) for one in fields(Selection)})
    comparison = load_comparison(path, flags, chosen, output, arguments.weights)
    if arguments.status:
        print_status(console(), comparison)
        return 0
    with together(comparison.runs[0].config.device):
        out = console(quiet=distributed.rank() != 0)
        comparison.kind.check_data([run.config for run in comparison.runs])
        execution = make_execution(arguments, comparison, output, out)
        execution.work()
        if distributed.rank() == 0 and (finished := find_finished(comparison, output)):
            write_comparison(comparison, finished, output)
            print_comparison(out, comparison, finished, output)
    for run, failure in execution.failures:
        sys.stderr.write(f"failed: {run.name}: {failure.message}; see {run.folder / ERROR}\n")
    return 1 if execution.failures else 0


if __name__ == "__main__":
    sys.exit(main())
