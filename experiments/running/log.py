"""The log of a run: its rows on disk, for programs and for TensorBoard."""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mtkd_env import distributed
from mtkd_env.errors import ConfigError
from mtkd_env.files import file_digest, named_errors, sync

# The rows of a run, one a line.
ROWS = "metrics.jsonl"

# Bytes that a message shows of a line which is no row.
SHOWN = 40


class MetricsLog:
    """Writes rows to TensorBoard and as lines of a file, and other lines to other files.

    Of several processes only process 0 writes; the others keep the rows.

    Args:
        folder: The run's folder.
        state: What `state_dict` gave, to go on from there: what was written since then is cut off.
        lines: The files; the first is that of the rows.
        clock: What in a row says when it was: a whole number that grows from row to row.

    Attributes:
        rows: All rows so far.
        began: When the run would have begun without interruptions, on the clock of `time`.

    Raises:
        ConfigError: A file is not as it was, or holds something else than rows.
        OSError: Something cannot be written; here and in all methods. Names the folder.
    """

    def __init__(
        self,
        folder: Path,
        state: Mapping[str, Any] | None,
        lines: Sequence[str],
        clock: str,
    ) -> None:
        self.folder = folder
        self.began = time.perf_counter()
        self._lines = lines
        self._clock = clock
        self._files: dict[str, IO[str]] = {}
        self._writer: SummaryWriter | None = None
        self._opened = ExitStack()
        self._about_folder = partial(named_errors, folder)
        rows = self._open(state) if distributed.rank() == 0 else []
        self.rows: list[dict[str, Any]] = distributed.agree(rows)

    def _open(self, state: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """Opens the files; gives the rows that are there."""
        folder, lines = self.folder, self._lines
        if state is not None:
            for name in lines:
                _cut(folder / name, **state[name])
        with self._about_folder(), ExitStack() as opened:
            self._files = {
                name: opened.enter_context((folder / name).open("a", encoding="utf-8"))
                for name in lines
            }
            rows = read_rows(folder, lines[0])
            purged = rows[-1][self._clock] + 1 if rows else 1
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purged)
            opened.callback(self._writer.close)
            self._opened = opened.pop_all()
        return rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._about_folder():
            self._opened.close()

    @property
    def seconds(self) -> float:
        """Seconds since the beginning, without those between an interruption and going on."""
        return time.perf_counter() - self.began

    def state_dict(self) -> dict[str, Any]:
        """Size [bytes] and digest of each file, all of which is then on disk."""
        if self._writer is None:
            return {}
        with self._about_folder():
            self._writer.flush()
            for name in self._lines:
                sync(self.folder / name)
        return {name: _described(self.folder / name) for name in self._lines}

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        self.rows.append(row)
        self.write_line(self._lines[0], row)
        if self._writer is not None:
            with self._about_folder():
                for name, value in row.items():
                    if isinstance(value, int | float):
                        self._writer.add_scalar(name, value, row[self._clock])

    def write_line(self, name: str, values: dict[str, Any]) -> None:
        """Adds a line to one of the files."""
        if self._writer is not None:
            with self._about_folder():
                self._files[name].write(json.dumps(values) + "\n")
                self._files[name].flush()

    def write_pictures(self, name: str, pictures: Tensor, when: int) -> None:
        """Pictures (N, 3, H, W), uint8, for TensorBoard alone."""
        if self._writer is not None:
            with self._about_folder():
                self._writer.add_images(name, pictures, when)


def _described(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "digest": file_digest(path)}


def _cut(path: Path, size: int, digest: str) -> None:
    """Shortens a file to what it has been, unless that is no longer there."""
    content = path.read_bytes() if path.is_file() else b""
    if len(content) < size:
        raise ConfigError(f"{path}: expected at least {size} bytes, found {len(content)}")
    if hashlib.sha256(content[:size]).hexdigest() != digest:
        raise ConfigError(
            f"{path}: its first {size} bytes are not what the run wrote before its checkpoint; "
            "without the folder `checkpoints` the run would begin anew"
        )
    os.truncate(path, size)


def read_rows(folder: Path, name: str = ROWS) -> list[dict[str, Any]]:
    """The rows of one of a run's files.

    Raises:
        ConfigError: A line that holds no row; names file and line.
    """
    return parse_rows((folder / name).read_bytes(), folder / name)


def parse_rows(content: bytes, path: Path) -> list[dict[str, Any]]:
    """The rows in the content of a file, one JSON object a line.

    Raises:
        ConfigError: A line that holds none; names file and line.
    """
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            shown = line[:SHOWN].decode(errors="replace")
            raise ConfigError(f"{path}, line {number}: expected a JSON object, found {shown!r}")
        rows.append(row)
    return rows
