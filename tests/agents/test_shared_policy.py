"""One policy for any teachers: what it gives, and how an agent carries it from place to place."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from agents import Agent, Frozen, build_agent
from agents.policy_gradient import LearningAgent
from known_optimum import knowing, scores, specialists_env, started_env
from mtkd_env.action import generated_weights
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.observation import RelativeObserver
from mtkd_env.seeding import seeded
from mtkd_env.shared_policy import SharedPolicy
from tiny import generator, make_tiny_distiller

WIDTH = RelativeObserver.features_per_teacher
ARGUMENTS: dict[str, dict[str, Any]] = {
    "pg": {},
    "reinforce": {"distribution": "gaussian"},
    "dpg": {"passes": 1},
}
every_agent = pytest.mark.parametrize("name", ARGUMENTS)


def policy(**arguments: int) -> SharedPolicy:
    with seeded(0):
        return SharedPolicy(**arguments)


def seen(teachers: int, size: int = 6) -> torch.Tensor:
    """Rows of a relative observation, (B, M, K + 1)."""
    rows = torch.randn(size, teachers, WIDTH, generator=generator(teachers))
    rows[..., -1] = 1
    return rows


def env(count: int = 3, **kwargs: Any) -> MTKDVectorEnv:
    distiller = make_tiny_distiller(count=count)
    return started_env(
        distiller=distiller, observation="relative", **{"fusion": "generator", **kwargs}
    )


def agent(name: str, where: MTKDVectorEnv, **arguments: Any) -> LearningAgent[Any]:
    arguments = {"policy": "shared", "hidden": 8, **ARGUMENTS[name], **arguments}
    return build_agent(name, where, seed=0, arguments=arguments)


@pytest.mark.parametrize("teachers", [1, 2, 5, 9])
def test_reordering_teachers_reorders_their_weights(teachers: int) -> None:
    network, rows = policy(), seen(teachers)
    order = torch.randperm(teachers, generator=generator(0))
    found, moved = (generated_weights(network(x.flatten(1))) for x in (rows, rows[:, order]))
    assert found.logit.shape == (6, teachers)
    for head in ("logit", "feature"):
        one, other = getattr(found, head)[:, order], getattr(moved, head)
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
    assert not torch.allclose(found.logit, found.feature) or teachers == 1


def test_teachers_that_are_not_there_weigh_nothing_and_change_nothing() -> None:
    network, rows = policy(layers=1), seen(3)
    padded = torch.cat([rows, torch.zeros(6, 2, WIDTH)], dim=1)
    found, alone = (generated_weights(network(x.flatten(1))) for x in (padded, rows))
    assert found.logit[:, 3:].eq(0).all()
    assert found.feature[:, 3:].eq(0).all()
    torch.testing.assert_close(found.logit[:, :3], alone.logit)


@every_agent
def test_a_shared_policy_needs_a_relative_observation(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        agent(name, started_env())
    assert str(error.value) == "policy: 'shared' needs the observation 'relative', found 'all'"


@every_agent
def test_an_agent_goes_on_where_the_teachers_are_others(name: str) -> None:
    first, second = env(3), env(2, seed=1)
    learner = agent(name, first, agent_every=None)
    learner.learn(1, lambda: None)
    learner.keep(learner.collect())
    before, updates = deepcopy(learner.policy.state_dict()), learner.updates
    learner.enter(second)
    assert all(learner.policy.state_dict()[key].equal(value) for key, value in before.items())
    assert len(learner.history) == 0
    steps = first.steps
    learner.learn(1, lambda: None)
    assert first.steps == steps
    assert learner.updates > updates
    assert learner.act(second.observation).shape == (second.num_envs, 4)
    assert not all(learner.policy.state_dict()[key].equal(value) for key, value in before.items())
    learner.load_state_dict(deepcopy(learner.state_dict()))


def test_labelled_images_are_those_of_the_environment_that_was_entered() -> None:
    learner = agent("pg", env(3), likelihood=1.0, likelihood_size=2)
    learner.learn(1, lambda: None)
    second = env(2)
    state = learner.parts["draws"].state_dict()
    learner.enter(second)
    assert learner.parts["draws"].state_dict()["random"].equal(state["random"])
    drawn = learner._draws.draw(2)
    assert drawn.teachers is not None
    assert len(drawn.teachers.logits) == 2


def test_only_a_shared_policy_enters_another_environment() -> None:
    learner = build_agent("pg", started_env(), seed=0, arguments={})
    with pytest.raises(ConfigError, match=r"^policy: 'teacher' is made for the teachers of one"):
        learner.enter(started_env())
    with pytest.raises(ConfigError, match=r"^policy: 'shared' needs the observation 'relative'"):
        agent("pg", env()).enter(started_env())
    with pytest.raises(ConfigError, match=r"^fusion: 'learnable' belongs to one environment"):
        agent("pg", env()).enter(env(fusion="learnable"))


# Of teachers that know disjoint classes the best weights are known: their score is 1, equal ones 0.

DISJOINT = {
    3: ((0, 1), (2, 3), ()),
    4: ((0, 1), (2,), (3, 4, 5), (6, 7)),
    5: ((0, 1, 2), (3,), (4, 5), (6, 7, 8), ()),
    6: ((0,), (1, 2, 3), (4, 5), (6, 7), (8, 9, 10), (11, 12)),
}
CLASSES_OF = {3: 4, 4: 8, 5: 9, 6: 13}


def frozen(learner: Agent, where: MTKDVectorEnv, teachers: int) -> float:
    """The score of an agent that learns nothing, which asks who knows the class of each sample."""
    found = scores(Frozen(learner), 2)[-1]
    asked = where.to_weights(learner.act(where.observation)).logit.argmax(1)
    assert asked.eq(knowing(where, DISJOINT[teachers])).float().mean() > 0.8
    return found


def disjoint_env(teachers: int, **options: Any) -> MTKDVectorEnv:
    classes = CLASSES_OF[teachers]
    return specialists_env(DISJOINT[teachers], classes, observation="relative", **options)


@pytest.mark.parametrize("teachers", DISJOINT)
def test_the_shipped_agent_knows_whom_to_ask(teachers: int) -> None:
    where = disjoint_env(teachers, fusion="prior", prior="consensus")
    agent = build_agent("pg", where, seed=0, arguments={}, load="pretrained")
    # Of three, one has never learned anything, and is not told from those who know a class each.
    assert frozen(agent, where, teachers) > (0.9 if teachers > 3 else 0.45)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pg", "reinforce"])
def test_an_agent_knows_whom_to_ask_at_numbers_of_teachers_and_classes_it_has_not_seen(
    name: str,
) -> None:
    arguments = {"policy": "shared", "lr": 5e-3, "agent_every": 1}
    learner = build_agent(name, disjoint_env(3), seed=0, arguments=arguments)
    for teachers in (3, 4, 3, 4, 3, 4):
        learner.enter(disjoint_env(teachers))
        learner.learn(4, lambda: None)
    learner.enter(disjoint_env(5))
    assert frozen(learner, learner.env, 5) > 0.8
