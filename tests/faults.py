"""A file system that fails: Python's operations that write to it are counted, and one fails."""

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Faults:
    """Counts the operations that write below a folder; fails from one of them on.

    Args:
        folder: The folder.
        at: The operation that fails, from 1; None for none.
        lasting: Whether all later ones fail as well, as on a full disk.
        code: The error.

    Attributes:
        seen: The operations so far, each with the name of its file.
    """

    def __init__(
        self, folder: Path, at: int | None = None, *, lasting: bool = True, code: int = errno.ENOSPC
    ) -> None:
        self._folder = str(folder)
        self._at = at
        self._lasting = lasting
        self._code = code
        self.seen: list[tuple[str, str]] = []

    def concerns(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder)

    def count(self, operation: str, path: Any) -> None:
        """Takes an operation into account.

        Raises:
            OSError: It is one that fails.
        """
        self.seen.append((operation, os.fspath(path)))
        number = len(self.seen)
        if self._at is not None and (number == self._at or (self._lasting and number > self._at)):
            raise OSError(self._code, os.strerror(self._code))


class _Raw(io.FileIO):
    """A file whose every write is counted."""

    faults: Faults

    def write(self, data: Any) -> int:
        self.faults.count("write", self.name)
        return super().write(data)


@contextmanager
def failing(faults: Faults) -> Iterator[Faults]:
    """Lets a block run on the file system that fails."""
    with pytest.MonkeyPatch.context() as during:
        opened = _opening(faults, io.open)
        during.setattr(builtins, "open", opened)
        during.setattr(io, "open", opened)
        during.setattr(os, "open", _counted(faults, os.open, _handle))
        for name in ("mkdir", "replace", "truncate"):
            during.setattr(os, name, _counted(faults, getattr(os, name), lambda *_, n=name: n))
        yield faults


def _opening(faults: Faults, ours: Callable[..., Any]) -> Callable[..., Any]:
    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not faults.concerns(file) or not set(mode) & set("wax+"):
            return ours(file, mode, *args, **kwargs)
        faults.count("open", file)
        raw = _Raw(file, mode.replace("b", "").replace("t", ""))
        raw.faults = faults
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding=kwargs.get("encoding"))

    return opened


def _handle(flags: int, *_: Any) -> str:
    """Files without Python's buffers are opened to be made, or to be waited for."""
    return "create" if flags & os.O_CREAT else "sync"


def _counted(
    faults: Faults, function: Callable[..., Any], name: Callable[..., str]
) -> Callable[..., Any]:
    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        if faults.concerns(path):
            faults.count(name(*args), path)
        return function(path, *args, **kwargs)

    return call
