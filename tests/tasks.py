"""Tasks for tests of executors, and a watcher that writes down what it is told."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from experiments.executors import Failure, Task, attempt


class Notes:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.lost: list[str] = []
        self.ends: dict[str, Failure | None] = {}
        self.most = 0

    def started(self, task: Task) -> None:
        self.begun.append(task.name)

    def retried(self, task: Task, failure: Failure) -> None:
        assert failure.died
        self.lost.append(task.name)

    def ended(self, task: Task, failure: Failure | None) -> None:
        self.ends[task.name] = failure

    def look(self, tasks: Sequence[Task]) -> None:
        self.most = max(self.most, len(tasks))


class Inline:
    """Does its tasks at once, in this process."""

    def __init__(self, jobs: int, folder: Path) -> None:
        assert folder.is_dir()
        self.jobs = jobs
        self.closed = False

    def room(self) -> int:
        return self.jobs

    def start(self, task: Task) -> "Future[Failure | None]":
        future: Future[Failure | None] = Future()
        future.set_result(attempt(task.work))
        return future

    def close(self) -> None:
        self.closed = True


def make_task(name: str, work: Callable[[], None], folder: Path) -> Task:
    return Task(name, work, folder / name, 1)


def die_unless(path: Path) -> None:
    """Dies when it is called for the first time."""
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def write_node(path: Path) -> None:
    """Writes which node of a Ray cluster it is done on; long enough for one to be busy."""
    import ray

    path.write_text(ray.get_runtime_context().get_node_id())
    time.sleep(1)


def write_gpus(path: Path) -> None:
    """Writes which GPUs it may use."""
    path.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))


def linger(path: Path) -> None:
    """Goes on until it is asked to end by a signal, and then writes that it was."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
    path.touch()
    try:
        while True:
            time.sleep(0.02)
    except KeyboardInterrupt:
        path.write_text("kept")
        raise


def wait_for(path: Path) -> None:
    """Until a file is there, a minute at most."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)
