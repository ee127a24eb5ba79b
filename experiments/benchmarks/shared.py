"""One set of images and one ensemble of teachers for all methods of a benchmark."""

from collections.abc import Sequence

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
