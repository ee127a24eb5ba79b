"""What something costs, relative to something else of the same run.

Speeds drift while a benchmark runs: other programs come and go, clocks change. So the subjects take
turns (A B C, A B C, ...), and every round gives one ratio to the reference of that round.
"""

import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Seconds by the name of the clock that counted them.
Reading = Mapping[str, float]

# Percentiles that a spread is given by.
LOW, HIGH = 10, 90


class Stopwatch(ABC):
    """Reads all its clocks at once.

    Attributes:
        clocks: Their names; ratios are reported for each, the first one is drawn.
    """

    clocks: tuple[str, ...]

    @abstractmethod
    def start(self) -> None:
        """Begins a measurement."""

    @abstractmethod
    def stop(self) -> Reading:
        """Ends it; gives the seconds that have passed."""


class HostStopwatch(Stopwatch):
    """The processor time of all threads of this process, and the time on the wall."""

    clocks = ("CPU", "wall")

    def start(self) -> None:
        """Begins a measurement."""
        self._began = time.process_time(), time.perf_counter()

    def stop(self) -> Reading:
        """Processor time and time on the wall."""
        processor, wall = self._began
        return {"CPU": time.process_time() - processor, "wall": time.perf_counter() - wall}


class DeviceStopwatch(Stopwatch):
    """The time between two events on a CUDA device, and the time on the wall.

    Args:
        device: The device.
    """

    clocks = ("device", "wall")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def start(self) -> None:
        """Begins a measurement once the device has done all that it was given before."""
        torch.cuda.synchronize(self._device)
        self._began = time.perf_counter()
        self._events[0].record(torch.cuda.current_stream(self._device))

    def stop(self) -> Reading:
        """Waits for the device."""
        self._events[1].record(torch.cuda.current_stream(self._device))
        torch.cuda.synchronize(self._device)
        wall = time.perf_counter() - self._began
        return {"device": self._events[0].elapsed_time(self._events[1]) / 1000, "wall": wall}


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The stopwatch that knows when work on a device has been done."""
    return DeviceStopwatch(device) if device.type == "cuda" else HostStopwatch()


# Does its work once and measures it; what it leaves out of the measurement is its own affair.
Subject = Callable[[Stopwatch], Reading]


def timed(work: Callable[[], object]) -> Subject:
    """A subject that is measured from beginning to end."""

    def measure(watch: Stopwatch) -> Reading:
        watch.start()
        work()
        return watch.stop()

    return measure


def per_unit(subject: Subject, units: int) -> Subject:
    """A subject whose readings are those of one of so many equal units of its work."""

    def measure(watch: Stopwatch) -> Reading:
        return {clock: value / units for clock, value in subject(watch).items()}

    return measure


# Readings, or anything else that was counted in every round, by subject.
Readings = Mapping[str, Sequence[Reading]]


def take_turns(
    subjects: Mapping[str, Subject], watch: Stopwatch, rounds: Iterable[int]
) -> Readings:
    """Measures every subject once in every round, in the order they are given in."""
    readings: dict[str, list[Reading]] = {name: [] for name in subjects}
    for _ in rounds:
        for name, subject in subjects.items():
            readings[name].append(subject(watch))
    return readings


@dataclass(frozen=True)
class Percentiles:
    """Median of some numbers, and the percentiles between which four fifths of them lie."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles":
        """The spread of at least one number."""
        low, median, high = np.percentile(values, [LOW, 50, HIGH])
        return cls(float(median), float(low), float(high))


def seconds(readings: Readings, clock: str) -> dict[str, list[float]]:
    """What one clock counted, by subject and round."""
    return {name: [reading[clock] for reading in mine] for name, mine in readings.items()}


def ratios(readings: Readings, reference: str, clock: str) -> dict[str, list[float]]:
    """Every subject's time over the reference's of the same round."""
    counted = seconds(readings, clock)
    return {
        name: [own / other for own, other in zip(mine, counted[reference], strict=True)]
        for name, mine in counted.items()
    }


def ratio_percentiles(readings: Readings, reference: str, clock: str) -> dict[str, Percentiles]:
    """What the rounds' ratios are like, by subject; see `ratios`."""
    found = ratios(readings, reference, clock)
    return {name: Percentiles.of(values) for name, values in found.items()}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What absolute times depend on; `load` says how busy it has been in the last minute."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "torch": torch.__version__,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def this_machine(device: torch.device) -> str:
    """The machine in a line, for notes."""
    machine = describe_machine(device)
    load = machine["load"]
    busy = "load unknown" if load is None else f"load {load:.1f} in the last minute"
    return (
        f"this machine ({machine['accelerator'] or machine['processor']}, {machine['cores']} "
        f"cores, threads used: {machine['threads']}, {busy})"
    )


def _processor() -> str:
    """The processor's name, where the system tells."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
