"""Agents that learn with the same images and teachers, each in an environment of its own."""

from collections.abc import Callable, Sequence

from agents import SB3Agent, build_agent
from experiments.benchmarks.memory import DevicePeak, HistoryMeter, held_bytes
from experiments.benchmarks.timing import Reading, Stopwatch
from experiments.benchmarks.timing_report import REFERENCE
from experiments.config import ExperimentConfig
from mtkd_env import Assembly, MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.registration import Parts, make_learner


def check_shareable(configs: dict[str, ExperimentConfig]) -> None:
    """Checks that all methods have the same images and the same teachers.

    Raises:
        ConfigError: They have not.
    """
    first = next(iter(configs.values()))
    for name, config in configs.items():
        if (config.data, config.teachers) != (first.data, first.teachers):
            raise ConfigError(
                f"--methods: '{name}' has other images or teachers than '{first.algo}', "
                "so their costs cannot be compared"
            )


def with_reference(methods: Sequence[str]) -> list[str]:
    """The methods, behind the one that they are compared with."""
    return list(dict.fromkeys([REFERENCE, *methods]))


def make_env(assembly: Assembly, config: ExperimentConfig) -> MTKDVectorEnv:
    """An environment with a student of its own; images, stream and teachers are the assembly's.

    Environments that draw from one stream see different batches, which does not change what a step
    costs; their students are not to be compared by what they learn.
    """
    images, teachers = assembly.images, assembly.pool.ensemble
    own = make_learner(images, assembly.env.stream, teachers, Parts(**config.parts))
    own.reset(seed=config.seed)
    return own


class Contestant:
    """An agent in an environment of its own, measured over whole epochs.

    An epoch holds the student's steps and all that the agent learns from them, as much as any epoch
    of a run. An algorithm of a library learns two epochs at a time, and only the second one counts:
    it may learn from an epoch's last steps after it was told that the epoch has ended, and what it
    has not learned from by then is lost between two calls.

    Args:
        assembly: Images and teachers.
        config: Its configuration.
        peak: Reads the device's memory.

    Attributes:
        agent: The agent.
        peaks: Bytes at the peak of every measured epoch; none on a CPU.
    """

    def __init__(self, assembly: Assembly, config: ExperimentConfig, peak: DevicePeak) -> None:
        env = make_env(assembly, config)
        arguments = config.agent.arguments
        self.agent = build_agent(config.agent_name, env, seed=config.seed, arguments=arguments)
        self.peaks: list[int] = []
        self._history = HistoryMeter(self.agent)
        self._name = config.algo
        self._peak = peak
        for _ in range(config.warmup.epochs):
            self.agent.warm_up(env.steps_per_epoch, config.warmup.weights)
        peak.built(self._name)

    def __call__(self, watch: Stopwatch) -> Reading:
        """Measures the time and the peak of an epoch."""
        readings: list[Reading] = []

        def begin() -> None:
            self._peak.begin()
            watch.start()

        def end() -> None:
            readings.append(watch.stop())
            self.peaks.extend(self._peak.end(self._name))

        self._whole_epoch(begin, end)
        return readings[0]

    def history(self) -> int:
        """The most bytes that it keeps to learn from; takes an epoch or two."""
        kept: list[int] = []
        self._whole_epoch(self._history.start, lambda: kept.append(self._history.stop()))
        return kept[0]

    def learners(self) -> int:
        """Bytes of its networks and their optimisers."""
        kept = held_bytes(self.agent, learners=False)
        return held_bytes(self.agent, learners=True) - kept

    def _whole_epoch(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        if isinstance(self.agent, SB3Agent):
            calls = iter([begin, end])
            self.agent.learn(2, lambda: next(calls)())
        else:
            begin()
            self.agent.learn(1, end)
