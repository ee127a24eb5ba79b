"""Two processes in one group on the CPU, for tests of what they do together."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed as group

PROCESSES = 2
SECONDS = 120


class Pair:
    """Two processes that do the same thing at the same time."""

    def __init__(self, executors: list[ProcessPoolExecutor]) -> None:
        self._executors = executors

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function` gives in each process; it must be importable."""
        futures = [executor.submit(function, *args) for executor in self._executors]
        return [future.result(timeout=SECONDS) for future in futures]


@contextmanager
def two_processes(folder: Path) -> Iterator[Pair]:
    """Starts both processes, and ends them."""
    spawn = multiprocessing.get_context("spawn")
    executors = [
        ProcessPoolExecutor(1, spawn, _begin, (rank, str(folder / "group")))
        for rank in range(PROCESSES)
    ]
    try:
        yield Pair(executors)
    finally:
        for executor in executors:
            executor.submit(group.destroy_process_group)
        for executor in executors:
            executor.shutdown()


def _begin(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    group.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=PROCESSES)
