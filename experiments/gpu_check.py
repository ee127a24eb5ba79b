"""Checks this package on one GPU and measures it there: a JSON file and a page, in ten minutes.

mtkd gpu-check --folder gpu_check
mtkd gpu-check --device cpu --quick

Needs no network. What fails is named, and the rest goes on. `--quick` measures as little as there
is to measure, to see that all of it works.
"""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from experiments.benchmarks.synthetic import write_noise
from experiments.benchmarks.timing import describe_machine, this_machine
from experiments.console import console
from experiments.running.failures import Parser, at_least, path_argument, program
from experiments.tables import markdown_table
from mtkd_env.computing import find_device
from mtkd_env.errors import ConfigError
from mtkd_env.files import write_text

COMMAND = (sys.executable, "-m", "experiments.command")
TESTS = Path(__file__).resolve().parents[1] / "tests"

# The longest that a program of a check may take [s].
LIMIT = 240

# Batches of 64 in an epoch of CIFAR's 50,000 training images.
CIFAR_STEPS = 781

POOLS = {
    "small": ("resnet8", ("resnet8", "resnet14", "resnet20", "wrn_16_1")),
    "table1": ("shufflenetv2", ("regnety_400mf", "regnetx_400mf", "resnet32x4", "wrn_28_4")),
}
# Compiling Table 1's networks alone takes longer than all checks may.
VARIANTS = {
    "small": {"bf16": "--precision bf16", "graphs": "--compile reduce-overhead"},
    "table1": {"bf16": "--precision bf16"},
}


class CheckError(Exception):
    """A check has failed; says why."""


def finished(process: "subprocess.Popen[str]", limit: float, expected: Sequence[int] = (0,)) -> str:
    """What a program has written, once it has ended.

    Raises:
        CheckError: It took too long [s], or ended with another code.
    """
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        raise CheckError(f"took more than {limit:g} s") from None
    if process.returncode not in expected:
        raise CheckError(f"ended with code {process.returncode}: {output[-800:].strip()}")
    return output


@contextmanager
def running(*command: str) -> "Iterator[subprocess.Popen[str]]":
    """A program, which at the end of the block is ended with all that it has started."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([*command], text=True, start_new_session=True, **both)  # type: ignore[call-overload] # both are int
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


class Checks:
    """Everything that is checked, by its name.

    Args:
        folder: For what the checks write.
        device: Where they compute.
        quick: Whether to measure as little as possible.
        limit: The longest that a program of a check may take [s].
    """

    def __init__(
        self, folder: Path, device: str, *, quick: bool = False, limit: float = LIMIT
    ) -> None:
        self._folder, self._quick, self._limit = folder, quick, limit
        side, count = (16, 64) if quick else (32, 1280)
        noise = write_noise(folder, channels=3, classes=10, side=side, count=count)
        self._common = [
            *("--device", device, "--data.dataset", "npz"),
            *("--data.arguments.path", str(noise)),
            *("--data.batch_size", "16" if quick else "64", "--output", str(folder / "runs")),
        ]
        self.all: dict[str, Callable[[], Any]] = {
            "tests": self.tests,
            **{name: partial(self.steps, name) for name in POOLS},
            "memory": self.memory,
            "resumed": self.resumed,
            "two processes": self.two_processes,
        }

    def tests(self) -> str:
        """The tests that need a GPU; its last line."""
        if not TESTS.is_dir():
            raise CheckError("the tests are only in a clone of the repository")
        chosen = ["tests/test_pretended_gpu.py"] if self._quick else ["-m", "gpu", "tests"]
        # A warning of another machine's libraries is no failure of the GPU.
        flags = ["-q", "-p", "no:cacheprovider", "-W", "default", "--rootdir", str(TESTS.parent)]
        paths = [str(TESTS.parent / one) if one.startswith("tests") else one for one in chosen]
        output = self._run(sys.executable, "-m", "pytest", *flags, *paths)
        return output.strip().splitlines()[-1]

    def steps(self, pool: str) -> dict[str, Any]:
        """What a step takes, and an epoch of CIFAR's size."""
        variants = {} if self._quick else VARIANTS[pool]
        flags = [f"--variant={name}={own}" for name, own in variants.items()]
        flags += ["--rounds", "1" if self._quick else "4"]
        found = self._benchmark("step", pool, *flags)
        clock = next(iter(found["methods"]["aver"]))
        rows = {}
        for name, method in found["methods"].items():
            took = method[clock]["milliseconds"]["median"]
            counts = found["counts"][name]
            rows[name] = {
                "ms/step": round(took, 3),
                "s/epoch": round(took * CIFAR_STEPS / 1000, 2),
                "waits/step": round(counts["synchronizations"], 2),
                "operations/step": round(counts["operations"]),
            }
        return rows

    def memory(self) -> dict[str, Any]:
        """The most memory that a training takes."""
        methods = self._benchmark("memory", "small", "--rounds", "1", "--epochs", "1")["methods"]
        return {
            name: {"peak MB": round(one["bytes"]["peak"] / 1e6)} for name, one in methods.items()
        }

    def resumed(self) -> str:
        """A run that was interrupted ends with the student of one that was not."""
        flags = ["run", "--algo", "pg", *self._flags("small"), "--optimizer.epochs", "3"]
        flags += ["--deterministic", "true"]
        whole, halved = (str(self._folder / name) for name in ("whole", "halved"))
        self._run(*COMMAND, *flags, "--output", whole)
        with running(*COMMAND, *flags, "--output", halved) as broken:
            end = time.monotonic() + self._limit
            while not list(Path(halved).glob("*/metrics.jsonl")) and time.monotonic() < end:
                time.sleep(0.05)
            broken.send_signal(signal.SIGINT)
            finished(broken, self._limit, (0, 130))
        (run,) = [path.parent for path in Path(halved).glob("*/config.yaml")]
        if not (run / "result.json").exists():
            self._run(*COMMAND, "run", "--resume", str(run))
        names = [next(Path(one).glob("*/student.safetensors")) for one in (whole, halved)]
        if names[0].read_bytes() != names[1].read_bytes():
            raise CheckError(f"the students differ: {names[0]}, {names[1]}")
        return "the same student"

    def two_processes(self) -> str:
        """Two runs at once on one device."""
        flags = ["run", "--algo", "pg", *self._flags("small"), "--optimizer.epochs", "2"]
        began = time.perf_counter()
        with ExitStack() as both:
            commands = [(*COMMAND, *flags, "--seed", str(seed)) for seed in range(2)]
            for process in [both.enter_context(running(*command)) for command in commands]:
                finished(process, self._limit)
        return f"{time.perf_counter() - began:.1f} s for both"

    def _run(self, *command: str) -> str:
        with running(*command) as process:
            return finished(process, self._limit)

    def _benchmark(self, what: str, pool: str, *flags: str) -> dict[str, Any]:
        """All numbers of a benchmark of equal weights and `pg`."""
        path = self._folder / f"{what}_{pool}.json"
        own = ["--what", what, "--methods", "pg", "--json", str(path), *flags]
        self._run(*COMMAND, "benchmark", *own, *self._flags(pool))
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _flags(self, pool: str) -> list[str]:
        student, names = POOLS[pool if not self._quick else "small"]
        width = 0.125 if self._quick else 1.0
        teachers = [{"network": name, "kind": "random"} for name in names]
        if self._quick:
            teachers = [{**teacher, "width": width} for teacher in teachers[:2]]  # type: ignore[dict-item] # a number
        own = ["--student.network", student, "--student.width", str(width)]
        return [*self._common, "--teachers.teachers", json.dumps(teachers), *own]


def page(found: dict[str, Any]) -> str:
    """All that was found, as a page of Markdown."""
    lines = ["# GPU check", "", f"On {found['machine']['about']}.", ""]
    for name, check in found["checks"].items():
        state = "FAILED: " + check["failed"] if "failed" in check else "passed"
        lines += [f"## {name}", "", f"{state} ({check['seconds']:.0f} s)", ""]
        value = check.get("found")
        if isinstance(value, dict):
            heads = ["", *next(iter(value.values()))]
            rows = [[row, *map(str, cells.values())] for row, cells in value.items()]
            lines.append(markdown_table([heads, *rows]))
        elif value:
            lines += [str(value), ""]
    return "\n".join(lines)


def check(checks: Checks) -> Iterator[tuple[str, dict[str, Any]]]:
    """Does all checks; of each its name, and what it has found or why it failed."""
    for name, work in checks.all.items():
        began = time.perf_counter()
        try:
            outcome = {"found": work()}
        except Exception as error:  # Whatever it is, the others are worth doing.
            outcome = {"failed": f"{type(error).__name__}: {error}"}
        yield name, {**outcome, "seconds": time.perf_counter() - began}


def _arguments(argv: Sequence[str]) -> Namespace:
    parser = Parser(prog="mtkd gpu-check", description=__doc__, epilog="")
    parser.add_argument("--folder", type=path_argument, default=Path("gpu_check"), help="results")
    parser.add_argument("--device", default="cuda", help="where to compute")
    parser.add_argument("--quick", action="store_true", help="measure as little as possible")
    parser.add_argument(
        "--limit", type=at_least(1), default=LIMIT, help="longest that a program may take [s]"
    )
    return parser.parse_args(argv)


@program("nothing was written")
def main(argv: Sequence[str]) -> int:
    """Runs the program; gives its exit code."""
    arguments = _arguments(argv)
    device = find_device(arguments.device)
    folder: Path = arguments.folder
    if folder.exists():
        raise ConfigError(f"--folder: expected one that is not there yet, got '{folder}'")
    folder.mkdir(parents=True)
    out = console()
    limits = {"quick": arguments.quick, "limit": arguments.limit}
    machine = {**describe_machine(device), "about": this_machine(device)}
    checks: dict[str, dict[str, Any]] = {}
    found = {"machine": machine, "checks": checks}
    for name, outcome in check(Checks(folder, arguments.device, **limits)):
        out.print(f"{name}: {outcome.get('failed', 'passed')}")
        checks[name] = outcome
        # Now, so that whoever stops it has what was found until then.
        write_text(folder / "gpu_check.json", json.dumps(found, indent=2) + "\n")
        write_text(folder / "gpu_check.md", page(found))
    out.print(f"written: {folder / 'gpu_check.json'}, {folder / 'gpu_check.md'}", soft_wrap=True)
    return int(any("failed" in one for one in checks.values()))


if __name__ == "__main__":
    sys.exit(main())
