"""What runs on a node of a cluster; it imports nothing that would have to be waited for."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from experiments.executors.base import Failure, attempt


@dataclass(frozen=True)
class Place:
    """Where the work is done; it has to look the same from every node.

    Attributes:
        folder: The working folder, which paths may be relative to.
        tokens: A file in every other folder that the nodes share.
    """

    folder: Path
    tokens: Sequence[Path]

    def enter(self) -> None:
        """Goes there.

        Raises:
            FileNotFoundError: This node does not see one of the folders.
        """
        unseen = [token.parent for token in self.tokens if not token.is_file()]
        if not self.folder.is_dir():
            unseen.insert(0, self.folder)
        if unseen:
            raise FileNotFoundError(
                f"--executor ray: node {platform.node()} does not see {unseen[0]}; the working "
                "folder, --output and the cache of teachers must be where all nodes share them"
            )
        os.chdir(self.folder)


def attempt_there(place: Place, work: Callable[[], None]) -> Failure | None:
    """Does something in its place; gives what went wrong as text."""
    return attempt(partial(_work_there, place, work))


def _work_there(place: Place, work: Callable[[], None]) -> None:
    place.enter()
    work()


def nothing() -> None:
    """Work that is done at once."""
