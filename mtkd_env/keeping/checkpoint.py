"""What lets a training go on where it was left, and when that is written."""

import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtkd_env.errors import ConfigError, check_not_negative
from mtkd_env.files import (
    has_own_digest,
    load_checkpoint,
    remove_unfinished,
    save_with_digest,
)
from mtkd_env.options import Options

# Checkpoints that are kept: the last one, and the one before it in case the last is damaged.
KEPT = 2


@dataclass(frozen=True)
class CheckpointConfig(Options):
    """When a run keeps what it can go on from, beside when it is stopped by a signal.

    Attributes:
        epochs: Epochs between two checkpoints; 0 for none by epochs.
        minutes: Minutes between two checkpoints; 0 for none by time. Both 0: none at all.
        share: Largest share of the time that they may take; those that would exceed it are put off.

    Raises:
        ConfigError: A negative number, or a share above 1.
    """

    epochs: int = 1
    minutes: float = 10.0
    share: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(epochs=self.epochs, minutes=self.minutes)
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share: expected a number in [0, 1], got {self.share}")

    @property
    def enabled(self) -> bool:
        """Whether there are any checkpoints."""
        return self.epochs > 0 or self.minutes > 0


class Checkpoints:
    """The last checkpoints of a training, in a folder of their own.

    Args:
        folder: That folder; need not be there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Adds a checkpoint and removes those that are too old.

        Args:
            step: SGD steps so far; not less than at the last checkpoint.
            content: Tensors, numbers, strings and containers of them.
        """
        save_with_digest(self._folder / f"step-{step:08d}.pt", content)
        for path in self._paths()[:-KEPT]:
            # Gone, if another process trains the same.
            path.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint that is not damaged, on the CPU; none if there is none.

        Damaged ones are removed with a warning, and so is what a process left that died amid
        writing one, without.
        """
        remove_unfinished(self._folder)
        for path in reversed(self._paths()):
            with suppress(FileNotFoundError):  # Another process that trains the same is done.
                if has_own_digest(path):
                    return load_checkpoint(path)
                path.unlink()
                warnings.warn(
                    f"{path}: damaged checkpoint, not what was written; it was removed, and the "
                    "one before it is used",
                    stacklevel=2,
                )
        return None

    def clear(self) -> None:
        """Removes all checkpoints, and the folder unless another process writes into it."""
        remove_unfinished(self._folder)
        for path in self._paths():
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()

    def _paths(self) -> list[Path]:
        """The checkpoints, the last one at the end."""
        return sorted(self._folder.glob("step-*.pt"))


class Timetable:
    """Tells when the next checkpoint is due.

    Args:
        config: How often.
        epochs: Epochs at the last checkpoint.
        clock: Seconds.
    """

    def __init__(
        self, config: CheckpointConfig, epochs: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._clock = clock
        self._epochs = epochs
        self._began = self._last = clock()
        self._spent = 0.0

    def due(self, epochs: int) -> bool:
        """Whether a checkpoint is due after so many epochs, and does not cost too much."""
        config, now = self._config, self._clock()
        if self._spent > config.share * (now - self._began):
            return False
        by_epochs = config.epochs > 0 and epochs - self._epochs >= config.epochs
        by_time = config.minutes > 0 and now - self._last >= 60 * config.minutes
        return by_epochs or by_time

    def written(self, epochs: int, seconds: float) -> None:
        """A checkpoint was written after so many epochs, and took so long."""
        self._epochs = epochs
        self._last = self._clock()
        self._spent += seconds
