"""Processes of this machine."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
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
        self._waiting = ThreadPoolExecutor(jobs)

    def room(self) -> int:
        """The number of jobs."""
        return len(self._slots)

    def start(self, task: Task) -> "Future[Failure | None]":
        """Begins a task in a process that has none."""
        slot = self._idle.pop(0)
        slot.start(task)
        future = self._waiting.submit(self._result, slot)
        self._busy[future] = slot
        return future

    def _result(self, slot: "ProcessSlot") -> Failure | None:
        failure = slot.result()
        self._idle.append(slot)
        return failure

    def close(self) -> None:
        """Asks for the end of what is being done, and forces it after a while."""
        for future, slot in self._busy.items():
            if not future.done():
                slot.terminate()
        try:
            wait(self._busy, timeout=GRACE_SECONDS)
        finally:
            for slot in self._slots:
                slot.close()
            self._waiting.shutdown()


class ProcessSlot:
    """A process that does one task after the other; a new one takes the place of a dead one.

    Args:
        log: File for what the process prints.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: SpawnProcess | None = None
        self._busy = False

    def start(self, task: Task) -> None:
        """Begins a task, in a process that is started if there is none."""
        if self._process is None or not self._process.is_alive():
            context = get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, str(self._log)))
            with _interrupts_ignored():
                self._process.start()
            # Else nobody would notice that it has died.
            theirs.close()
        self._busy = True
        with contextlib.suppress(BrokenPipeError):  # It has died since; `result` says so.
            self._pipe.send(task.work)

    def result(self) -> Failure | None:
        """How the task ended; waits until it has."""
        assert self._process is not None
        try:
            failure: Failure | None = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            message = f"the process {_how(self._process.exitcode)}"
            failure = Failure(message, f"What it printed: {self._log}\n", died=True)
        self._busy = False
        return failure

    def terminate(self) -> None:
        """Asks the process to end; its work may first keep what it has done."""
        if self._process is not None:
            self._process.terminate()

    def close(self) -> None:
        """Ends the process, at once if it does something."""
        if self._process is not None:
            if self._busy:
                self._process.kill()
            else:
                self._pipe.close()
            self._process.join()


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


def _serve(pipe: "Connection[Failure | None, Callable[[], None]]", log: str) -> None:
    """Does what it is sent; prints into a file, and ends with the process that started it."""
    with Path(log).open("a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(_attempt(pipe.recv()))


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
