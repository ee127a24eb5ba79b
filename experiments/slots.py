"""Processes that work tasks off side by side, each of them at the cost of its own task only."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """Something to do in a process of its own.

    Attributes:
        name: What people call it.
        work: What to do; goes through pickle.
        log: A file of one JSON object a line in which the work tells how far it is.
        epochs: How many lines that will be.
    """

    name: str
    work: Callable[[], None]
    log: Path
    epochs: int


@dataclass(frozen=True)
class Failure:
    """Why a task did not end well.

    Attributes:
        message: In one line.
        details: The traceback.
    """

    message: str
    details: str


class Watcher(Protocol):
    """Who is told how the tasks go."""

    def started(self, task: Task) -> None:
        """A task is about to begin."""

    def ended(self, task: Task, failure: Failure | None) -> None:
        """A task has ended, well or not."""

    def look(self, tasks: Sequence[Task | None]) -> None:
        """The task of every slot, twice a second."""


class Slot(Protocol):
    """Does one task at a time."""

    task: Task | None

    def start(self, task: Task) -> "Future[Failure | None]":
        """Begins a task."""

    def result(self) -> tuple[Task, Failure | None]:
        """The task and how it ended, once it has."""

    def close(self) -> None:
        """Ends the slot, and with it a task that it has not finished."""


def work_off(tasks: Sequence[Task], slots: Sequence[Slot], watcher: Watcher) -> dict[Task, Failure]:
    """Gives every slot one task after the other until none is left; gives those that failed."""
    failures: dict[Task, Failure] = {}
    waiting = deque(tasks)
    running: dict[Future[Failure | None], Slot] = {}
    while waiting or running:
        for slot in slots:
            if slot.task is None and waiting:
                task = waiting.popleft()
                watcher.started(task)
                running[slot.start(task)] = slot
        done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        for future in done:
            slot = running.pop(future)
            task, failure = slot.result()
            if failure is not None:
                failures[task] = failure
            watcher.ended(task, failure)
        watcher.look([slot.task for slot in slots])
    return failures


class ProcessSlot:
    """A process that does one task after the other; a new one takes the place of a dead one.

    Args:
        log: File for what the process prints.
    """

    def __init__(self, log: Path) -> None:
        self.task: Task | None = None
        self._log = log
        self._executor: ProcessPoolExecutor | None = None
        self._process: BaseProcess | None = None
        self._future: Future[Failure | None] | None = None

    def start(self, task: Task) -> "Future[Failure | None]":
        """Begins a task, in a process that is started if there is none."""
        try:
            self._future = self._submit(task.work)
        except BrokenProcessPool:  # It died between two tasks.
            self._end()
            self._future = self._submit(task.work)
        self.task = task
        return self._future

    def _submit(self, work: Callable[[], None]) -> "Future[Failure | None]":
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                1, mp_context=get_context("spawn"), initializer=_begin, initargs=(str(self._log),)
            )
        before = set(active_children())
        with _interrupts_ignored():
            future = self._executor.submit(attempt, work)
        self._process = next(iter(set(active_children()) - before), self._process)
        return future

    def result(self) -> tuple[Task, Failure | None]:
        """The task and how it ended, once it has."""
        assert self.task is not None
        assert self._future is not None
        try:
            return self.task, self._future.result()
        except BrokenProcessPool:
            failure = Failure(f"the process {self._end()}", f"What it printed: {self._log}\n")
            return self.task, failure
        finally:
            self.task = self._future = None

    def close(self) -> None:
        """Ends the process at once, whatever it does."""
        self._end()

    def _end(self) -> str:
        """Ends the process; says how it ended."""
        if self._process is not None and self._future is not None and not self._future.done():
            self._process.kill()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        code = self._process.exitcode if self._process is not None else None
        self._executor = self._process = None
        return _how(code)


def _how(code: int | None) -> str:
    """What the exit code of a process that should have gone on says."""
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that are started meanwhile ignore Ctrl-C; whoever started them ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# What runs in the process.


def _begin(log: str) -> None:
    """Prepares a process: it prints into a file, and ends with the process that started it."""
    with Path(log).open("a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def attempt(work: Callable[[], None]) -> Failure | None:
    """Does something; gives what went wrong as text, which any process can read."""
    try:
        work()
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        return Failure(message, traceback.format_exc())
    return None
