"""Keeps what a library does to global state from everybody else."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mtkd_env.seeding import isolated, random_states, set_random_states


class Isolation:
    """Gives an algorithm global random generators of its own while a block runs.

    Stable-Baselines3 seeds the generators of Python, NumPy and torch and draws from them. The first
    block begins with the generators as they are; every later one goes on where the one before
    ended. After each they are as if it had never run, and so are cuDNN's flags, which a
    seeded model on a GPU changes: the student's convolutions would be slower.
    """

    def __init__(self) -> None:
        self._own: dict[str, Any] | None = None

    @contextmanager
    def __call__(self, *, ignore: tuple[str, ...] = ()) -> Iterator[None]:
        """Runs a block.

        Args:
            ignore: Warnings that are not shown: patterns of their messages.
        """
        cudnn = torch.backends.cudnn
        flags = cudnn.deterministic, cudnn.benchmark
        with isolated(), warnings.catch_warnings():
            if self._own is not None:
                set_random_states(self._own)
            for message in ignore:
                warnings.filterwarnings("ignore", message=message)
            try:
                yield
            finally:
                self._own = random_states()
                cudnn.deterministic, cudnn.benchmark = flags
