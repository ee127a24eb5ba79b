"""Seeds: one number from the user, an independent stream of random numbers for every purpose.

The student's initialisation, the data order and each teacher draw from generators of their own,
so that none of them depends on what the others, or the algorithm, have drawn.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for one purpose, independent of the seeds for other purposes."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode())])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs a block under a seed and leaves the global generators of torch as they were.

    Module constructors draw from torch's global generator; this is the one place that sets it.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
