"""One set of images and one ensemble of teachers for all methods of a benchmark."""

from dataclasses import asdict
from functools import partial

from experiments.config import ExperimentConfig
from mtkd_env import Assembly, MTKDVectorEnv
from mtkd_env.distiller import Distiller
from mtkd_env.errors import ConfigError
from mtkd_env.networks import build_network
from mtkd_env.networks.base import Network
from mtkd_env.seeding import derive_seed
from mtkd_env.teachers import class_means
from mtkd_env.terms import needs_directions


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


def make_student(assembly: Assembly, config: ExperimentConfig) -> Network:
    """A new student for the images of an assembly."""
    data = assembly.data
    return build_network(
        config.student.network,
        num_classes=data.num_classes,
        in_channels=data.image_shape[0],
        image_size=data.image_shape[1:],
        width=config.student.width,
        **config.student.arguments,
    )


def make_env(assembly: Assembly, config: ExperimentConfig) -> MTKDVectorEnv:
    """An environment with a student of its own; images, stream and teachers are the assembly's.

    Environments that draw from one stream see different batches, which does not change what a step
    costs; their students are not to be compared by what they learn.
    """
    env = assembly.env
    teachers = env.distiller.teachers
    needs_means = needs_directions(config.distillation.feature)
    distiller = Distiller(
        partial(make_student, assembly, config),
        teachers,
        image_shape=assembly.data.image_shape,
        steps_per_epoch=env.steps_per_epoch,
        recipe=config.optimizer,
        directions=class_means(teachers, env.splits["train"]()) if needs_means else (),
        precision=config.precision,
        capture=config.capture,
        device=env.device,
        seed=derive_seed(config.seed, "student"),
        **asdict(config.distillation),
    )
    own = MTKDVectorEnv(distiller, env.stream, env.splits, output="torch", **asdict(config.env))
    own.reset(seed=config.seed)
    return own
