"""Where tasks are done: in processes of this machine, or on a cluster (`executors.cluster`).

- `base.py`: a task, a failure, and an `Executor`, which does tasks side by side.
- `local.py`: here, or in processes of this machine.
- `cluster.py`: under Ray; `place.py`: what runs on its nodes.
"""

from experiments.executors.base import (
    Executor,
    Failure,
    Task,
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
    "attempt",
    "work_off",
]
