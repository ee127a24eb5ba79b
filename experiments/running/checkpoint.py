"""What lets a run go on where it was left: its checkpoints, its lock, and requests to stop."""

import fcntl
import os
import platform
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

import torch

from agents.isolation import RandomStates
from experiments.config import CheckpointConfig
from mtkd_env.errors import ConfigError
from mtkd_env.files import has_own_digest, load_checkpoint, named_errors, save_with_digest

# Checkpoints that are kept: the last one, and the one before it in case the last is damaged.
KEPT = 2

LOCK = "run.lock"

# How often a lock is tried for, and the seconds between: `is_running` takes it for a moment.
TRIES, PAUSE = 10, 0.05


class Checkpoints:
    """The last checkpoints of a run, in the folder `checkpoints` of the run's.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "checkpoints"

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Adds a checkpoint and removes those that are too old.

        Args:
            step: SGD steps of the student so far; not less than at the last checkpoint.
            content: Tensors, numbers, strings and containers of them.
        """
        save_with_digest(self._folder / f"step-{step:08d}.pt", content)
        for path in self._paths()[:-KEPT]:
            path.unlink()

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint that is not damaged, on the CPU; none if there is none.

        Damaged ones are removed with a warning, and so is what a process left that died amid
        writing one, without.
        """
        for unfinished in self._folder.glob(".step-*"):
            unfinished.unlink()
        for path in reversed(self._paths()):
            if has_own_digest(path):
                return load_checkpoint(path)
            path.unlink()
            warnings.warn(
                f"{path}: damaged checkpoint, not what was written; it was removed, and the one "
                "before it is used",
                stacklevel=2,
            )
        return None

    def clear(self) -> None:
        """Removes all checkpoints."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _paths(self) -> list[Path]:
        """The checkpoints, the last one at the end."""
        return sorted(self._folder.glob("step-*.pt"))


class Timetable:
    """Tells when the next checkpoint is due.

    Args:
        config: How often.
        epochs: Epochs at the last checkpoint.
        clock: Seconds.
    """

    def __init__(
        self, config: CheckpointConfig, epochs: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._clock = clock
        self._epochs = epochs
        self._began = self._last = clock()
        self._spent = 0.0

    def due(self, epochs: int) -> bool:
        """Whether a checkpoint is due after so many epochs, and does not cost too much."""
        config, now = self._config, self._clock()
        if self._spent > config.share * (now - self._began):
            return False
        by_epochs = config.epochs > 0 and epochs - self._epochs >= config.epochs
        by_time = config.minutes > 0 and now - self._last >= 60 * config.minutes
        return by_epochs or by_time

    def written(self, epochs: int, seconds: float) -> None:
        """A checkpoint was written after so many epochs, and took so long."""
        self._epochs = epochs
        self._last = self._clock()
        self._spent += seconds


class RunLock:
    """Keeps a second process from a run's folder; ends with the process, however that ends.

    Args:
        folder: The run's folder.

    Raises:
        ConfigError: Another process has it, when entered; names folder and process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        path = self._folder / LOCK
        for _ in range(TRIES):
            file = path.open("a+", encoding="utf-8")
            # Whoever had it may have removed the file between opening and locking it.
            if _try_lock(file) and path.exists() and _same(file, path):
                self._file = file
                break
            file.close()
            time.sleep(PAUSE)
        else:
            holder = path.read_text(encoding="utf-8") if path.exists() else ""
            raise ConfigError(f"output: {self._folder} is in use by {holder or 'another process'}")
        try:
            with named_errors(path):
                self._file.truncate(0)
                self._file.write(f"process {os.getpid()} on {platform.node()}")
                self._file.flush()
        except OSError:
            self._give_back()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        assert self._file is not None
        (self._folder / LOCK).unlink(missing_ok=True)
        # What could not be written says nothing to anybody any more.
        with suppress(OSError):
            self._file.close()
        self._file = None


def is_running(folder: Path) -> bool:
    """Whether a process works on the run in a folder."""
    try:
        with (folder / LOCK).open(encoding="utf-8") as file:
            return not _try_lock(file)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _try_lock(file: IO[str]) -> bool:
    """Locks a file until it is closed, if no other process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(file: IO[str], path: Path) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())


class Stopped(KeyboardInterrupt):
    """A run ended on a signal, after a checkpoint.

    Args:
        number: The signal.
        folder: The run's folder.
        step: SGD steps of the student so far.
        program: The program that goes on with it.
    """

    def __init__(self, number: int, folder: str, step: int, program: str = "run.py") -> None:
        super().__init__(number, folder, step, program)
        self.number = number
        self.folder = folder
        self.step = step
        self.program = program

    def __str__(self) -> str:
        return f"stopped after step {self.step}; to go on: {self.program} --resume {self.folder}"

    @property
    def code(self) -> int:
        """Exit code of a program that this ends."""
        return 128 + self.number


class StopRequest:
    """Takes note of SIGINT and SIGTERM while a block runs; a second one ends the process at once.

    Signals that are ignored stay so. Does nothing outside of the main thread.

    Attributes:
        number: The signal that came, if one did.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.number = number
        self._give_back()
        # Not through Python's buffers, which whatever was interrupted may be writing into.
        os.write(2, b"stopping at the next checkpoint; a second signal ends at once\n")


def packed_random(states: RandomStates) -> dict[str, Any]:
    """The states of the global generators as a checkpoint can hold them."""
    python, (name, key, *rest), cpu, cuda = states
    return {
        "python": python,
        "numpy": (name, torch.from_numpy(key.astype("int64")), *rest),
        "cpu": cpu,
        "cuda": cuda,
    }


def unpacked_random(packed: dict[str, Any]) -> RandomStates:
    """What `packed_random` was given."""
    name, key, *rest = packed["numpy"]
    legacy = (name, key.numpy().astype("uint32"), *rest)
    return packed["python"], legacy, packed["cpu"], packed["cuda"]
