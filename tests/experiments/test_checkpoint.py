import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.running.lock import LOCK, is_running, run_lock
from experiments.running.signals import to_go_on
from mtkd_env.errors import ConfigError
from mtkd_env.files import load_checkpoint, save_checkpoint, write_atomically
from mtkd_env.keeping import CheckpointConfig, Checkpoints, Stopped, StopRequest, Timetable
from mtkd_env.seeding import random_states, set_random_states


def content(step: int) -> dict[str, Any]:
    return {"step": step, "tensor": torch.full((50,), float(step))}


def written(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in steps:
        checkpoints.save(step, content(step))
    return checkpoints


def files(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").iterdir())


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    # One bit of the tensor, which a reader would not notice.
    data[data.index(torch.tensor(2.0).numpy().tobytes() * 20) + 2] ^= 1
    path.write_bytes(bytes(data))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


# Checkpoints.


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 4, 8, 12, 100)
    assert [path.name[:13] for path in files(tmp_path)] == ["step-00000012", "step-00000100"]
    found = checkpoints.load()
    assert found is not None
    assert found["step"] == 100
    assert found["tensor"].equal(content(100)["tensor"])


def test_a_folder_without_checkpoints_has_none_to_read(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "checkpoints").load() is None


@pytest.mark.parametrize("damage", [torn, altered, emptied])
def test_the_one_before_a_damaged_checkpoint_is_used_with_a_warning(
    damage: Any, tmp_path: Path
) -> None:
    checkpoints = written(tmp_path, 1, 2)
    first, last = files(tmp_path)
    damage(last)
    with pytest.warns(UserWarning, match=f"{last.name}: damaged checkpoint"):
        found = checkpoints.load()
    assert found is not None
    assert found["step"] == 1
    # Once it is known to be damaged, nothing will take it for a checkpoint again.
    assert files(tmp_path) == [first]


def test_an_altered_checkpoint_could_have_been_read(tmp_path: Path) -> None:
    written(tmp_path, 2)
    (path,) = files(tmp_path)
    altered(path)
    assert not load_checkpoint(path)["tensor"].equal(content(2)["tensor"])


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1, 2)
    for path in files(tmp_path):
        torn(path)
    with pytest.warns(UserWarning, match="damaged") as warned:
        assert checkpoints.load() is None
    assert len(warned) == 2


def test_what_a_killed_process_left_of_a_checkpoint_is_removed(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1)
    (tmp_path / "checkpoints" / ".new-step-00000002-abc.pt").write_bytes(b"half")
    found = checkpoints.load()
    assert found is not None
    assert found["step"] == 1
    assert len(files(tmp_path)) == 1


def test_cleared_checkpoints_are_gone(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1)
    checkpoints.clear()
    checkpoints.clear()
    assert list(tmp_path.iterdir()) == []


# When.


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_another_process_writes_outlives_the_removal(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1, 2)

    def write(unfinished: Path) -> None:
        checkpoints.clear()
        assert files(tmp_path) == [unfinished]

    write_atomically(tmp_path / "checkpoints" / "step-3.pt", write)
    assert [path.name for path in files(tmp_path)] == ["step-3.pt"]
    checkpoints.clear()
    assert not (tmp_path / "checkpoints").exists()


def timetable(**kwargs: Any) -> tuple[Timetable, Clock]:
    clock = Clock()
    return Timetable(CheckpointConfig(**{"share": 1.0, **kwargs}), 0, clock), clock


def test_checkpoints_are_due_every_so_many_epochs() -> None:
    table, _ = timetable(epochs=2, minutes=0.0)
    due = []
    for epochs in range(7):
        if table.due(epochs):
            due.append(epochs)
            table.written(epochs, 0.0)
    assert due == [2, 4, 6]


def test_checkpoints_are_due_every_so_many_minutes() -> None:
    table, clock = timetable(epochs=0, minutes=10.0)
    for now, expected in ((599, False), (600, True)):
        clock.now = now
        assert table.due(5) == expected
    table.written(5, 1.0)
    assert not table.due(9)
    clock.now = 1200
    assert table.due(9)


def test_checkpoints_are_put_off_where_they_would_take_too_much_of_the_time() -> None:
    table, clock = timetable(epochs=1, minutes=0.0, share=0.1)
    clock.now = 1.0
    assert table.due(1)
    table.written(1, 5.0)
    clock.now = 49.0
    assert not table.due(2)
    clock.now = 51.0
    assert table.due(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": -1}, "epochs: expected a finite number >= 0, got -1"),
        ({"minutes": -0.5}, "minutes: expected a finite number >= 0, got -0.5"),
        ({"share": 1.5}, r"share: expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_numbers_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CheckpointConfig(**arguments)


def test_no_epochs_and_no_minutes_are_no_checkpoints() -> None:
    assert not CheckpointConfig(epochs=0, minutes=0.0).enabled
    assert CheckpointConfig(epochs=0).enabled
    assert CheckpointConfig(minutes=0.0).enabled


# The lock.


def test_a_folder_has_one_holder_at_a_time(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        assert is_running(tmp_path)
        message = f"output: {tmp_path} is in use by process {os.getpid()} on "
        with pytest.raises(ConfigError, match=message), run_lock(tmp_path):
            pytest.fail("locked twice")
        assert is_running(tmp_path)
    assert not is_running(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with run_lock(tmp_path):
        assert is_running(tmp_path)


def test_a_folder_that_is_not_there_is_not_in_use(tmp_path: Path) -> None:
    assert not is_running(tmp_path / "none")


def test_a_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from experiments.running.lock import run_lock\n"
        f"with run_lock(Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert is_running(tmp_path)
        with pytest.raises(ConfigError, match=f"in use by process {process.pid}"):
            run_lock(tmp_path).__enter__()
        process.kill()
    assert not is_running(tmp_path)
    assert (tmp_path / LOCK).exists()
    with run_lock(tmp_path):
        assert is_running(tmp_path)


# Signals.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_ends(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    before = signal.signal(number, lambda found, _: ended.append(found))
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert (stop.number, ended) == (number, [])
            os.kill(os.getpid(), number)
            assert ended == [number]
    finally:
        signal.signal(number, before)
    assert capfd.readouterr().err.count("a second signal ends at once\n") == 1


def test_signals_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.number is None
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on(number: int, code: int) -> None:
    stopped = Stopped(number, 7, to_go_on("mtkd run", Path("runs/one")))
    assert stopped.code == code
    assert str(stopped) == "stopped after step 7; to go on: mtkd run --resume runs/one"
    # Programs that know nothing of it take it for Ctrl-C.
    with suppress(KeyboardInterrupt):
        raise stopped


# Random generators.


def test_random_generators_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    before = random_states()
    try:
        random.gauss(0, 1)  # Keeps the second of a pair for later.
        np.random.normal()  # noqa: NPY002 - the generator that Stable-Baselines3 draws from
        save_checkpoint(tmp_path / "random.pt", random_states())
        found = []
        for _ in range(2):
            set_random_states(load_checkpoint(tmp_path / "random.pt"))
            draws = [random.gauss(0, 1), random.random(), *torch.rand(3).tolist()]
            found.append([*draws, *np.random.normal(size=3)])  # noqa: NPY002 - as above
        assert found[0] == found[1]
    finally:
        set_random_states(before)
