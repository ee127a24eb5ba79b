"""The log of a run: its rows on disk, for programs and for TensorBoard."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mtkd_env import distributed
from mtkd_env.errors import ConfigError
from mtkd_env.files import named_errors, sync

# The rows of a run, one a line.
ROWS = "metrics.jsonl"


class MetricsLog:
    """Writes rows to TensorBoard and as lines of a file, and other lines to other files.

    Args:
        folder: The run's folder.
        state: What `state_dict` gave, to go on from there: what was written since then is cut off.
        lines: The files; the first is that of the rows.
        clock: What in a row says when it was: a whole number that grows from row to row.

    Attributes:
        rows: All rows so far.
        began: When the run would have begun without interruptions, on the clock of `time`.

    Raises:
        ConfigError: A file is shorter than it was.
        OSError: Something cannot be written; here and in all methods. Names the folder.
    """

    def __init__(
        self,
        folder: Path,
        state: Mapping[str, int] | None,
        lines: Sequence[str],
        clock: str,
    ) -> None:
        self.folder = folder
        self.began = time.perf_counter()
        self._lines = lines
        self._clock = clock
        if state is not None:
            for name in lines:
                _cut(folder / name, state[name])
        self._about_folder = partial(named_errors, folder)
        with self._about_folder(), ExitStack() as opened:
            self._files = {
                name: opened.enter_context((folder / name).open("a", encoding="utf-8"))
                for name in lines
            }
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

    @property
    def seconds(self) -> float:
        """Seconds since the beginning, without those between an interruption and going on."""
        return time.perf_counter() - self.began

    def state_dict(self) -> dict[str, int]:
        """The sizes [bytes] of the files, all of which is then on disk."""
        with self._about_folder():
            self._writer.flush()
            for name in self._lines:
                sync(self.folder / name)
        return {name: (self.folder / name).stat().st_size for name in self._lines}

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        self.rows.append(row)
        self.write_line(self._lines[0], row)
        with self._about_folder():
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, row[self._clock])

    def write_line(self, name: str, values: dict[str, Any]) -> None:
        """Adds a line to one of the files."""
        with self._about_folder():
            self._files[name].write(json.dumps(values) + "\n")
            self._files[name].flush()

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
        self.began = time.perf_counter()
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

    def write_line(self, name: str, values: dict[str, Any]) -> None:
        """Does nothing."""

    def write_pictures(self, name: str, pictures: Tensor, when: int) -> None:
        """Does nothing."""


def open_log(
    folder: Path, state: Mapping[str, int] | None, lines: Sequence[str], clock: str
) -> MetricsLog:
    """The log of a run, from its beginning or from a checkpoint; arguments as of `MetricsLog`.

    Of several processes only process 0 writes.
    """
    if distributed.rank() != 0:
        return RowsAlone(folder, distributed.agree([]))
    log = MetricsLog(folder, state, lines, clock)
    distributed.agree(log.rows)
    return log


def _cut(path: Path, size: int) -> None:
    """Shortens a file to a size that it has had."""
    found = path.stat().st_size if path.is_file() else 0
    if found < size:
        raise ConfigError(f"{path}: expected at least {size} bytes, found {found}")
    os.truncate(path, size)


def read_rows(folder: Path, name: str = ROWS) -> list[dict[str, Any]]:
    """The rows of one of a run's files."""
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
