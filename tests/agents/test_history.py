"""What agents keep between two updates: all of it, in little memory where there is a store."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import PolicyGradient, Transition, build_agent
from agents.history import History
from agents.policy_gradient import LearningAgent
from known_optimum import STEPS, started_env
from mtkd_env.data.views import FRESH, MemoryViews, ViewSet
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.observation import ShortObservation
from mtkd_env.teachers import StoreSpec
from mtkd_env.teachers.store import StoredTeachers
from processes import Pair, two_processes
from tiny import NUM_ENVS, TEACHERS, make_tiny_env, teachers, training_set

M = len(TEACHERS)
LEARNING = ["pg", "reinforce", "dpg"]
every_agent = pytest.mark.parametrize("name", LEARNING)
TWO = ViewSet(2)


def stored_env(
    folder: Path, place: str = "host", view_set: ViewSet = TWO, *, short: bool = True, **kwargs: Any
) -> MTKDVectorEnv:
    """A tiny environment with a store, reset; whether observations are kept short is a choice."""
    images = training_set(STEPS * NUM_ENVS)
    stream = images.stream(NUM_ENVS, torch.device("cpu"), 0, view_set=view_set)
    assert isinstance(stream.views, MemoryViews)
    on_disk = folder if place == "disk" else None
    spec = StoreSpec(place=place)
    store = StoredTeachers(teachers(), stream.views, spec, batch_size=NUM_ENVS, folder=on_disk)
    stream.teaching = store
    env = make_tiny_env(batches=stream, **kwargs)
    if not short:
        env.observer.shorten = lambda _: None
    env.reset(seed=0)
    return env


def made(name: str, env: MTKDVectorEnv, **arguments: Any) -> LearningAgent[Any]:
    agent = build_agent(name, env, seed=0, arguments={"agent_every": None, **arguments})
    assert isinstance(agent, LearningAgent)
    return agent


def bits(agent: LearningAgent[Any]) -> Tensor:
    """All numbers of the policy and of the student."""
    modules = agent.policy, agent.env.distiller.module
    return torch.cat([tensor.flatten() for one in modules for tensor in one.state_dict().values()])


def trained(agent: LearningAgent[Any]) -> Tensor:
    """What comes of three epochs."""
    agent.warm_up(STEPS)
    agent.learn(2, lambda: None)
    return bits(agent)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    entries = value.values() if isinstance(value, dict) else value
    return [tensor for entry in entries for tensor in tensors(entry)]


# All of it.


@every_agent
def test_steps_are_read_as_the_agent_saw_them_once_the_statistics_have_settled(name: str) -> None:
    env = started_env()
    agent = made(name, env)
    agent.warm_up(STEPS)
    seen = []
    env.subscribe(lambda _: seen.append(observed[-1]))
    observed: list[Tensor] = []
    found: list[Tensor] = []

    def look() -> None:
        observed.append(env.observation)

    agent.learn_from = lambda history: found.extend(step.observation for step in history)
    agent.learn(1, lambda: None, look)
    assert len(found) == len(seen) == STEPS
    assert all(one.equal(other) for one, other in zip(found, seen, strict=True))


@pytest.mark.parametrize("steps_kept", [1, 2])
@every_agent
def test_a_history_that_has_no_room_for_another_step_is_learned_from(
    name: str, steps_kept: int
) -> None:
    size = made(name, started_env())
    size.keep(size.collect())
    agent = made(name, started_env(steps=6), history_bytes=size.history.nbytes * steps_kept + 1)
    found: list[int] = []
    agent.learn_from = lambda history: found.append(len(history))
    agent.learn(1, lambda: None)
    assert found == [steps_kept] * (6 // steps_kept)


def test_no_step_of_a_long_warm_up_is_lost() -> None:
    agent = PolicyGradient(started_env(), history_bytes=1)
    agent.warm_up(STEPS)
    assert agent.updates == STEPS


def test_several_passes_make_observations_once_in_the_place_of_what_was_kept() -> None:
    agent = PolicyGradient(started_env())
    agent.keep(agent.collect())
    agent.keep(agent.collect())
    expected = [step.observation for step in agent.history]
    drained = agent.history.drained()
    assert len(agent.history) == 0
    for found, other in zip(drained, expected, strict=True):
        assert found.observation.equal(other)


# Little memory.


def table_1(*, short: bool) -> Transition:
    """A batch of the paper's largest pool: 64 observations of 1,704 numbers, four teachers."""
    count, width, known = 64, 1704, 4
    whole = torch.zeros(count, width)
    keys = ShortObservation(torch.zeros(count, dtype=torch.long), torch.zeros(count, known, 3))
    return Transition(keys if short else whole, torch.zeros(count, known), {})


@pytest.mark.parametrize(("short", "size"), [(False, 341_927_936), (True, 3_603_456)])
def test_an_epoch_of_table_1_takes_4_megabytes_instead_of_342(short: bool, size: int) -> None:
    history: History[Transition] = History(Transition, started_env(), 2**30)
    history.add(table_1(short=short))
    assert 782 * history.nbytes == size


KINDS: dict[str, tuple[str, ViewSet, dict[str, Any], dict[str, Any]]] = {
    "host": ("host", TWO, {}, {"passes": 2}),
    "disk": ("disk", TWO, {}, {}),
    "all views": ("host", FRESH, {}, {}),
    "several updates an epoch": ("disk", TWO, {}, {"agent_every": 2}),
    "raw": ("host", TWO, {"normalize_observation": False}, {}),
    "half precision": ("host", TWO, {"observation_dtype": "float16"}, {}),
    "performance": ("host", TWO, {"observation": "performance"}, {}),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "disk") for name in LEARNING), *(("pg", kind) for kind in KINDS if kind != "disk")],
)
def test_student_and_policy_are_those_of_whole_observations_bit_for_bit(
    name: str, kind: str, tmp_path: Path
) -> None:
    place, view_set, choices, arguments = KINDS[kind]
    found = []
    for short in (True, False):
        env = stored_env(tmp_path / str(short), place, view_set, short=short, **choices)
        assert isinstance(env.keepable_observation, ShortObservation) == short
        found.append(trained(made(name, env, **arguments)))
    assert found[0].equal(found[1])


@pytest.mark.parametrize("place", ["host", "disk"])
def test_no_teacher_is_asked_again(place: str, tmp_path: Path) -> None:
    env = stored_env(tmp_path, place)
    trained(made("pg", env))
    stored = env.stream.teaching
    assert isinstance(stored, StoredTeachers)
    assert stored.computed == 2 * STEPS * NUM_ENVS


def test_without_outputs_in_it_or_without_a_store_an_observation_is_kept_whole(
    tmp_path: Path,
) -> None:
    for env in (stored_env(tmp_path, observation="gaps"), started_env()):
        assert isinstance(kept := env.keepable_observation, Tensor)
        assert env.recall(kept).equal(env.observation)


# Checkpoints.


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("pg", 2),
        ("pg", STEPS),
        ("pg", STEPS + 2),
        ("reinforce", STEPS + 1),
        ("dpg", 2 * STEPS + 1),
    ],
)
def test_an_interrupted_training_goes_on_bit_for_bit(
    name: str, at: int, stored: bool, tmp_path: Path
) -> None:
    def train(state: Any = None) -> tuple[LearningAgent[Any], Any]:
        # The store of the second is empty at first.
        env = stored_env(tmp_path) if stored else started_env()
        agent = made(name, env)
        if state is not None:
            env.load_state_dict(state["env"])
            agent.load_state_dict(state["agent"])
        taken: list[Any] = []

        def at_rest() -> None:
            if env.steps == at and not taken:
                parts = {"env": env, "agent": agent}
                taken.append(deepcopy({key: part.state_dict() for key, part in parts.items()}))

        if env.steps < STEPS:
            agent.warm_up(STEPS - env.steps, at_rest=at_rest)
        agent.learn(3 - env.steps // STEPS, lambda: None, at_rest)
        return agent, taken[0]

    whole, state = train()
    kept = state["agent"]["history"]["steps"]
    assert len(kept) == (at % STEPS if name == "pg" or at > STEPS else 0)
    assert all(
        (step["observation"].keys() == {"keys", "made"}) == stored for step in kept if stored
    )
    assert bits(train(state)[0]).equal(bits(whole))


# Several processes.


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with two_processes(tmp_path_factory.mktemp("group")) as processes:
        yield processes


def train_part(name: str, short: bool, folder: str) -> dict[str, Any]:
    """Trains in one of several processes; the training's state amid the last epoch goes along."""
    env = stored_env(Path(folder), "disk", short=short)
    agent = made(name, env)
    agent.warm_up(STEPS)
    states: list[Any] = []
    agent.learn(2, lambda: None, lambda: states.append(agent.state_dict()["history"]))
    again: History[Any] = History(agent.step_type, env, 2**30)
    again.load_state_dict(states[-1])
    return {
        "bits": bits(agent),
        "gathered": states[-1]["steps"],
        "own": {len(step.observation) for step in again},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pg", "dpg"])
def test_several_processes_learn_the_same_as_with_whole_observations(
    pair: Pair, name: str, tmp_path: Path
) -> None:
    short, whole = (
        pair(train_part, name, choice, str(tmp_path / str(choice))) for choice in (True, False)
    )
    for one, other in zip(short, whole, strict=True):
        assert one["bits"].equal(other["bits"])
        assert one["own"] == {NUM_ENVS // 2}
        for step in one["gathered"]:
            assert len(step["observation"]["keys"].unique()) == NUM_ENVS
            assert {len(tensor) for tensor in tensors(step)} == {NUM_ENVS}
