"""Keeps what a library does to global state from everybody else."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

RandomStates = tuple[Any, Any, torch.Tensor, list[torch.Tensor] | None]


class Isolation:
    """Gives an algorithm global random generators of its own while a block runs.

    Stable-Baselines3 seeds the generators of Python, NumPy and torch and draws from them. The first
    block begins with the generators as they are; every later one goes on where the one before
    ended. After each they are as if it had never run, and so are cuDNN's flags, which a
    seeded model on a GPU changes: the student's convolutions would be slower.
    """

    def __init__(self) -> None:
        self._own: RandomStates | None = None

    @contextmanager
    def __call__(self, *, ignore: tuple[str, ...] = ()) -> Iterator[None]:
        """Runs a block.

        Args:
            ignore: Warnings that are not shown: patterns of their messages.
        """
        cudnn = torch.backends.cudnn
        flags = cudnn.deterministic, cudnn.benchmark
        before = random_states()
        if self._own is not None:
            set_random_states(self._own)
        try:
            with warnings.catch_warnings():
                for message in ignore:
                    warnings.filterwarnings("ignore", message=message)
                yield
        finally:
            self._own = random_states()
            set_random_states(before)
            cudnn.deterministic, cudnn.benchmark = flags


def random_states() -> RandomStates:
    """The states of Python's, NumPy's and torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    legacy = np.random.get_state()  # noqa: NPY002 - Stable-Baselines3 draws from it
    return random.getstate(), legacy, torch.get_rng_state(), cuda


def set_random_states(states: RandomStates) -> None:
    """Puts the generators back into states that `random_states` gave."""
    python, legacy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(legacy)  # noqa: NPY002 - as above
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
