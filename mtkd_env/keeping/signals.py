"""Signals: a training that is asked to stop does so at its next rest."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any


class Stopped(KeyboardInterrupt):
    """A training ended on a signal, after a checkpoint.

    Args:
        number: The signal.
        step: SGD steps so far.
        to_go_on: How to go on with it.
    """

    def __init__(self, number: int, step: int, to_go_on: str) -> None:
        super().__init__(number, step, to_go_on)
        self.number = number
        self.step = step
        self.to_go_on = to_go_on

    def __str__(self) -> str:
        return f"stopped after step {self.step}; {self.to_go_on}"

    @property
    def code(self) -> int:
        """Exit code of a program that this ends."""
        return 128 + self.number


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

    def __enter__(self) -> "StopRequest":
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
