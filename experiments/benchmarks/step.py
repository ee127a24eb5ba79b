"""What an SGD step costs under methods of all kinds, and how far that is from what it must cost."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.benchmarks.base import Outcome, Request
from experiments.benchmarks.contestant import Contestant, comparable_configs
from experiments.benchmarks.floor import ABOUT, BOUNDS, FLOOR
from experiments.benchmarks.operations import OperationWatch
from experiments.benchmarks.roofline import Roofline, measured_rates
from experiments.benchmarks.timing import (
    HIGH,
    LOW,
    Percentiles,
    Reading,
    Readings,
    Subject,
    per_unit,
    ratio_percentiles,
    seconds,
    stopwatch_for,
    take_turns,
    timed,
)
from experiments.benchmarks.timing_report import REFERENCE, TimingReport, ratio_cells
from experiments.benchmarks.variants import Variant, check_comparable
from experiments.config import ExperimentConfig
from mtkd_env import Assembly

METHODS = ("none", "camkd", "mmkd", "pg", "ppo", "ddpg")

# Epochs of every subject that are not counted, after the warm-up of Algorithm 1.
WARMUP_ROUNDS = 1

NOTES = (
    "step: the student's, with its share of all that the agent learns in an epoch; no evaluation",
    *(f"{name}: {about}" for name, about in ABOUT.items()),
    "operations: what torch starts in a step, views and mere allocations left out; compiled parts "
    "count as they were before",
)

WAITS = "waits: times a step in which the host waits for the device"
WOULD_WAIT = "waits: times a step in which the host would wait if all tensors were on a GPU"


@dataclass(frozen=True)
class Setup:
    """All methods in one configuration.

    Attributes:
        variant: What makes it another one.
        configs: Configuration of every method.
        assembly: Images and teachers.
        seconds: What it took to build those.
    """

    variant: Variant
    configs: Mapping[str, ExperimentConfig]
    assembly: Assembly
    seconds: float

    def subjects(self, request: Request) -> dict[str, Subject]:
        """The floor and every method, each measured over an epoch."""
        steps = self.assembly.env.steps_per_epoch
        found: dict[str, Subject] = {
            name: timed(make(self.assembly, self.configs[REFERENCE], steps))
            for name, make in BOUNDS.items()
        }
        for name in request.count(list(self.configs), self.variant.subject("warm-up epochs")):
            found[name] = Contestant(self.assembly, self.configs[name])
        return {self.variant.subject(name): subject for name, subject in found.items()}

    def values(self) -> dict[str, Any]:
        """What distinguishes it, and what it took to build."""
        return {
            "flags": list(self.variant.flags),
            "configuration": self.configs[REFERENCE].to_yaml(),
            "teachers": list(self.assembly.env.teacher_names),
            "seconds_to_build": self.seconds,
        }


def measure(request: Request) -> Outcome:
    """Times a step of every method and variant, learning included, and counts its operations.

    Raises:
        ConfigError: A method that does not exist, methods with other teachers than the others, or a
            variant that cannot be compared.
    """
    methods = [name for name in request.methods or METHODS if name not in BOUNDS]
    variants = [Variant(), *request.variants]
    configs = [comparable_configs(request, methods, *variant.flags) for variant in variants]
    pairs = list(zip(variants, configs, strict=True))
    for variant, own in pairs:
        check_comparable(variant, own[REFERENCE], configs[0][REFERENCE])
    setups: list[Setup] = []
    for variant, own in pairs:
        began = time.perf_counter()
        assembly = request.build(own[REFERENCE])
        setups.append(Setup(variant, own, assembly, time.perf_counter() - began))
    began = time.perf_counter()
    subjects = {
        name: subject for setup in setups for name, subject in setup.subjects(request).items()
    }
    env = setups[0].assembly.env
    watch = stopwatch_for(env.device)
    take_turns(subjects, watch, request.count(range(WARMUP_ROUNDS), "warm-up rounds"))
    counts = {
        name: per_unit(subject, env.steps_per_epoch)(OperationWatch(env.device))
        for name, subject in request.count(subjects.items(), "epochs of counting operations")
    }
    warmup = time.perf_counter() - began
    readings = take_turns(subjects, watch, request.count(range(request.rounds), "rounds"))
    return _report(setups, readings, counts, warmup)


def _report(
    setups: Sequence[Setup], readings: Readings, counts: Mapping[str, Reading], warmup: float
) -> Outcome:
    first = setups[0]
    env = first.assembly.env
    clock = stopwatch_for(env.device).clocks[0]
    rates = measured_rates(env.device, first.configs[REFERENCE].precision)
    rooflines: list[Roofline] = []
    for name in (FLOOR, REFERENCE):
        took = Percentiles.of(seconds(readings, clock)[name]).median / env.steps_per_epoch
        rooflines.append(Roofline(name, counts[name]["flops"], took, rates))
    floor_ratios = ratio_percentiles(readings, FLOOR, clock)
    return TimingReport(
        title=f"Cost of an SGD step, learning included, as a ratio to {REFERENCE}",
        readings=readings,
        units=env.steps_per_epoch,
        unit="step",
        assembly=first.assembly,
        config=first.configs[REFERENCE],
        notes=[
            *NOTES,
            WOULD_WAIT if env.device.type == "cpu" else WAITS,
            *(roofline.note() for roofline in rooflines),
            _uncounted(setups, warmup),
        ],
        extra=_columns(floor_ratios, counts),
        values={
            "floor_ratios": floor_ratios,
            "counts": counts,
            "roofline": {roofline.name: roofline.values() for roofline in rooflines},
            "setups": {setup.variant.name: setup.values() for setup in setups},
            "warmup_seconds": warmup,
        },
    ).outcome()


def _columns(
    floor_ratios: Mapping[str, Percentiles], counts: Mapping[str, Reading]
) -> dict[str, dict[str, str]]:
    """Columns of the table: heading, then text by subject."""
    texts = {name: ratio_cells(spread) for name, spread in floor_ratios.items()}
    return {
        f"ratio to\n{FLOOR}": {name: text for name, (text, _) in texts.items()},
        f"\n{LOW}-{HIGH} %": {name: text for name, (_, text) in texts.items()},
        "operations\n/step": {name: f"{one['operations']:.0f}" for name, one in counts.items()},
        "waits\n/step": {name: f"{one['synchronizations']:.1f}" for name, one in counts.items()},
    }


def _uncounted(setups: Sequence[Setup], warmup: float) -> str:
    built = ", ".join(
        setup.variant.subject(f"{setup.seconds:.1f} s to build images and teachers")
        for setup in setups
    )
    return f"not in the figures: {built}; {warmup:.1f} s of warm-up and counting"
