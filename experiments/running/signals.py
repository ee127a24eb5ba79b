"""Signals where no checkpoint can be taken, and the way back to a run that was broken."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mtkd_env.errors import ConfigError


class Terminated(KeyboardInterrupt):
    """SIGTERM came where no checkpoint can be taken."""


def forget_output() -> None:
    """Sends what is written to stdout from now on nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def end_unread() -> None:
    """Ends a program whose output nobody reads any more, as in `| head -1`: as SIGTERM does."""
    forget_output()
    signal.raise_signal(signal.SIGTERM)


@contextmanager
def terminable() -> Iterator[None]:
    """Lets SIGTERM raise `Terminated` until the context ends, where it would kill the process.

    Does nothing outside of the main thread.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise Terminated


@contextmanager
def way_back(program: str, folder: Path) -> Iterator[None]:
    """Adds to what breaks a run, other than its own numbers, how to go on with it."""
    try:
        yield
    except (ConfigError, FloatingPointError):
        raise
    except Exception as error:
        error.add_note(to_go_on(program, folder))
        raise


def to_go_on(program: str, folder: Path) -> str:
    """How to go on with a run."""
    return f"to go on: {program} --resume {folder}"
