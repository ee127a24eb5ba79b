"""The folder of a run: made, told from others, cleared."""

import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.running.log import ROWS
from experiments.running.result import RESULT
from mtkd_env.errors import ConfigError
from mtkd_env.keeping import Checkpoints

CONFIG = "config.yaml"


def new_folder(parent: Path, name: str) -> Path:
    """A new folder for a run: `parent/name_time`.

    Raises:
        ConfigError: The folder cannot be made.
    """
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"_{i}" for i in range(2, 1000))):
        folder = parent / f"{name}_{stamp}{suffix}"
        if make_new(folder):
            return folder
    raise ConfigError(f"output: {parent} holds too many runs of one second")


def make_new(folder: Path) -> bool:
    """Makes a folder; whether it was not there before.

    Raises:
        ConfigError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.parent.is_dir():
            raise ConfigError(f"output: {folder.parent} is a file, expected a folder") from None
        return False
    except NotADirectoryError:
        raise ConfigError(f"output: {folder.parent} is no folder, or in none") from None
    except OSError as error:
        raise ConfigError(f"output: cannot make {folder}: {error.strerror}") from error
    return True


def checkpoints_in(folder: Path) -> Checkpoints:
    """The checkpoints of the run in a folder."""
    return Checkpoints(folder / "checkpoints")


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return any((folder / name).exists() for name in (CONFIG, ROWS, RESULT))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys and values with dots between the keys; empty mappings are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def clear(folder: Path, written: Sequence[str]) -> None:
    """Removes what an unfinished run without a checkpoint has left, and nothing else."""
    checkpoints_in(folder).clear()
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    for name in written:
        (folder / name).unlink(missing_ok=True)
