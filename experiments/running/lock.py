"""Keeps two processes from working on one run."""

import fcntl
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

from mtkd_env.errors import ConfigError
from mtkd_env.files import named_errors, refuse_links, remove_unfinished

LOCK = "run.lock"


# How often a lock is tried for, and the seconds between: `is_running` takes it for a moment.
TRIES, PAUSE = 10, 0.05


class RunLock:
    """Keeps a second process from a run's folder; ends with the process, however that ends.

    What a killed process has left of files that it was writing is removed.
    Nothing in the folder may be a symbolic link.

    Args:
        folder: The run's folder.

    Raises:
        ConfigError: When entered: another process has it, or something in it is a link.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        refuse_links(self._folder)
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
        remove_unfinished(self._folder)
        return self

    def __exit__(self, *_: object) -> None:
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
