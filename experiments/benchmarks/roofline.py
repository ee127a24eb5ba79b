"""The least time that some arithmetic could take here, by the fastest arithmetic measured here."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from experiments.benchmarks.operations import counting
from experiments.benchmarks.timing import stopwatch_for, timed
from mtkd_env.precision import PRECISIONS

# Shorter work would rather measure how fast it can be started [s].
LONG_ENOUGH = 0.02

SMALLEST, LARGEST = 64, 16384

REPEATS = 5

# Images and their side in the convolution.
IMAGES, SIDE = 64, 16

Work = Callable[[], Tensor]

# Makes work whose size is a number of rows or channels; takes the form of all tensors.
Maker = Callable[[int, Mapping[str, Any]], Work]


def _product(size: int, form: Mapping[str, Any]) -> Work:
    first, second = (torch.randn(size, size, **form) for _ in range(2))
    return lambda: first @ second


def _convolution(layout: torch.memory_format, size: int, form: Mapping[str, Any]) -> Work:
    images = torch.randn(IMAGES, size, SIDE, SIDE, **form).to(memory_format=layout)
    kernel = torch.randn(size, size, 3, 3, **form).to(memory_format=layout)
    return lambda: functional.conv2d(images, kernel, padding=1)


MAKERS: Mapping[str, Maker] = {
    "matrix product": _product,
    "convolution": partial(_convolution, torch.contiguous_format),
    "channels-last convolution": partial(_convolution, torch.channels_last),
}


@torch.inference_mode()
def measured_rates(device: torch.device, precision: str) -> dict[str, float]:
    """The best of several rates of each kind of work [FLOP/s].

    On a CPU, per second of processor time: that of one core, whatever the number of threads.

    Args:
        device: Where it is done.
        precision: The format of all numbers.
    """
    form = {"device": device, "dtype": PRECISIONS[precision]}
    return {name: _rate(make, form) for name, make in MAKERS.items()}


def _rate(make: Maker, form: Mapping[str, Any]) -> float:
    size = SMALLEST
    while _seconds(work := make(size, form), form["device"]) < LONG_ENOUGH and size < LARGEST:
        size *= 2
    with counting(form["device"]) as counter:
        work()
    return counter.flops / min(_seconds(work, form["device"]) for _ in range(REPEATS))


def _seconds(work: Work, device: torch.device) -> float:
    watch = stopwatch_for(device)
    return timed(work)(watch)[watch.clocks[0]]


@dataclass(frozen=True)
class Roofline:
    """What a step is measured against.

    Attributes:
        name: Whose step.
        flops: Matrix products and convolutions of the step [FLOP].
        seconds: What it took.
        rates: What the machine did elsewhere, by kind of work [FLOP/s].
    """

    name: str
    flops: float
    seconds: float
    rates: Mapping[str, float]

    @property
    def least_seconds(self) -> float:
        """What the step would take at the best of the rates."""
        return self.flops / max(self.rates.values())

    @property
    def share(self) -> float:
        """Which share of the measured time that is."""
        return self.least_seconds / self.seconds

    def note(self) -> str:
        """In a line."""
        best = max(self.rates, key=lambda kind: self.rates[kind])
        others = ", ".join(
            f"{kind} {rate / 1e9:.1f}" for kind, rate in self.rates.items() if kind != best
        )
        return (
            f"roofline: {self.flops / 1e9:.3g} GFLOP in a step of {self.name}; the machine's best "
            f"rate is {self.rates[best] / 1e9:.1f} GFLOP/s ({best}; {others}), so at least "
            f"{1000 * self.least_seconds:.2f} ms: {self.share:.0%} of the {1000 * self.seconds:.2f}"
            " ms measured"
        )

    def values(self) -> dict[str, Any]:
        """All numbers."""
        return {**asdict(self), "least_seconds": self.least_seconds, "share": self.share}
