"""The processes that share a run."""

from collections.abc import Iterator
from contextlib import contextmanager

from mtkd_env import distributed
from mtkd_env.computing import find_device


@contextmanager
def together(device: str) -> Iterator[None]:
    """Joins the other processes that `torchrun` has started, if it did; leaves them at the end.

    A process that fails does not wait for the others, which `torchrun` then ends.

    Args:
        device: Name of the device that this process computes on.
    """
    if distributed.launched():
        distributed.join(find_device(device))
    yield
    distributed.leave()
