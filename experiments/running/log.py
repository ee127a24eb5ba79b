"""The log of a run: its rows on disk, for programs and for TensorBoard."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mtkd_env.errors import ConfigError
from mtkd_env.files import named_errors, sync

# The files of a run with one line an epoch.
LINES = ("metrics.jsonl", "breakdown.jsonl")


class MetricsLog:
    """Writes one row an epoch to `metrics.jsonl` and to TensorBoard, and to `breakdown.jsonl`.

    Args:
        folder: The run's folder.
        state: What `state_dict` gave, to go on from there: what was written since then is cut off.
        lines: The files with one line each; the first is that of the rows.
        clock: What in a row says when it was: a whole number that grows from row to row.

    Attributes:
        rows: All rows so far.

    Raises:
        ConfigError: A file is shorter than it was.
        OSError: Something cannot be written; here and in all methods. Names the folder.
    """

    def __init__(
        self,
        folder: Path,
        state: Mapping[str, int] | None = None,
        *,
        lines: Sequence[str] = LINES,
        clock: str = "epoch",
    ) -> None:
        self.folder = folder
        self._lines = lines
        self._clock = clock
        if state is not None:
            for name in lines:
                _cut(folder / name, state[name])
        self._about_folder = partial(named_errors, folder)
        with self._about_folder(), ExitStack() as opened:
            self._files = [
                opened.enter_context((folder / name).open("a", encoding="utf-8")) for name in lines
            ]
            self.rows: list[dict[str, Any]] = read_rows(folder, lines[0])
            purged = self.rows[-1][clock] + 1 if self.rows else 1
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purged)
            opened.callback(self._writer.close)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._about_folder():
            self._opened.close()

    def state_dict(self) -> dict[str, int]:
        """The sizes [bytes] of the files, all of which is then on disk."""
        with self._about_folder():
            self._writer.flush()
            for name in self._lines:
                sync(self.folder / name)
        return {name: (self.folder / name).stat().st_size for name in self._lines}

    def write(self, row: dict[str, Any]) -> None:
        """One row; epochs count from 1."""
        self.rows.append(row)
        with self._about_folder():
            self._write_line(self._files[0], row)
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, row[self._clock])

    def _write_line(self, file: IO[str], values: dict[str, Any]) -> None:
        file.write(json.dumps(values) + "\n")
        file.flush()

    def write_breakdown(self, breakdown: dict[str, Any]) -> None:
        """What the mean weights of one epoch are made of."""
        with self._about_folder():
            self._write_line(self._files[1], breakdown)

    def write_pictures(self, name: str, pictures: Tensor, when: int) -> None:
        """Pictures (N, 3, H, W), uint8, for TensorBoard alone."""
        with self._about_folder():
            self._writer.add_images(name, pictures, when)


class RowsAlone(MetricsLog):
    """Keeps rows and writes nothing: for processes beside the one that does.

    Args:
        folder: The run's folder.
        rows: All rows so far.
    """

    def __init__(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.rows = rows

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is open."""

    def state_dict(self) -> dict[str, int]:
        """Nothing is on disk."""
        return {}

    def write(self, row: dict[str, Any]) -> None:
        """Keeps a row."""
        self.rows.append(row)

    def write_breakdown(self, breakdown: dict[str, Any]) -> None:
        """Does nothing."""

    def write_pictures(self, name: str, pictures: Tensor, when: int) -> None:
        """Does nothing."""


def _cut(path: Path, size: int) -> None:
    """Shortens a file to a size that it has had."""
    found = path.stat().st_size if path.is_file() else 0
    if found < size:
        raise ConfigError(f"{path}: expected at least {size} bytes, found {found}")
    os.truncate(path, size)


def read_rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of one of a run's files, one an epoch."""
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
