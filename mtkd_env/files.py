"""Files that are either whole or not there: atomic writes, and checkpoints that hold no code."""

import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mtkd_env.errors import ConfigError


def cache_folder() -> Path:
    """Where trained teachers are kept.

    `$MTKD_CACHE` if set, else `mtkd_env` in `$XDG_CACHE_HOME`, else in `~/.cache`.
    """
    if chosen := os.environ.get("MTKD_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mtkd_env"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary file beside `path`, then flushes it to disk and renames it.

    A file of that name is replaced as a whole; if `write` fails, nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors, numbers and containers of them atomically."""
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote; never runs code from the file.

    Raises:
        ConfigError: No such file, a damaged one, or one that holds more than tensors.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not a checkpoint of tensors only ({reason})") from error
    except (RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: damaged checkpoint ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a dictionary, found {type(content).__name__}")
    return content
