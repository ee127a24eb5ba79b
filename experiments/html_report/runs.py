"""The finished runs below a folder, as they are on disk."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.config import read_yaml
from experiments.experiment import METRIC, Result
from experiments.running.folder import CONFIG, flat
from experiments.running.log import ROWS, read_rows
from experiments.running.result import RESULT, RunResult, read_result
from experiments.training import BREAKDOWN
from experiments.transfer.program import TaskResult
from experiments.transfer.progress import EVALUATED
from mtkd_env.errors import ConfigError

ACCURACY = "test/accuracy"


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, of distillation or of another task.

    Attributes:
        folder: Its folder.
        name: The folder, relative to the one that was searched.
        result: What it came to.
        config: Its configuration, by dotted keys; lists are values.
        rows: Its metrics, one row an epoch.
        breakdown: What its mean weights of the last epoch are made of; none of older runs.
    """

    folder: Path
    name: str
    result: RunResult
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    breakdown: Mapping[str, Any] | None

    @property
    def curve(self) -> str:
        """What its metric is called in its rows and in TensorBoard."""
        return ACCURACY if self.result.metric == METRIC else f"{EVALUATED}{self.result.metric}"

    @property
    def dataset(self) -> str:
        """Name of its images, that of their file or folder if they have one."""
        path = self.config.get("data.arguments.path") or self.config.get("data")
        return Path(path).stem if path else getattr(self.result, "dataset", "")

    @property
    def student(self) -> str:
        """Name of the network that was trained."""
        return getattr(self.result, "student", "") or str(self.config.get("model", ""))


@dataclass(frozen=True)
class Found:
    """The finished runs, sorted by name; and why other folders were left out, by their names."""

    runs: Sequence[FinishedRun]
    unreadable: Mapping[str, str]


def find_runs(root: Path) -> Found:
    """All finished runs in a folder and in the folders below it.

    Raises:
        ConfigError: No such folder, or one without a finished run.
    """
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder of runs")
    runs: list[FinishedRun] = []
    unreadable: dict[str, str] = {}
    for folder in sorted(path.parent for path in root.rglob(RESULT)):
        try:
            runs.append(_read_run(folder, root))
        except ConfigError as error:
            unreadable[_name(folder, root)] = str(error)
    if not runs:
        first = next(iter(unreadable.values()), "")
        others = f"; could not read {len(unreadable)}, of which {first}" if unreadable else ""
        raise ConfigError(f"{root}: expected finished runs, folders with {RESULT}{others}")
    return Found(runs, unreadable)


def _name(folder: Path, root: Path) -> str:
    return folder.name if folder == root else folder.relative_to(root).as_posix()


def _read_run(folder: Path, root: Path) -> FinishedRun:
    """A run.

    Raises:
        ConfigError: A file of it was lost or damaged, or is of another version; says which.
    """
    result = _read_result(folder)
    config = read_yaml(folder / CONFIG, "config")
    try:
        rows = read_rows(folder)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    if not rows:
        raise ConfigError(f"{folder / ROWS}: expected rows, found none")
    try:
        breakdown = read_rows(folder, BREAKDOWN)[-1]
    except (OSError, ValueError, IndexError):
        breakdown = None
    return FinishedRun(folder, _name(folder, root), result, flat(config), rows, breakdown)


def _read_result(folder: Path) -> RunResult:
    try:
        result: RunResult | None = read_result(Result, folder)
    except ConfigError as error:
        try:
            result = read_result(TaskResult, folder)
        except ConfigError:
            raise error from None
    assert result is not None  # Its file is there.
    return result


def describe(value: Any) -> str:
    """A value of a configuration as a person would write it; teachers by their names."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return ", ".join(_describe_teacher(entry) for entry in value)
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict):
        return json.dumps(value)
    return yaml.safe_dump(value).removesuffix("...\n").strip()


def _describe_teacher(entry: Mapping[str, Any]) -> str:
    kind, width = entry.get("kind", "trained"), entry.get("width", 1)
    extras = [] if kind == "trained" else [str(kind)]
    extras += [] if width == 1 else [f"× {width}"]
    extras += [f"seed {entry['seed']}"] if entry.get("seed") else []
    extras += [str(entry["checkpoint"])] if entry.get("checkpoint") else []
    name = str(entry.get("name") or entry.get("network", "?"))
    return f"{name} ({', '.join(extras)})" if extras else name
