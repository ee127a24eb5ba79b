"""What a run came to, whatever trained: the part of it that comparisons and pages need."""

import json
import platform
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch

import mtkd_env
from mtkd_env.errors import ConfigError
from mtkd_env.options import default_values

RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to.

    Attributes:
        method: Label of its method.
        setting: Label of the setting that its method was run in; empty where there is but one.
        seed: Its seed.
        pool: Seed of its pool of teachers; 0 where there are none.
        metric: What it is judged by, as a table's heading: a share of 1, the higher the better.
        last: The metric at the end, on images that were not trained on: the result.
        best: Its value in the best epoch: the highest one, chosen on the same images, or the one
            of the epoch that is best on validation images.
        best_epoch: The best epoch, from 1; with a fraction within an epoch.
        epochs: Length of the training.
        seconds: Seconds of the training, evaluations included.
        folder: The run's folder.
        versions: Versions of what the numbers depend on.
        validation: What the metric is on validation images at the end (`last`) and in the epoch
            that they chose (`best`); empty where there are none.
    """

    method: str
    setting: str
    seed: int
    metric: str
    last: float
    best: float
    best_epoch: float
    epochs: float
    seconds: float
    folder: str
    versions: dict[str, str]
    pool: int = 0
    validation: dict[str, float] = field(default_factory=dict)

    @property
    def seeds(self) -> tuple[int, int]:
        """Seed of the pool and its own: what it has in common with runs of other methods."""
        return self.pool, self.seed


def versions(*modules: ModuleType) -> dict[str, str]:
    """Versions of this project, of Python, of torch and of other modules."""
    known = {"mtkd_env": mtkd_env.__version__, "python": platform.python_version()}
    return known | {module.__name__: module.__version__ for module in (torch, *modules)}


Found = TypeVar("Found", bound=RunResult)


def read_result(kind: type[Found], folder: Path) -> Found | None:
    """What the run in a folder came to; none of an unfinished one.

    Raises:
        ConfigError: It is of another version, or of another kind of run.
    """
    path = folder / RESULT
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ConfigError(f"{path}: damaged result ({error})") from error
    known = {entry.name for entry in fields(kind)}
    # What has a default may be newer than the run.
    optional = default_values(kind).keys() - values if isinstance(values, dict) else set()
    if not isinstance(values, dict) or (other := (known - optional) ^ values.keys()):
        named = ", ".join(sorted(other)[:3]) if isinstance(values, dict) else type(values).__name__
        raise ConfigError(
            f"{path}: the result of another version or kind of run, which differs in {named}; "
            "take another folder"
        )
    return kind(**values)
