"""How the main programs end when something goes wrong: one line and an exit code, no traceback."""

import errno
import sys
import threading
import traceback
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import NoReturn

import torch

from experiments.executors.base import one_line
from experiments.running.signals import Terminated, forget_output, terminable
from mtkd_env.errors import ConfigError
from mtkd_env.files import user_path
from mtkd_env.imports import EXTRAS
from mtkd_env.keeping import Stopped

# Shows where an error came from; every main program takes it.
DEBUG = "--debug"

# Exit codes: what was asked for cannot be done, something broke, Ctrl-C, SIGTERM.
ASKED, BROKE, INTERRUPTED, TERMINATED = 2, 1, 130, 143

# What helps against some errors of the system.
HINTS: Mapping[int | None, str] = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "files may not be that large here; see ulimit -f",
    errno.EMFILE: "too many files are open; see ulimit -n",
}

Program = Callable[[Sequence[str]], int]


class Parser(ArgumentParser):
    """Reads a main program's flags; reports what is wrong as a `ConfigError`.

    Args:
        prog: The program's name.
        description: What it does, as it is to be shown.
        epilog: What is shown below the flags, before what all programs have.
    """

    def __init__(self, prog: str, description: str | None, epilog: str = "") -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"{epilog}{DEBUG} shows where an error came from.",
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Does not end the program itself."""
        raise ConfigError(message.removeprefix("argument "))


def path_argument(text: str) -> Path:
    """The type of a flag that names a file or folder."""
    try:
        return user_path(text)
    except ConfigError as error:
        raise ArgumentTypeError(str(error)) from error


def program(interrupted: str) -> Callable[[Program], Callable[..., int]]:
    """Makes a function a main program; see `run_program`."""

    def decorated(work: Program) -> Callable[..., int]:
        return wraps(work)(partial(run_program, work, interrupted=interrupted))

    return decorated


def names(text: str) -> list[str]:
    """The type of a flag that takes names with commas between them."""
    found = [name.strip() for name in text.split(",")]
    if "" in found:
        raise ArgumentTypeError(f"expected names with commas between them, got '{text}'")
    return found


def numbers(text: str) -> list[int]:
    """The type of a flag that takes whole numbers with commas between them."""
    if not all(name.isdecimal() for name in names(text)):
        raise ArgumentTypeError(f"expected 0,1,2,..., got '{text}'")
    return [int(name) for name in names(text)]


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number which is not less."""

    def read(text: str) -> int:
        given = int(text) if text.removeprefix("-").isdecimal() else text
        if isinstance(given, str) or given < least:
            raise ArgumentTypeError(f"expected a number >= {least}, got {given!r}")
        return given

    return read


def run_program(
    program: Program, argv: Sequence[str] | None = None, interrupted: str = "nothing was done"
) -> int:
    """Runs a main program; whatever goes wrong ends it with a line on stderr.

    Args:
        program: Takes the command line without `--debug` and gives the exit code.
        argv: The command line; by default the one of this process.
        interrupted: What Ctrl-C leaves behind.

    Returns:
        The exit code: 0, 1 or 2, or 128 and the number of the signal that ended the program.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = DEBUG in argv
    try:
        with terminable(), _threads_silent(unless=debug), _output_written():
            return program([flag for flag in argv if flag != DEBUG])
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return stopped.code
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"interrupted: {interrupted}\n")
        return TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {described(error)}\n")
        return ASKED if isinstance(error, ConfigError | FloatingPointError) else BROKE


@contextmanager
def _output_written() -> Iterator[None]:
    """Writes what is left of the output when a block ends; nothing if nobody reads it any more."""
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            forget_output()


@contextmanager
def _threads_silent(*, unless: bool) -> Iterator[None]:
    """Hides the traceback of a thread that could not write.

    It is TensorBoard's, whose next call raises the same in the main thread.
    """
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if unless or not isinstance(arguments.exc_value, OSError):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def described(error: Exception) -> str:
    """What went wrong, in one line: where, what, and what may help."""
    text = next(
        (describe(error) for kind, describe in DESCRIBED.items() if isinstance(error, kind)),
        f"{type(error).__name__}: {one_line(error)} ({DEBUG} shows where)",
    )
    return "; ".join([text, *getattr(error, "__notes__", [])])


def _system(error: OSError) -> str:
    reason = error.strerror or one_line(error)
    known = [str(error.filename)] if error.filename is not None else []
    hints = [HINTS[error.errno]] if error.errno in HINTS else []
    return "; ".join([": ".join([*known, reason]), *hints])


def _missing(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    if extra is None:
        return one_line(error)
    return f"needs {package}; install it with pip install 'mtkd-env[{extra}]'"


def _memory(error: Exception) -> str:
    where = "GPU" if isinstance(error, torch.OutOfMemoryError) else "machine"
    reason = str(error).partition(". ")[0]
    return (
        f"the memory of the {where} is not enough ({reason or 'no more to be had'}); a smaller "
        "data.batch_size, or --precision bf16, may help"
    )


# The first that fits counts.
DESCRIBED: Mapping[type[Exception], Callable[..., str]] = {
    ConfigError: one_line,
    FloatingPointError: one_line,
    torch.OutOfMemoryError: _memory,
    MemoryError: _memory,
    ModuleNotFoundError: _missing,
    OSError: _system,
}
