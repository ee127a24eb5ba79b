"""Processes of this machine."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path

from experiments.executors.base import GRACE_SECONDS, Failure, Task, attempt


class HereExecutor:
    """This process, which does its tasks together with the others that `torchrun` has started.

    What goes wrong ends the program, and with it the other processes, which would wait for it.
    """

    def room(self) -> int:
        """One task at a time."""
        return 1

    def start(self, task: Task) -> "Future[Failure | None]":
        """Does a task."""
        task.work()
        future: Future[Failure | None] = Future()
        future.set_result(None)
        return future

    def collect(self, future: "Future[Failure | None]") -> Failure | None:
        """How a task ended."""
        return future.result()

    def close(self) -> None:
        """Does nothing."""


class LocalExecutor:
    """As many processes as there are jobs.

    Args:
        jobs: Tasks at a time.
        folder: Folder for what the processes print.
    """

    def __init__(self, jobs: int, folder: Path) -> None:
        self._slots = [ProcessSlot(folder / f"slot{number}.log") for number in range(1, jobs + 1)]
        self._idle = list(self._slots)
        self._busy: dict[Future[Failure | None], ProcessSlot] = {}

    def room(self) -> int:
        """The number of jobs."""
        return len(self._slots)

    def start(self, task: Task) -> "Future[Failure | None]":
        """Begins a task in a process that has none."""
        slot = self._idle.pop(0)
        future = slot.start(task)
        self._busy[future] = slot
        return future

    def collect(self, future: "Future[Failure | None]") -> Failure | None:
        """How a task ended, once its future is done."""
        slot = self._busy.pop(future)
        self._idle.append(slot)
        return slot.result()

    def close(self) -> None:
        """Asks for the end of what is being done, and forces it after a while."""
        for slot in self._busy.values():
            slot.terminate()
        try:
            wait(self._busy, timeout=GRACE_SECONDS)
        finally:
            for slot in self._slots:
                slot.close()


class ProcessSlot:
    """A process that does one task after the other; a new one takes the place of a dead one.

    Args:
        log: File for what the process prints.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._executor: ProcessPoolExecutor | None = None
        self._process: BaseProcess | None = None
        self._future: Future[Failure | None] | None = None

    def start(self, task: Task) -> "Future[Failure | None]":
        """Begins a task, in a process that is started if there is none."""
        try:
            self._future = self._submit(task)
        except BrokenProcessPool:  # It died between two tasks.
            self._end()
            self._future = self._submit(task)
        return self._future

    def _submit(self, task: Task) -> "Future[Failure | None]":
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                1, mp_context=get_context("spawn"), initializer=_begin, initargs=(str(self._log),)
            )
        before = set(active_children())
        with _interrupts_ignored():
            future = self._executor.submit(_attempt, task.work)
        self._process = next(iter(set(active_children()) - before), self._process)
        return future

    def result(self) -> Failure | None:
        """How the task ended, once it has."""
        assert self._future is not None
        try:
            return self._future.result()
        except BrokenProcessPool:
            message = f"the process {self._end()}"
            return Failure(message, f"What it printed: {self._log}\n", died=True)
        finally:
            self._future = None

    def terminate(self) -> None:
        """Asks the process to end; its work may first keep what it has done."""
        if self._process is not None:
            self._process.terminate()

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


def _attempt(work: Callable[[], None]) -> Failure | None:
    """Does something; a process that is asked to end meanwhile has not failed, but died."""
    try:
        return attempt(work)
    except (SystemExit, KeyboardInterrupt) as end:
        return Failure(f"the process was asked to end ({type(end).__name__})", "", died=True)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
