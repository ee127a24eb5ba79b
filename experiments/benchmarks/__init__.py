"""Benchmarks, by what they measure.

To add one: a function from a `Request` to an `Outcome`, and a line in `BENCHMARKS`.
"""

from collections.abc import Mapping

from experiments.benchmarks import agents, reward_signal, weighting
from experiments.benchmarks.base import Benchmark, Outcome, Request

__all__ = ["BENCHMARKS", "Benchmark", "Outcome", "Request"]

BENCHMARKS: Mapping[str, Benchmark] = {
    "weighting": Benchmark(
        weighting.measure, "cost of an SGD step under every classical weighting", 30, steps=10
    ),
    "agents": Benchmark(
        agents.measure, "cost of an epoch with every agent, its learning included", 10
    ),
    "reward-signal": Benchmark(
        reward_signal.measure, "whether rewards pay for the teachers that help", 8, traces=True
    ),
}
