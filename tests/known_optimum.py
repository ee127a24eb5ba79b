"""Problems whose best weights are known, and the score that an agent reaches on them."""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from agents import Agent
from agents.policy_gradient import LearningAgent
from experiments.metrics import EpochMeter
from mtkd_env import Recipe
from mtkd_env.data import ImageData
from mtkd_env.data.split import LabelSpec
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.networks.base import Network
from mtkd_env.reference import ReferenceImages
from mtkd_env.reward import Credit, RewardFunction, RewardRule
from mtkd_env.teachers import TeacherEnsemble, TrainingSet
from mtkd_env.types import DistillState
from tiny import CLASSES, NUM_ENVS, generator, make_tiny_distiller, make_tiny_env, training_set

STEPS = 3

# Which classes of the tiny images each specialist knows.
KNOWN = ((0, 1), (2, 3), ())


def one_favourite(state: DistillState, _: Any) -> Tensor:
    """The second teacher is the best for every sample, the third the second best."""
    worth = torch.zeros_like(state.divergence)
    worth[:, 1:3] = torch.tensor([1.0, 0.3])
    return worth


def the_surest(state: DistillState, _: Any) -> Tensor:
    """The best teacher of a sample is the one with the smallest cross-entropy, which is seen."""
    return -state.teacher_cross_entropy


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def ignore() -> None:
    """Ends an epoch."""


def started_env(*, steps: int = STEPS, num_envs: int = NUM_ENVS, **kwargs: Any) -> MTKDVectorEnv:
    """A tiny environment with so many steps an epoch, reset."""
    batches = training_set(steps * num_envs).stream(num_envs, torch.device("cpu"), seed=0)
    env = make_tiny_env(batches=batches, **kwargs)
    env.reset(seed=0)
    return env


def known_env(credit: Credit = one_favourite, **kwargs: Any) -> MTKDVectorEnv:
    """The same, but the agent decides alone, and `credit` says which teachers pay."""
    env = started_env(**{"fusion": "generator", **kwargs})
    env.reward = RewardFunction(RewardRule(credit), env.distiller.distillation)
    return env


class Cells(Network):
    """Sees the brightness of an image's cells, one of which is bright for each class.

    Args:
        classes: C; as many of the sixteen cells are looked at.
    """

    signed_map = True

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.num_classes = self.feature_dim = self.map_channels = classes
        self.cells = nn.Sequential(nn.AvgPool2d(2), nn.PixelUnshuffle(4))
        self.classifier = nn.Linear(classes, classes)

    def features(self, inputs: Tensor) -> Tensor:
        return self.cells(inputs)[:, : self.num_classes]


@cache
def cells(classes: int, count: int = 160) -> ImageData:
    """Noise with a bright cell, a different one for each class."""
    targets = torch.arange(count) % classes
    draw = torch.Generator().manual_seed(classes)
    noise = torch.randint(100, (count, 4, 2, 4, 2), generator=draw)
    noise[torch.arange(count), targets // 4, :, targets % 4] += 150
    images = noise.view(count, 1, 8, 8).to(torch.uint8)
    return ImageData(
        name=f"cells{classes}",
        x_train=images,
        y_train=targets,
        x_test=images,
        y_test=targets,
        num_classes=classes,
        flip=False,
        crop_padding=0,
    )


def specialist(known: tuple[int, ...], classes: int) -> Cells:
    """Right about some classes; of an image of another one it says one of them."""
    network = Cells(classes)
    with torch.no_grad():
        network.classifier.weight.copy_(3 * torch.eye(classes))
        network.classifier.bias.fill_(-10.0 if known else 0.0)
        network.classifier.bias[list(known)] = 0.0
        if not known:
            network.classifier.weight.zero_()
    return network


def specialists_env(
    known: tuple[tuple[int, ...], ...] = KNOWN, classes: int = CLASSES, **options: Any
) -> MTKDVectorEnv:
    """Every class is known to one teacher; a student that stands still, and 16 of 160 labels.

    The agent sees no label of a sample, and is paid by what helps the labelled images.

    Args:
        known: Which classes each teacher knows.
        classes: C.
        options: Of the environment.
    """
    images = cells(classes)
    splits = images.split(labels=LabelSpec(labelled=4 * classes))
    hidden = TrainingSet(images, splits)
    networks = [specialist(own, classes) for own in known]
    ensemble = TeacherEnsemble(networks, [f"teacher{m}" for m in range(len(known))])
    reference = ReferenceImages(
        ensemble,
        labelled=partial(hidden.evaluation_batches, splits.labelled, "cpu"),
        student=partial(hidden.evaluation_batches, splits.train, "cpu"),
        complete=hidden.complete,
    )
    distiller = make_tiny_distiller(
        student=partial(Cells, classes),
        ensemble=ensemble,
        reference=reference,
        recipe=Recipe(epochs=100, lr=0.0),
        feature="none",
    )
    batches = hidden.stream(16, torch.device("cpu"), seed=0)
    env = make_tiny_env(distiller=distiller, batches=batches, reward="heldout", **options)
    env.reset(seed=0)
    return env


def knowing(env: MTKDVectorEnv, known: tuple[tuple[int, ...], ...] = KNOWN) -> Tensor:
    """Position of the specialist that knows the class of each sample, hidden or not."""
    classes = env.distiller.teachers.num_classes
    owner = torch.tensor([[c in own for own in known] for c in range(classes)]).int().argmax(1)
    return owner[cells(classes).y_train[env.state.batch.index]]


def scores(agent: Agent, epochs: int) -> list[float]:
    """The agent's score in every epoch of learning."""
    env = agent.env
    meter = EpochMeter(env.teacher_names, env.distiller.teachers.num_classes)
    env.subscribe(meter)
    found: list[float] = []
    agent.learn(epochs, lambda: found.append(meter.read()[0]["score"]))
    return found


def teach(agent: LearningAgent[Any], steps: Iterable[Any]) -> None:
    """One update of the agent from steps as if they were all since the last one."""
    for step in steps:
        agent.history.add(step)
    agent.update()


def advantages_of(env: MTKDVectorEnv) -> Callable[[], Tensor]:
    """Collects the advantages of all steps from now on; gives them, one row a sample."""
    found: list[Tensor] = []
    env.subscribe(lambda record: found.append(record.rewards.advantages))
    return lambda: torch.cat(found)
