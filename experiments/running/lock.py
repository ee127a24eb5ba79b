"""Keeps two processes from working on one run."""

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mtkd_env.errors import ConfigError
from mtkd_env.files import named_errors, refuse_links, remove_unfinished

LOCK = "run.lock"


# How often a lock is tried for, and the seconds between: `is_running` takes it for a moment.
TRIES, PAUSE = 10, 0.05


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keeps a second process from a run's folder; ends with the process, however that ends.

    What a killed process has left of files that it was writing is removed.
    Nothing in the folder may be a symbolic link.

    Args:
        folder: The run's folder.

    Raises:
        ConfigError: Another process has it, or something in it is a link.
    """
    refuse_links(folder)
    path = folder / LOCK
    file = _locked(path)
    try:
        with named_errors(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        remove_unfinished(folder)
        yield
    finally:
        path.unlink(missing_ok=True)
        # What could not be written says nothing to anybody any more.
        with suppress(OSError):
            file.close()


def _locked(path: Path) -> IO[str]:
    for _ in range(TRIES):
        file = path.open("a+", encoding="utf-8")
        # Whoever had it may have removed the file between opening and locking it.
        if _try_lock(file) and path.exists() and _same(file, path):
            return file
        file.close()
        time.sleep(PAUSE)
    holder = path.read_text(encoding="utf-8") if path.exists() else ""
    raise ConfigError(f"output: {path.parent} is in use by {holder or 'another process'}")


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
