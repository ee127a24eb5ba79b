"""Datasets that torchvision knows how to download: found, fetched on request, or named as missing.

A download happens in a folder of its own and is moved into place file by file when it is whole, so
that an interrupted one leaves nothing behind, and several processes may download at once.
"""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mtkd_env.errors import ConfigError
from mtkd_env.files import cache_folder, user_path

# What torchvision's readers and downloads raise for files that are missing, damaged or out of
# reach; network errors are among the OSErrors.
FAILURES = (RuntimeError, OSError, EOFError, ValueError, AssertionError, LookupError, TypeError)

Defects = Callable[[Path], Iterable[tuple[Path, str]]]


def data_folder() -> Path:
    """Where datasets are looked for and downloaded to: `$MTKD_DATA`, else `data` in the cache."""
    chosen = os.environ.get("MTKD_DATA")
    return user_path(chosen) if chosen else cache_folder() / "data"


def found_root(root: str | Path | None) -> Path:
    """The folder that was asked for, or the one that datasets are kept in."""
    return data_folder() if root is None else user_path(root)


def read(
    name: str,
    kind: Callable[..., Any],
    folder: str,
    defects: Defects,
    root: Path,
    *,
    download: bool,
) -> tuple[Any, Any]:
    """The training part and the test part of a dataset of torchvision's.

    Args:
        name: Name in `DATASETS`.
        kind: Class of torchvision's, made by `kind(root, train=..., download=...)`.
        folder: Where it keeps its files, relative to its root.
        defects: Gives what is wrong with the files under a root, each as a path and a reason.
        root: The folder, in torchvision's layout.
        download: Whether to download, with a progress bar, what is missing or damaged.

    Raises:
        ConfigError: Missing or damaged files, or a failed download; names the path that was
            looked at.
    """
    try:
        train, test = (kind(root, train=part, download=False) for part in (True, False))
        return train, test
    except FAILURES as error:
        if not download:
            path, reason = next(iter(defects(root)), (root / folder, f"cannot read: {error}"))
            raise ConfigError(
                f"{name}: {path}: {reason}; looked in {root}, which --data.arguments.root (or "
                "$MTKD_DATA) changes; --data.arguments.download true downloads it"
            ) from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary:
            kind(temporary, train=True, download=True)
            _move(Path(temporary) / folder, root / folder)
    except FAILURES as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name}: cannot download to {root}: {reason}") from error
    return read(name, kind, folder, defects, root, download=False)


def _move(source: Path, target: Path) -> None:
    """Moves all files of a folder, each at once; those of the same name are replaced."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
