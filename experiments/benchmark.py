"""Measures what methods cost, and what rewards are worth.

mtkd benchmark --what step --variant "half=--precision bf16" --json runs/step.json
mtkd benchmark --what agents --methods pg,ppo --rounds 5
mtkd benchmark --what scaling --axes teachers,batch
mtkd benchmark --what reward-signal --teachers my_pool.yaml --epochs 0,5
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from experiments.benchmarks import BENCHMARKS, Benchmark, Request
from experiments.benchmarks.variants import parse_variants
from experiments.console import console
from experiments.running.failures import Parser, at_least, names, numbers, path_argument, program
from mtkd_env.errors import ConfigError, lookup
from mtkd_env.files import write_text

# Flags that only some of the benchmarks know.
OPTIONAL = ("methods", "steps", "epochs", "variant", "axes")


def _parser() -> Parser:
    about = "\n".join(f"  {name:14} {entry.about}" for name, entry in BENCHMARKS.items())
    parser = Parser(
        prog="mtkd benchmark",
        description=f"{__doc__}\nwhat can be measured:\n{about}",
        epilog="Every other flag is one of mtkd run: --data.dataset npz --student.network ...; ",
    )
    parser.add_argument("--what", required=True, help="what to measure: " + ", ".join(BENCHMARKS))
    parser.add_argument("--methods", type=names, help="only these: aver,camkd,mmkd")
    parser.add_argument("--steps", type=at_least(1), help="SGD steps of a method in a round")
    parser.add_argument("--rounds", type=at_least(1), help="rounds; batches for reward-signal")
    parser.add_argument(
        "--epochs",
        type=numbers,
        help="when reward-signal looks: 0,1,5,15; how long memory trains: 3",
    )
    parser.add_argument(
        "--variant",
        action="append",
        metavar="NAME=FLAGS",
        help="step: measure every method with these flags of mtkd run too, in the same run; may be "
        'given several times: --variant "wide=--student.width 0.5"',
    )
    parser.add_argument(
        "--axes", type=names, help="scaling: only these of teachers,batch,width,size"
    )
    parser.add_argument(
        "--json",
        type=path_argument,
        help="file for all numbers; the picture is put beside it",
    )
    return parser


def parse(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The program's own arguments, and the flags of mtkd run.

    Raises:
        ConfigError: A value that cannot be used, or a flag that is said in another way here.
        SystemExit: After `--help`.
    """
    arguments, flags = _parser().parse_known_args(argv)
    if any(flag.partition("=")[0] == "--algo" for flag in flags):
        raise ConfigError("--algo: cannot be given here; see --methods")
    if arguments.json is not None and arguments.json.suffix != ".json":
        raise ConfigError(f"--json: expected a file that ends in .json, got '{arguments.json}'")
    return arguments, flags


def make_request(
    arguments: Namespace, flags: Sequence[str], benchmark: Benchmark, out: Console
) -> Request:
    """What is asked of a benchmark.

    Raises:
        ConfigError: A flag that means nothing to this benchmark.
    """
    for flag in OPTIONAL:
        if getattr(arguments, flag) is not None and flag not in benchmark.flags:
            raise ConfigError(f"--{flag}: means nothing to --what {arguments.what}")
    return Request(
        flags=flags,
        methods=arguments.methods,
        steps=arguments.steps or benchmark.steps,
        rounds=arguments.rounds or benchmark.rounds,
        epochs=benchmark.epochs if arguments.epochs is None else sorted({*arguments.epochs}),
        out=out,
        variants=parse_variants(arguments.variant or ()),
        axes=arguments.axes,
    )


def _prepare(path: Path) -> None:
    """Makes the folder of a file now rather than after minutes of measuring."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--json: cannot make {path.parent}: {error.strerror}") from error


@program("nothing was written")
def main(argv: Sequence[str]) -> int:
    """Runs the program; gives its exit code."""
    out = console()
    arguments, flags = parse(argv)
    path = arguments.json
    benchmark = lookup(BENCHMARKS, arguments.what, "--what")
    request = make_request(arguments, flags, benchmark, out)
    if path is not None:
        _prepare(path)
    outcome = benchmark.measure(request)
    for table in outcome.tables:
        out.print(table)
    for note in outcome.notes:
        out.print(note, soft_wrap=True)
    if path is not None:
        write_text(path, json.dumps(outcome.values, indent=2, default=asdict) + "\n")
        picture = path.with_suffix(".png")
        outcome.draw(picture)
        out.print(f"written: {path}, {picture}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
