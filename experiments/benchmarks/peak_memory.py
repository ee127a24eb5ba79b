"""The peak of the memory of every method, each of them in a process of its own."""

import json
from concurrent.futures import wait
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.benchmarks.base import Outcome, Request
from experiments.benchmarks.memory_report import Peaks, memory_report
from experiments.benchmarks.peak import train
from experiments.benchmarks.shared import check_shareable, with_reference
from experiments.benchmarks.timing_report import REFERENCE
from experiments.config import ExperimentConfig
from experiments.executors import Task
from experiments.executors.local import ProcessSlot
from mtkd_env.errors import ConfigError

METHODS = ("none", "camkd", "pg", "ppo", "ddpg")


def measure(request: Request) -> Outcome:
    """Trains a student under every method, in turns, each time in a new process.

    Raises:
        ConfigError: A method that does not exist, or has other teachers than the others, several
            lengths of the training, or a process that failed; names its method.
    """
    configs = request.configs(with_reference(request.methods or METHODS))
    check_shareable(configs)
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
    """What `peak.train` tells of a method, from a process of its own.

    Raises:
        ConfigError: The process failed; says how.
    """
    with TemporaryDirectory(prefix="mtkd_memory_") as folder:
        log, result = (Path(folder) / name for name in ("process.log", "result.json"))
        work = partial(train, config, epochs, result)
        with closing(ProcessSlot(log)) as slot:
            wait([slot.start(Task(config.algo, work, log=result, epochs=epochs))])
            failure = slot.result()
        if failure is not None:
            raise ConfigError(f"{config.algo}: {failure.message}") from RuntimeError(
                failure.details
            )
        found: dict[str, int] = json.loads(result.read_text(encoding="utf-8"))
        return found
