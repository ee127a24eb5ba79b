"""Checks this package on one GPU and measures it there: a JSON file and a page, in ten minutes.

python experiments/gpu_check.py --folder gpu_check
python experiments/gpu_check.py --device cpu --quick

Needs no network. What fails is named, and the rest goes on. `--quick` measures as little as there
is to measure, to see that all of it works.
"""

import json
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.benchmarks.synthetic import write_noise
from experiments.benchmarks.timing import describe_machine
from experiments.console import console
from experiments.running.failures import Parser, path_argument, program
from experiments.tables import markdown_table
from mtkd_env.computing import find_device
from mtkd_env.errors import ConfigError
from mtkd_env.files import write_text

COMMAND = (sys.executable, "-m", "experiments.command")
TESTS = Path(__file__).resolve().parents[1] / "tests"

# The longest that a check may take [s].
LIMIT = 150

# Batches of 64 in an epoch of CIFAR's 50,000 training images.
CIFAR_STEPS = 781

POOLS = {
    "small": ("resnet8", ("resnet8", "resnet14", "resnet20", "wrn_16_1")),
    "table1": ("shufflenetv2", ("regnety_400mf", "regnetx_400mf", "resnet32x4", "wrn_28_4")),
}
VARIANTS = {
    "bf16": "--precision bf16",
    "graphs": "--compile reduce-overhead",
    "graphs, bf16": "--compile reduce-overhead --precision bf16",
}


class CheckError(Exception):
    """A check has failed; says why."""


def finished(process: "subprocess.Popen[str]", expected: Sequence[int] = (0,)) -> str:
    """What a program has written, once it has ended.

    Raises:
        CheckError: It took too long, or ended with another code.
    """
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise CheckError(f"took more than {LIMIT} s") from None
    if process.returncode not in expected:
        raise CheckError(f"ended with code {process.returncode}: {output[-800:].strip()}")
    return output


def started(*command: str) -> "subprocess.Popen[str]":
    """A program that has been started."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*command], text=True, **both)  # type: ignore[call-overload] # both are int


class Checks:
    """Everything that is checked, by its name.

    Args:
        folder: For what the checks write.
        device: Where they compute.
        quick: Whether to measure as little as possible.
    """

    def __init__(self, folder: Path, device: str, *, quick: bool) -> None:
        self._folder, self._quick = folder, quick
        side, count = (16, 64) if quick else (32, 2560)
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
        flags = ["-q", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent)]
        paths = [str(TESTS.parent / one) if one.startswith("tests") else one for one in chosen]
        output = finished(started(sys.executable, "-m", "pytest", *flags, *paths))
        return output.strip().splitlines()[-1]

    def steps(self, pool: str) -> dict[str, Any]:
        """What a step takes, and an epoch of CIFAR's size."""
        variants = {} if self._quick else VARIANTS
        flags = [f"--variant={name}={own}" for name, own in variants.items()]
        flags += ["--rounds", "1" if self._quick else "5"]
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
        whole, halved = (str(self._folder / name) for name in ("whole", "halved"))
        finished(started(*COMMAND, *flags, "--output", whole))
        broken = started(*COMMAND, *flags, "--output", halved)
        began = time.monotonic()
        while not list(Path(halved).glob("*/metrics.jsonl")) and time.monotonic() < began + LIMIT:
            time.sleep(0.05)
        broken.send_signal(signal.SIGINT)
        finished(broken, (0, 130))
        (run,) = [path.parent for path in Path(halved).glob("*/config.yaml")]
        if not (run / "result.json").exists():
            finished(started(*COMMAND, "run", "--resume", str(run)))
        names = [next(Path(one).glob("*/student.safetensors")) for one in (whole, halved)]
        if names[0].read_bytes() != names[1].read_bytes():
            raise CheckError(f"the students differ: {names[0]}, {names[1]}")
        return "the same student"

    def two_processes(self) -> str:
        """Two runs at once on one device."""
        flags = ["run", "--algo", "pg", *self._flags("small"), "--optimizer.epochs", "2"]
        began = time.perf_counter()
        for process in [started(*COMMAND, *flags, "--seed", str(seed)) for seed in range(2)]:
            finished(process)
        return f"{time.perf_counter() - began:.1f} s for both"

    def _benchmark(self, what: str, pool: str, *flags: str) -> dict[str, Any]:
        """All numbers of a benchmark of equal weights and `pg`."""
        path = self._folder / f"{what}_{pool}.json"
        own = ["--what", what, "--methods", "pg", "--json", str(path), *flags]
        finished(started(*COMMAND, "benchmark", *own, *self._flags(pool)))
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
    lines = ["# GPU check", "", f"{found['machine']}", ""]
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


def check(checks: Checks, say: Callable[[str], None]) -> dict[str, Any]:
    """Does all checks; what each has found, or why it failed."""
    found: dict[str, Any] = {}
    for name, work in checks.all.items():
        began = time.perf_counter()
        try:
            outcome = {"found": work()}
        except Exception as error:  # Whatever it is, the others are worth doing.
            outcome = {"failed": f"{type(error).__name__}: {error}"}
        found[name] = {**outcome, "seconds": time.perf_counter() - began}
        say(f"{name}: {outcome.get('failed', 'passed')}")
    return found


def _arguments(argv: Sequence[str]) -> Namespace:
    parser = Parser(prog="gpu_check.py", description=__doc__, epilog="")
    parser.add_argument("--folder", type=path_argument, default=Path("gpu_check"), help="results")
    parser.add_argument("--device", default="cuda", help="where to compute")
    parser.add_argument("--quick", action="store_true", help="measure as little as possible")
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
    checks = check(Checks(folder, arguments.device, quick=arguments.quick), out.print)
    found = {"machine": describe_machine(device), "checks": checks}
    write_text(folder / "gpu_check.json", json.dumps(found, indent=2) + "\n")
    write_text(folder / "gpu_check.md", page(found))
    out.print(f"written: {folder / 'gpu_check.json'}, {folder / 'gpu_check.md'}", soft_wrap=True)
    return int(any("failed" in one for one in checks.values()))


if __name__ == "__main__":
    sys.exit(main())
