"""Agents that learn with the same images and teachers, each in an environment of its own."""

from collections.abc import Callable, Sequence

import torch

from agents import SB3Agent, build_agent
from experiments.benchmarks.base import Request
from experiments.benchmarks.memory import HistoryMeter, allocated_bytes, held_bytes
from experiments.benchmarks.timing import Reading, Stopwatch
from experiments.benchmarks.timing_report import REFERENCE
from experiments.config import ExperimentConfig
from mtkd_env import Assembly, MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.registration import Parts, make_learner


def comparable_configs(
    request: Request, methods: Sequence[str], *flags: str
) -> dict[str, ExperimentConfig]:
    """The configuration of the reference and of every method, with the same images and teachers.

    Args:
        request: What was asked for.
        methods: Names that `--algo` takes.
        flags: Flags besides the user's own.

    Raises:
        ConfigError: A method that does not exist, or has other images or teachers than the others.
    """
    configs = request.configs(list(dict.fromkeys([REFERENCE, *methods])), *flags)
    first = configs[REFERENCE]
    for name, config in configs.items():
        if (config.data, config.teachers) != (first.data, first.teachers):
            raise ConfigError(
                f"--methods: '{name}' has other images or teachers than '{first.algo}', "
                "so their costs cannot be compared"
            )
    return configs


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

    Attributes:
        agent: The agent.
        peaks: Bytes of its own at the peak of every measured epoch, tensors only: what it keeps on
            the device, and what the epoch takes on top; none on a CPU.
    """

    def __init__(self, assembly: Assembly, config: ExperimentConfig) -> None:
        self._device = assembly.env.device
        before = allocated_bytes(self._device)
        env = make_env(assembly, config)
        arguments = config.agent.arguments
        self.agent = build_agent(config.agent_name, env, seed=config.seed, arguments=arguments)
        self.peaks: list[int] = []
        self._history = HistoryMeter(self.agent)
        for _ in range(config.warmup.epochs):
            self.agent.warm_up(env.steps_per_epoch, config.warmup.weights)
        # Nobody else built anything meanwhile.
        self._own = allocated_bytes(self._device) - before

    def __call__(self, watch: Stopwatch) -> Reading:
        """Measures the time and the peak of an epoch."""
        readings: list[Reading] = []
        on_gpu = self._device.type == "cuda"

        def begin() -> None:
            self._before = allocated_bytes(self._device)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(self._device)
            watch.start()

        def end() -> None:
            readings.append(watch.stop())
            if on_gpu:
                above = torch.cuda.max_memory_allocated(self._device) - self._before
                self.peaks.append(self._own + above)

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
