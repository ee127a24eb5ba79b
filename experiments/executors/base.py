"""Tasks that are done side by side, each of them at the cost of itself only."""

import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

POLL_SECONDS = 0.5

# Time that tasks have to keep what they have done, when they are ended before their time.
GRACE_SECONDS = 30.0


@dataclass(frozen=True)
class Task:
    """Something to do in a process of its own.

    Attributes:
        name: What people call it.
        work: What to do; goes through pickle. It may be begun again after its process has died.
        log: A file of one JSON object a line in which the work tells how far it is.
        epochs: How far it will be at its end.
        clock: What in a line of the log says how far it is; with none in it, the lines count.
    """

    name: str
    work: Callable[[], None]
    log: Path
    epochs: int
    clock: str = "epoch"


@dataclass(frozen=True)
class Failure:
    """Why a task did not end well.

    Attributes:
        message: In one line.
        details: The traceback.
        died: Whether its process was lost, which another try may mend; else the work is at fault.
    """

    message: str
    details: str
    died: bool = False


class Watcher(Protocol):
    """Who is told how the tasks go."""

    def started(self, task: Task) -> None:
        """A task is about to begin."""

    def retried(self, task: Task, failure: Failure) -> None:
        """A task has lost its process and waits for another one."""

    def ended(self, task: Task, failure: Failure | None) -> None:
        """A task has ended, well or not."""

    def look(self, tasks: Sequence[Task]) -> None:
        """The tasks that are being done, twice a second."""


class Executor(Protocol):
    """Does tasks side by side."""

    def room(self) -> int:
        """How many tasks it can do at a time, by now."""

    def start(self, task: Task) -> "Future[Failure | None]":
        """Begins a task, for which there must be room; gives how it ends."""

    def close(self) -> None:
        """Ends itself, and with it what it has not finished."""


def work_off(
    tasks: Sequence[Task], executor: Executor, watcher: Watcher, *, retries: int = 0
) -> dict[Task, Failure]:
    """Has all tasks done, in their order as far as there is room; gives those that failed.

    Args:
        tasks: The tasks.
        executor: Does them.
        watcher: Is told how they go.
        retries: How often a task is begun again whose process has died.
    """
    failures: dict[Task, Failure] = {}
    waiting = deque(tasks)
    deaths: Counter[Task] = Counter()
    running: dict[Future[Failure | None], Task] = {}
    while waiting or running:
        for _ in range(min(len(waiting), executor.room() - len(running))):
            task = waiting.popleft()
            watcher.started(task)
            running[executor.start(task)] = task
        if not running:  # There is no room yet.
            time.sleep(POLL_SECONDS)
        for future in wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done:
            task, failure = running.pop(future), future.result()
            if failure is not None and failure.died and deaths[task] < retries:
                deaths[task] += 1
                waiting.appendleft(task)
                watcher.retried(task, failure)
                continue
            if failure is not None:
                failures[task] = failure
            watcher.ended(task, failure)
        watcher.look(list(running.values()))
    return failures


def attempt(work: Callable[[], None]) -> Failure | None:
    """Does something; gives what went wrong as text, which any process can read."""
    try:
        work()
    except Exception as error:
        return Failure(one_line(error), traceback.format_exc())
    return None


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
