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
    """Runs a block under a seed and leaves torch's global generator as it was.

    Module constructors draw from the global generator of the CPU; this is the one place that
    seeds it.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
