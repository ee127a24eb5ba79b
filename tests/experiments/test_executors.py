import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import pytest

from experiments.executors import Failure, LocalExecutor, Task, attempt, base, work_off
from tasks import Notes, die_unless, linger, make_task, wait_for

LOST = Failure("was lost", "", died=True)


def fail() -> None:
    raise ValueError("two\nlines")


class Script:
    """An executor whose tasks end at once, as it is told."""

    def __init__(self, outcomes: dict[str, list[Failure | None]], rooms: list[int]) -> None:
        self._outcomes = outcomes
        self._rooms = rooms

    def room(self) -> int:
        return self._rooms.pop(0) if len(self._rooms) > 1 else self._rooms[0]

    def start(self, task: Task) -> "Future[Failure | None]":
        future: Future[Failure | None] = Future()
        future.set_result(self._outcomes[task.name].pop(0))
        return future

    def close(self) -> None:
        """Does nothing."""


@pytest.fixture
def executor(tmp_path: Path) -> Iterator[LocalExecutor]:
    made = LocalExecutor(2, tmp_path)
    yield made
    made.close()
    assert not active_children()


# What all executors share.


def test_a_task_is_tried_again_only_if_its_process_died(tmp_path: Path) -> None:
    wrong = Failure("is wrong", "")
    outcomes: dict[str, list[Failure | None]] = {
        "lost once": [LOST, None],
        "lost too often": [LOST, LOST, LOST],
        "wrong": [wrong],
        "good": [None],
    }
    tasks = [make_task(name, partial(int), tmp_path) for name in outcomes]
    notes = Notes()
    failures = work_off(tasks, Script(outcomes, [1]), notes, retries=2)
    assert {task.name: failure for task, failure in failures.items()} == {
        "lost too often": LOST,
        "wrong": wrong,
    }
    # A task that is tried again is the next one.
    assert notes.begun == ["lost once"] * 2 + ["lost too often"] * 3 + ["wrong", "good"]
    assert notes.lost == ["lost once", "lost too often", "lost too often"]
    assert list(notes.ends) == list(outcomes)


def test_without_retries_a_lost_process_is_a_failure(tmp_path: Path) -> None:
    task = make_task("lost", partial(int), tmp_path)
    assert work_off([task], Script({"lost": [LOST]}, [1]), Notes()) == {task: LOST}


def test_as_many_tasks_are_begun_as_there_is_room_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "POLL_SECONDS", 0.01)
    names = [str(number) for number in range(6)]
    tasks = [make_task(name, partial(int), tmp_path) for name in names]
    begun: list[int] = []

    class Counted(Notes):
        def look(self, tasks: Sequence[Task]) -> None:
            assert not tasks
            begun.append(len(self.begun))

    outcomes: dict[str, list[Failure | None]] = {name: [None] for name in names}
    assert work_off(tasks, Script(outcomes, [1, 0, 2, 3]), Counted()) == {}
    assert begun == [1, 1, 3, 6]


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


# Processes of this machine.


def test_a_process_that_dies_costs_only_its_own_task(
    executor: LocalExecutor, tmp_path: Path
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
    tasks = [make_task(name, work, tmp_path) for name, work in works.items()]
    notes = Notes()
    failures = work_off(tasks, executor, notes)
    assert notes.begun == list(works)
    assert notes.ends.keys() == works.keys()
    messages = {task.name: failure.message for task, failure in failures.items()}
    assert messages == {
        "killed": "the process was killed by SIGKILL",
        "left": "the process ended with exit code 3",
        "failing": "invalid literal for int() with base 10: 'word'",
    }
    died = {task.name for task, failure in failures.items() if failure.died}
    assert died == {"killed", "left"}
    assert {name for name, failure in notes.ends.items() if failure} == messages.keys()
    assert (tmp_path / "made one").exists()
    assert (tmp_path / "made two").exists()
    assert notes.most <= 2
    executor.close()
    printed = [path.read_text() for path in tmp_path.glob("slot*.log")]
    assert sorted(printed) == ["", "said aloud\n"]


def test_a_process_that_died_between_two_tasks_is_replaced(
    executor: LocalExecutor, tmp_path: Path
) -> None:
    assert work_off([make_task("one", partial(int, "1"), tmp_path)], executor, Notes()) == {}
    (process,) = active_children()
    process.kill()
    process.join()
    tasks = [make_task(name, partial(int, "2"), tmp_path) for name in ("two", "three")]
    assert work_off(tasks, executor, Notes()) == {}


def test_a_task_whose_process_was_killed_is_done_in_another_one(
    executor: LocalExecutor, tmp_path: Path
) -> None:
    task = make_task("once", partial(die_unless, tmp_path / "died"), tmp_path)
    notes = Notes()
    assert work_off([task], executor, notes, retries=1) == {}
    assert (notes.begun, notes.lost) == (["once", "once"], ["once"])


def test_work_that_is_asked_to_end_may_keep_what_it_has(
    executor: LocalExecutor, tmp_path: Path
) -> None:
    executor.start(make_task("long", partial(linger, tmp_path / "kept"), tmp_path))
    wait_for(tmp_path / "kept")
    executor.close()
    assert (tmp_path / "kept").read_text() == "kept"


def test_a_process_that_is_asked_to_end_has_died(executor: LocalExecutor, tmp_path: Path) -> None:
    future = executor.start(make_task("long", partial(linger, tmp_path / "kept"), tmp_path))
    wait_for(tmp_path / "kept")
    (process,) = active_children()
    process.terminate()
    failure = future.result(timeout=60)
    assert failure is not None
    assert failure.died
    assert "asked to end" in failure.message


def test_closing_ends_what_is_not_finished(
    executor: LocalExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.executors.local.GRACE_SECONDS", 0.1)
    future = executor.start(make_task("long", partial(time.sleep, 600), tmp_path))
    started = time.monotonic()
    executor.close()
    assert future.done()
    assert time.monotonic() - started < 60
    assert not active_children()


def test_processes_ignore_interrupts_which_the_one_that_started_them_handles(
    executor: LocalExecutor, tmp_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    interrupt = partial(signal.raise_signal, signal.SIGINT)
    task = make_task("interrupted", interrupt, tmp_path)
    assert work_off([task], executor, Notes()) == {}
    assert signal.getsignal(signal.SIGINT) is handler
