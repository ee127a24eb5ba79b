"""What runs on a node of a cluster; it imports nothing that would have to be waited for."""

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.executors.base import Failure, attempt


def attempt_in(folder: Path, tokens: Sequence[Path], work: Callable[[], None]) -> Failure | None:
    """Does something in a place that looks the same from every node.

    Args:
        folder: The working folder, which paths may be relative to.
        tokens: A file in every other folder that the nodes share.
        work: What to do.

    Returns:
        What went wrong, as text; that may be that this node does not see one of the folders.
    """

    def work_there() -> None:
        unseen = [token.parent for token in tokens if not token.is_file()]
        if not folder.is_dir():
            unseen.insert(0, folder)
        if unseen:
            raise FileNotFoundError(
                f"--executor ray: node {platform.node()} does not see {unseen[0]}; the working "
                "folder, --output and the cache of teachers must be where all nodes share them"
            )
        os.chdir(folder)
        work()

    return attempt(work_there)


def nothing() -> None:
    """Work that is done at once."""
