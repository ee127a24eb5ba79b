"""Benchmarks, by what they measure.

To add one: a function from a `Request` to an `Outcome`, and a line in `BENCHMARKS`.

- `step.py` with `floor.py`, `roofline.py`, `operations.py`; `agents.py`; `scaling.py`; `data.py`
  with `loader.py`: time. `peak_memory.py`: memory. `reward_signal.py` with `usefulness.py`:
  rewards.
- `base.py`, `variants.py`, `contestant.py`, `synthetic.py`: what is measured, on what.
- `timing.py`, `memory.py`: how; `timing_report.py`: the table, numbers and picture of ratios.
"""

from collections.abc import Mapping

from experiments.benchmarks import (
    agents,
    data,
    peak_memory,
    reward_signal,
    scaling,
    step,
)
from experiments.benchmarks.base import Benchmark, Outcome, Request

__all__ = ["BENCHMARKS", "Benchmark", "Outcome", "Request"]

BENCHMARKS: Mapping[str, Benchmark] = {
    "step": Benchmark(
        step.measure,
        "cost of an SGD step, its learning included, against the least it could cost",
        rounds=10,
        flags=("methods", "variant"),
    ),
    "agents": Benchmark(
        agents.measure, "cost of an epoch with every agent, its learning included", rounds=10
    ),
    "scaling": Benchmark(
        scaling.measure,
        "cost of a step against number and width of the teachers, batch and image size",
        rounds=3,
        flags=("methods", "steps", "axes"),
        steps=4,
    ),
    "memory": Benchmark(
        peak_memory.measure,
        "peak memory of every method, each in a process of its own",
        rounds=1,
        flags=("methods", "epochs"),
        epochs=(3,),
    ),
    "data": Benchmark(
        data.measure,
        "cost of a batch of images, as a share of a step",
        rounds=20,
        flags=("steps",),
        steps=10,
    ),
    "reward-signal": Benchmark(
        reward_signal.measure,
        "whether rewards pay for the teachers that help",
        rounds=8,
        flags=("methods", "epochs"),
        epochs=(0, 1, 5, 15),
    ),
}
