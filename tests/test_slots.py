import os
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import pytest

from experiments.slots import Failure, ProcessSlot, Task, attempt, work_off


class Notes:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.started_: list[str] = []
        self.ended_: dict[str, Failure | None] = {}
        self.most = 0

    def started(self, task: Task) -> None:
        self.started_.append(task.name)

    def ended(self, task: Task, failure: Failure | None) -> None:
        self.ended_[task.name] = failure

    def look(self, tasks: Sequence[Task | None]) -> None:
        self.most = max(self.most, sum(task is not None for task in tasks))


def fail() -> None:
    raise ValueError("two\nlines")


@pytest.fixture
def slots(tmp_path: Path) -> Iterator[list[ProcessSlot]]:
    made = [ProcessSlot(tmp_path / f"slot{number}.log") for number in (1, 2)]
    yield made
    for slot in made:
        slot.close()
    assert not active_children()


def task(name: str, work: partial[None], folder: Path) -> Task:
    return Task(name, work, folder / name, 1)


def test_work_that_ends_well_has_no_failure() -> None:
    assert attempt(lambda: None) is None


def test_a_failure_is_told_in_one_line_and_in_full() -> None:
    failure = attempt(fail)
    assert failure is not None
    assert failure.message == "two lines"
    assert failure.details.startswith("Traceback")
    assert "in fail" in failure.details


def test_an_error_without_a_text_is_told_by_its_name() -> None:
    def work() -> None:
        raise MemoryError

    failure = attempt(work)
    assert failure is not None
    assert failure.message == "MemoryError"


def test_a_process_that_dies_costs_only_its_own_task(
    slots: list[ProcessSlot], tmp_path: Path
) -> None:
    killed = partial(signal.raise_signal, signal.SIGKILL)
    works = {
        "one": partial(Path.touch, tmp_path / "made one"),
        "killed": killed,
        "left": partial(os._exit, 3),
        "failing": partial(int, "word"),
        "two": partial(Path.touch, tmp_path / "made two"),
        "three": partial(print, "said", "aloud"),
    }
    tasks = [task(name, work, tmp_path) for name, work in works.items()]
    notes = Notes()
    failures = work_off(tasks, slots, notes)
    assert notes.started_ == list(works)
    assert notes.ended_.keys() == works.keys()
    messages = {task.name: failure.message for task, failure in failures.items()}
    assert messages == {
        "killed": "the process was killed by SIGKILL",
        "left": "the process ended with exit code 3",
        "failing": "invalid literal for int() with base 10: 'word'",
    }
    assert {name for name, failure in notes.ended_.items() if failure} == messages.keys()
    assert (tmp_path / "made one").exists()
    assert (tmp_path / "made two").exists()
    assert notes.most <= 2
    for slot in slots:
        slot.close()
    printed = [path.read_text() for path in tmp_path.glob("slot*.log")]
    assert sorted(printed) == ["", "said aloud\n"]


def test_a_process_that_died_between_two_tasks_is_replaced(
    slots: list[ProcessSlot], tmp_path: Path
) -> None:
    slot = slots[0]
    assert work_off([task("one", partial(int, "1"), tmp_path)], [slot], Notes()) == {}
    (process,) = active_children()
    process.kill()
    process.join()
    time.sleep(0.2)  # Until the slot's executor has noticed.
    assert work_off([task("two", partial(int, "2"), tmp_path)], [slot], Notes()) == {}


def test_closing_ends_what_is_not_finished(slots: list[ProcessSlot], tmp_path: Path) -> None:
    slot = slots[0]
    future = slot.start(task("long", partial(time.sleep, 600), tmp_path))
    started = time.monotonic()
    slot.close()
    assert future.done()
    assert time.monotonic() - started < 60
    assert not active_children()


def test_processes_ignore_interrupts_which_the_one_that_started_them_handles(
    slots: list[ProcessSlot], tmp_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    interrupt = partial(signal.raise_signal, signal.SIGINT)
    assert work_off([task("interrupted", interrupt, tmp_path)], slots, Notes()) == {}
    assert signal.getsignal(signal.SIGINT) is handler
