"""The process of one method alone: it trains, and tells how much memory that took."""

import ctypes
import gc
import json
import resource
import sys
from contextlib import closing, suppress
from pathlib import Path

import torch

from agents import build_agent
from experiments.benchmarks.memory import HistoryMeter
from experiments.config import ExperimentConfig
from experiments.console import ConsoleProgress, console
from experiments.experiment import build
from mtkd_env.files import write_text

# Where Linux tells the most memory that a process has had, and is told to forget it.
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

# The name of that in it, and what is written into the other to that end.
MARK, FORGET_MARK = "VmHWM:", "5"

KIBI = 1024


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
