"""Where tasks are done: in processes of this machine, or on a cluster (`executors.cluster`)."""

from experiments.executors.base import (
    Executor,
    Failure,
    Task,
    Watcher,
    attempt,
    work_off,
)
from experiments.executors.local import HereExecutor, LocalExecutor

__all__ = [
    "Executor",
    "Failure",
    "HereExecutor",
    "LocalExecutor",
    "Task",
    "Watcher",
    "attempt",
    "work_off",
]
