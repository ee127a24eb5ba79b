"""The device of a run, and the processes that share it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mtkd_env import distributed
from mtkd_env.errors import ConfigError


def find_device(name: str, threads: int | None = None) -> torch.device:
    """A device by its name, after setting the number of CPU threads if one is given.

    Args:
        name: cpu, cuda, cuda:1, ...; auto takes this process's GPU if there is one.
        threads: CPU threads.

    Raises:
        ConfigError: A device that does not exist here.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", distributed.place_on_machine())
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: cannot use '{name}': {reason}") from error
    return device


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
