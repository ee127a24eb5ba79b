"""The peak of the memory of every method, each of them in a process of its own."""

import ctypes
import gc
import json
import resource
import sys
from contextlib import closing, suppress
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from agents import build_agent
from experiments.benchmarks.base import Outcome, Request
from experiments.benchmarks.contestant import comparable_configs
from experiments.benchmarks.memory import HistoryMeter
from experiments.benchmarks.timing import (
    HIGH,
    LOW,
    Percentiles,
    describe_machine,
    ratio_percentiles,
)
from experiments.benchmarks.timing_report import REFERENCE, draw_bars, ratio_cells
from experiments.config import ExperimentConfig
from experiments.console import ConsoleProgress, console, plain_table
from experiments.executors import Task
from experiments.executors.local import ProcessSlot
from experiments.experiment import build
from mtkd_env.errors import ConfigError
from mtkd_env.files import write_text

METHODS = ("none", "camkd", "pg", "ppo", "ddpg")

# Bytes in every round by name (`before`, `peak`, `history`), by method.
Peaks = dict[str, list[dict[str, int]]]

TITLE = f"Peak memory of a training, as a ratio to {REFERENCE}"

MEGA = 1e6

ON_HOST = (
    "peak: resident memory of the whole process, libraries included; where the system cannot "
    "forget an earlier peak (anywhere but on Linux), that of loading the teachers too"
)
ON_DEVICE = "peak: tensors on the device"

# Where Linux tells the most memory that a process has had, and is told to forget it.
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

# The name of that in it, and what is written into the other to that end.
MARK, FORGET_MARK = "VmHWM:", "5"

KIBI = 1024


def measure(request: Request) -> Outcome:
    """Trains a student under every method, in turns, each time in a new process.

    Raises:
        ConfigError: A method that does not exist, or has other teachers than the others, several
            lengths of the training, or a process that failed; names its method.
    """
    configs = comparable_configs(request, request.methods or METHODS)
    if len(request.epochs) > 1 or request.epochs[0] < 1:
        text = ",".join(str(epoch) for epoch in request.epochs)
        raise ConfigError(f"--epochs: expected one number >= 1, got {text}")
    # Here, so that no process has to train the teachers.
    device = request.build(configs[REFERENCE]).env.device
    peaks: Peaks = {name: [] for name in configs}
    turns = list(product(range(request.rounds), configs))
    for _, name in request.count(turns, "processes"):
        peaks[name].append(alone(configs[name], request.epochs[0]))
    return memory_report(peaks, request.epochs[0], configs[REFERENCE], device)


def alone(config: ExperimentConfig, epochs: int) -> dict[str, int]:
    """What `train` tells of a method, from a process of its own.

    Raises:
        ConfigError: The process failed; says how.
    """
    with TemporaryDirectory(prefix="mtkd_memory_") as folder:
        log, result = (Path(folder) / name for name in ("process.log", "result.json"))
        work = partial(train, config, epochs, result)
        with closing(ProcessSlot(log)) as slot:
            slot.start(Task(config.algo, work, log=result, epochs=epochs))
            failure = slot.result()
        if failure is not None:
            raise ConfigError(f"{config.algo}: {failure.message}") from RuntimeError(
                failure.details
            )
        found: dict[str, int] = json.loads(result.read_text(encoding="utf-8"))
        return found


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had: tensors of a CUDA device, or all on the host.

    `ru_maxrss` is not always that: on Linux it begins with what the process had that started this
    one, so there the kernel's mark is read, which `forget_peak` can lower too.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = STATUS.read_text(encoding="utf-8").splitlines() if STATUS.is_file() else []
    for line in lines:
        if line.startswith(MARK):
            return int(line.split()[1]) * KIBI
    # In bytes on a Mac.
    unit = 1 if sys.platform == "darwin" else KIBI
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device: torch.device) -> int:
    """Makes the peak what is there now, where the system can; gives it [bytes]."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return peak_bytes(device)
    # The C library keeps what was freed, for later; not every one has, or needs, this.
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    with suppress(OSError):
        FORGET.write_text(FORGET_MARK, encoding="utf-8")
    return peak_bytes(device)


def train(config: ExperimentConfig, epochs: int, result: Path) -> None:
    """Trains a student under a method and writes down what memory that took [bytes].

    `before`: with images, teachers and a student, before the first step. `peak`: the most until the
    last epoch was over, with the warm-up, without evaluations. `history`: the most of what the
    agent keeps to learn from, in a further epoch.

    Args:
        config: The method.
        epochs: Epochs after the warm-up.
        result: The file.
    """
    with closing(ConsoleProgress(console(quiet=True))) as progress:
        env = build(config, progress).env
    env.reset(seed=config.seed)
    before = forget_peak(env.device)
    arguments = config.agent.arguments
    agent = build_agent(config.agent_name, env, seed=config.seed, arguments=arguments)
    for _ in range(config.warmup.epochs):
        agent.warm_up(env.steps_per_epoch, config.warmup.weights)
    agent.learn(epochs, lambda: None)
    peak = peak_bytes(env.device)
    meter = HistoryMeter(agent)
    meter.start()
    agent.learn(1, lambda: None)
    write_text(result, json.dumps({"before": before, "peak": peak, "history": meter.stop()}))


def memory_report(
    peaks: Peaks, epochs: int, config: ExperimentConfig, device: torch.device
) -> Outcome:
    """Table, notes, numbers and picture.

    Args:
        peaks: Peaks of several methods; those of `REFERENCE` among them.
        epochs: Epochs of every training after the warm-up.
        config: Configuration of the reference.
        device: Where the students were trained.
    """
    ratios = ratio_percentiles(peaks, REFERENCE, "peak")
    medians: dict[str, dict[str, float]] = {}
    for name, found in peaks.items():
        counted = [{**one, "training": one["peak"] - one["before"]} for one in found]
        kinds = counted[0]
        medians[name] = {kind: Percentiles.of([c[kind] for c in counted]).median for kind in kinds}
    rounds = len(peaks[REFERENCE])
    sizes = ("peak", "training", "history")
    headings = ["ratio", f"{LOW}-{HIGH} %", *(f"{kind}\nMB" for kind in sizes)]
    table = plain_table(TITLE, ["method"], headings)
    for name, own in medians.items():
        texts = [f"{own[kind] / MEGA:.2f}" for kind in sizes]
        table.add_row(name, *ratio_cells(ratios[name]), *texts)
    notes = [
        f"{rounds} processes a method, in turns; each a warm-up and {epochs} epochs, without "
        "evaluations",
        ON_DEVICE if device.type == "cuda" else ON_HOST,
        "training: the part of it that came on top of images, teachers and student",
        "history: the most that the agent kept to learn from; a replay buffer counts whole, "
        "of which the peak has only what was filled",
    ]
    methods = {
        name: {"ratio": ratios[name], "bytes": own, "bytes_by_round": peaks[name]}
        for name, own in medians.items()
    }
    values = {
        "title": TITLE,
        "reference": REFERENCE,
        "rounds": rounds,
        "epochs": epochs,
        "machine": describe_machine(device),
        "configuration": config.to_yaml(),
        "methods": methods,
    }
    draw = partial(draw_bars, spreads=ratios, title=TITLE, label=f"peak / {REFERENCE}'s")
    return Outcome([table], notes, values, draw)
