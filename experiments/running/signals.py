"""Signals: a run that is asked to stop does so at its next rest."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

from mtkd_env.errors import ConfigError


class Stopped(KeyboardInterrupt):
    """A run ended on a signal, after a checkpoint.

    Args:
        number: The signal.
        folder: The run's folder.
        step: SGD steps of the student so far.
        program: The program that goes on with it.
    """

    def __init__(self, number: int, folder: str, step: int, program: str = "mtkd run") -> None:
        super().__init__(number, folder, step, program)
        self.number = number
        self.folder = folder
        self.step = step
        self.program = program

    def __str__(self) -> str:
        return f"stopped after step {self.step}; {_on(self.program, self.folder)}"

    @property
    def code(self) -> int:
        """Exit code of a program that this ends."""
        return 128 + self.number


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


def say(text: str) -> None:
    """Writes to stderr, if anybody reads it.

    Not through Python's buffers, which whatever was interrupted may be writing into.
    """
    with suppress(OSError):
        os.write(2, text.encode())


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

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.number = number
        self._give_back()
        say("stopping at the next checkpoint; a second signal ends at once\n")


@contextmanager
def way_back(program: str, folder: Path) -> Iterator[None]:
    """Adds to what breaks a run, other than its own numbers, how to go on with it."""
    try:
        yield
    except (ConfigError, FloatingPointError):
        raise
    except Exception as error:
        error.add_note(_on(program, folder))
        raise


def _on(program: str, folder: str | Path) -> str:
    return f"to go on: {program} --resume {folder}"
