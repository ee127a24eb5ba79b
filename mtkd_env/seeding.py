"""Seeds: one number from the user, an independent stream of random numbers for every purpose.

The student's initialisation, the data order and each teacher draw from generators of their own,
so that none of them depends on what the others, or the algorithm, have drawn. What modules and
libraries draw from the global generators can be kept here, and gone on from.
"""

import random
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for one purpose, independent of the seeds for other purposes."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode())])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class RandomNumbers:
    """A generator of random numbers of its own on a device, which can be saved."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.generator = torch.Generator(device)
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Starts all over."""
        self.generator.manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Where the generator is."""
        return {"random": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Goes on from what `state_dict` gave, on the same kind of device."""
        self.generator.set_state(state["random"].cpu())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs a block under a seed and leaves torch's global generator as it was.

    Module constructors draw from the global generator of the CPU; this is the one place that
    seeds it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def all_seeded(seed: int) -> Iterator[None]:
    """The same for Python's and NumPy's global generators too, which a user's program may use."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - other programs draw from it
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - as above
    try:
        with seeded(seed):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002 - as above


def random_states() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's global generators, as a checkpoint can hold them."""
    legacy = np.random.get_state()  # noqa: NPY002 - Stable-Baselines3 draws from it
    name, key, *rest = legacy
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(key).astype("int64")), *rest),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Puts the generators back into states that `random_states` gave."""
    name, key, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, key.numpy().astype("uint32"), *rest))  # noqa: NPY002 - as above
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def isolated() -> Iterator[None]:
    """Runs a block and leaves the generators that `random_states` tells of as they were."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def module_states(device: torch.device) -> list[Tensor]:
    """States of the global generators that modules on a device draw from: the CPU's, the GPU's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextmanager
def continued(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Runs a block from states that `module_states` gave; leaves the generators as they were."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.set_rng_state(states[0].cpu())
        if on_gpu:
            torch.cuda.set_rng_state(states[1].cpu(), device)
        yield
