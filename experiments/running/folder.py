"""The folder of a run: made, told from others, cleared."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.config import read_yaml
from experiments.running.checkpoint import Checkpoints
from experiments.running.log import ROWS
from experiments.running.result import RESULT
from mtkd_env.errors import ConfigError
from mtkd_env.files import parse_yaml

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


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return any((folder / name).exists() for name in (CONFIG, ROWS, RESULT))


def check_same_config(text: str, folder: Path, place: Collection[str]) -> None:
    """Checks that a folder holds no run of another configuration.

    Args:
        text: The configuration, in YAML.
        folder: The folder.
        place: Keys that may differ.

    Raises:
        ConfigError: It does; names the keys that differ.
    """
    if not (folder / CONFIG).is_file():
        return
    if changes := differences(parse_yaml(text), read_yaml(folder / CONFIG, "--resume"), place):
        raise ConfigError(f"output: {folder} holds a run of another configuration: {changes}")


def differences(
    own: Mapping[str, Any], theirs: Mapping[str, Any], place: Collection[str] = ()
) -> str:
    """The keys that two configurations differ in, with both values; empty if they do not.

    Args:
        own: One of them.
        theirs: The other.
        place: Keys that may differ.
    """
    own, theirs = flat(own), flat(theirs)
    keys = [key for key in {**own, **theirs} if key.split(".")[0] not in place]
    changed = [key for key in keys if own.get(key) != theirs.get(key)]
    return ", ".join(f"{key} {own.get(key)} instead of {theirs.get(key)}" for key in changed)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys and values with dots between the keys; empty mappings are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def clear(folder: Path, written: Sequence[str]) -> None:
    """Removes what an unfinished run without a checkpoint has left, and nothing else."""
    Checkpoints(folder).clear()
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    for name in written:
        (folder / name).unlink(missing_ok=True)
