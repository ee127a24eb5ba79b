"""Agents that keep where a store has what they saw, instead of a copy, learn the same."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import PolicyGradient, Transition, build_agent
from agents.history import HISTORY_BYTES, History, Plan, named_tensors
from agents.learning import LearningAgent
from agents.warmup import warm_up
from mtkd_env.data.views import FRESH, MemoryViews, ViewSet
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.observation import ShortObservation
from mtkd_env.teachers import StoreSpec
from mtkd_env.teachers.store import StoredTeachers, TeacherStore
from mtkd_env.types import TeacherWeights
from processes import Pair, two_processes
from tiny import NUM_ENVS, make_tiny_env, teachers, training_set

STEPS, M = 5, 3
LEARNING = ["pg", "reinforce", "dpg"]
LITTLE = "agents.history.LITTLE_BYTES"
TWO = ViewSet(2)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets nothing be so little that it is kept whole."""
    monkeypatch.setattr(LITTLE, 0)


def stored_env(
    folder: Path, place: str = "host", view_set: ViewSet = TWO, **kwargs: Any
) -> MTKDVectorEnv:
    """A tiny environment with a store, reset."""
    images = training_set(STEPS * NUM_ENVS)
    stream = images.stream(NUM_ENVS, torch.device("cpu"), 0, view_set=view_set)
    assert isinstance(stream.views, MemoryViews)
    on_disk = folder if place == "disk" else None
    spec = StoreSpec(place=place)
    store = TeacherStore(teachers(), stream.views, spec, batch_size=NUM_ENVS, folder=on_disk)
    stream.teaching = StoredTeachers(store)
    env = make_tiny_env(batches=stream, **kwargs)
    env.reset(seed=0)
    return env


def bits(agent: LearningAgent[Any]) -> Tensor:
    """All numbers of the policy and of the student."""
    modules = agent.policy, agent.env.distiller.module
    return torch.cat([tensor.flatten() for one in modules for tensor in one.state_dict().values()])


def trained(env: MTKDVectorEnv, name: str, *, warm: bool = True, **arguments: Any) -> Tensor:
    """What comes of three epochs."""
    agent = build_agent(name, env, seed=0, arguments={"agent_every": None, **arguments})
    assert isinstance(agent, LearningAgent)
    if warm:
        warm_up(agent, STEPS)
    agent.learn(2 if warm else 3, lambda: None)
    return bits(agent)


def short_of(history: History[Any]) -> bool:
    return isinstance(history._first.observation, ShortObservation)


# The same as with whole observations.

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
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, view_set, choices, arguments = KINDS[kind]
    found = []
    for number, little in enumerate((0, HISTORY_BYTES)):
        monkeypatch.setattr(LITTLE, little)
        env = stored_env(tmp_path / str(number), place, view_set, **choices)
        found.append(trained(env, name, **arguments))
    assert found[0].equal(found[1])


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("normalize", [True, False])
def test_what_is_read_is_what_was_seen(normalize: bool, tmp_path: Path) -> None:
    env = stored_env(tmp_path, normalize_observation=normalize)
    agent = PolicyGradient(env)
    seen: list[Tensor] = []
    act = agent.act
    agent.act = lambda observation: (seen.append(observation.clone()), act(observation))[1]
    lengths = []

    def compare(history: History[Transition]) -> None:
        assert short_of(history) == (env.steps > STEPS or not normalize)
        expected = torch.cat(seen)
        assert history.joined().observation.equal(expected)
        assert torch.cat([known.observation for known in history.batches]).equal(expected)
        lengths.append(len(history))
        seen.clear()

    agent._learn_from = compare
    agent.learn(3, lambda: None)
    assert lengths == [STEPS] * 3


@pytest.mark.usefixtures("little")
def test_the_warm_up_is_read_as_the_end_of_its_epoch_normalises_it(tmp_path: Path) -> None:
    env = stored_env(tmp_path)
    agent = PolicyGradient(env)
    given: list[Tensor] = []
    raw: list[Tensor] = []
    agent.pretrain = lambda history: given.extend(known.observation for known in history)
    history = History(Transition, steps=STEPS)
    warm_up(agent, STEPS, history=history, at_rest=lambda: raw.append(env.raw_observation.clone()))
    assert short_of(history)
    assert len(given) == STEPS
    assert all(one.equal(env.normalize(other)) for one, other in zip(given, raw, strict=True))


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("place", ["host", "disk"])
def test_no_teacher_is_asked_again(place: str, tmp_path: Path) -> None:
    env = stored_env(tmp_path, place)
    trained(env, "pg")
    stored = env.stream.teaching
    assert isinstance(stored, StoredTeachers)
    assert stored._store.computed == 2 * STEPS * NUM_ENVS


# What is kept.


@pytest.mark.usefixtures("little")
def test_observations_are_kept_whole_until_the_statistics_settle(tmp_path: Path) -> None:
    env = stored_env(tmp_path)
    agent = PolicyGradient(env)
    found = []
    agent._learn_from = lambda history: found.append((env.steps, short_of(history)))
    agent.learn(2, lambda: None)
    assert found == [(STEPS, False), (2 * STEPS, True)]
    env.reset(options={"reinit": True})
    agent.learn(1, lambda: None)
    assert found[2] == (STEPS, False)


@pytest.mark.usefixtures("little")
def test_statistics_settle_with_the_first_epoch(tmp_path: Path) -> None:
    env = stored_env(tmp_path)
    settled = []
    agent = PolicyGradient(env)
    agent.learn(2, lambda: None, at_rest=lambda: settled.append(env.settled))
    assert settled == [False] * STEPS + [True] * STEPS
    assert stored_env(tmp_path, normalize_observation=False).settled


def test_little_is_kept_whole(tmp_path: Path) -> None:
    env = stored_env(tmp_path)
    agent = PolicyGradient(env)
    warm_up(agent, STEPS)
    agent.learn(1, lambda: None)
    assert not short_of(agent.history)
    tight = PolicyGradient(env, history_bytes=agent.history.nbytes - 1)
    tight.learn(1, lambda: None)
    assert short_of(tight.history)
    assert tight.history.plan == Plan(every=1, rows=STEPS, half=False)


@pytest.mark.usefixtures("little")
def test_without_outputs_in_it_or_without_a_store_an_observation_stays(tmp_path: Path) -> None:
    plain = make_tiny_env()
    plain.reset(seed=0)
    for env in (stored_env(tmp_path, observation="gaps"), plain):
        assert env.short_observation is None
        assert env.recall(env.raw_observation).equal(env.raw_observation)


def table_1(number: int) -> tuple[Transition, ShortObservation]:
    """A batch of the paper's largest pool: 64 observations of 1,704 numbers, four teachers."""
    count, width, known = 64, 1704, 4
    each = TeacherWeights(torch.zeros(count, known), torch.zeros(count, known))
    evidence = {"generator": each, "confidence": each, "divergence": each}
    whole = Transition(torch.zeros(count, width), torch.zeros(count, known), evidence)
    return whole, ShortObservation(torch.full((count,), number), torch.zeros(count, 3 * known))


def test_an_epoch_of_table_1_takes_8_megabytes_instead_of_347() -> None:
    whole = History(Transition, steps=782, max_bytes=2**30)
    short = History(Transition, steps=782)
    whole.append(table_1(0)[0])
    for number in range(2):
        short.append(*table_1(number))
    assert whole.nbytes == 346_732_544
    assert short.nbytes == 8_408_064
    assert short.plan == Plan(every=1, rows=782, half=False)


def test_short_observations_are_never_rounded_but_may_be_left_out() -> None:
    size = sum(tensor.nbytes for _, tensor in named_tensors(table_1(0)[0]))
    size += sum(tensor.nbytes for _, tensor in named_tensors(table_1(0)[1])) - 4 * 64 * 1704
    history = History(Transition, steps=7, max_bytes=3 * size)
    for number in range(7):
        history.append(*table_1(number))
    assert history.plan == Plan(every=3, rows=3, half=False)
    assert history.nbytes == 3 * size
    kept = [history._read(row).observation for row in range(3)]
    assert [int(short.keys[0]) for short in kept] == [0, 3, 6]


@pytest.mark.usefixtures("little")
def test_the_tensors_are_made_once_for_all_short_epochs(tmp_path: Path) -> None:
    agent = PolicyGradient(stored_env(tmp_path))
    warm_up(agent, STEPS)
    sizes = set()

    def places() -> list[int]:
        sizes.add(agent.history.nbytes)
        return [tensor.data_ptr() for tensor in agent.history._tensors]

    found = []
    agent.learn(4, lambda: found.append(places()))
    assert found == 4 * [found[0]]
    per_sample = 8 + 4 * (3 * M + M + 3 * 2 * M)
    assert sizes == {STEPS * NUM_ENVS * per_sample}


# Checkpoints.


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("pg", 2),
        ("pg", STEPS),
        ("pg", STEPS + 2),
        ("reinforce", STEPS + 3),
        ("dpg", 2 * STEPS + 3),
    ],
)
def test_an_interrupted_training_goes_on_with_an_empty_store_bit_for_bit(
    name: str, at: int, tmp_path: Path
) -> None:
    def train(env: MTKDVectorEnv, state: Any = None) -> tuple[LearningAgent[Any], Any]:
        agent = build_agent(name, env, seed=0, arguments={"agent_every": 4})
        assert isinstance(agent, LearningAgent)
        history = History(Transition, steps=STEPS)
        if state is not None:
            env.load_state_dict(state["env"])
            agent.load_state_dict(state["agent"])
            history.load_state_dict(state["history"], env.device)
        taken: list[Any] = []

        def at_rest() -> None:
            if env.steps == at and not taken:
                parts = {"env": env, "agent": agent, "history": history}
                taken.append(deepcopy({key: part.state_dict() for key, part in parts.items()}))

        if env.steps < STEPS:
            warm_up(agent, STEPS - env.steps, history=history, at_rest=at_rest)
        agent.learn(3 - env.steps // STEPS, lambda: None, at_rest)
        return agent, taken[0]

    whole, state = train(stored_env(tmp_path))
    again, _ = train(stored_env(tmp_path), state)
    assert bits(again).equal(bits(whole))


@pytest.mark.usefixtures("little")
def test_a_checkpoint_holds_keys_and_no_observation(tmp_path: Path) -> None:
    agent = PolicyGradient(stored_env(tmp_path))
    warm_up(agent, STEPS)
    state: list[Any] = []
    agent.learn(1, lambda: None, at_rest=lambda: state.append(agent.state_dict()["history"]))
    kept = state[-1]["batches"]
    assert len(kept) == STEPS - 1
    for batch in kept:
        assert batch["observation"].keys() == {"keys", "made"}
        assert batch["observation"]["made"].shape == (NUM_ENVS, 3 * M)


def test_a_history_that_was_begun_whole_goes_on_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, going_on = (History(Transition, steps=3) for _ in range(2))
    begun.append(*table_1(0))
    assert not short_of(begun)
    monkeypatch.setattr(LITTLE, 0)
    going_on.load_state_dict(begun.state_dict(), torch.device("cpu"))
    for number in (1, 2):
        going_on.append(*table_1(number))
    assert not short_of(going_on)
    assert len(going_on.batches) == 3


# Several processes.


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with two_processes(tmp_path_factory.mktemp("group")) as processes:
        yield processes


def train_part(name: str, little: int, folder: str) -> dict[str, Any]:
    """Trains in one of several processes; the training's state amid the last epoch goes along."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LITTLE, little)
        env = stored_env(Path(folder), "disk")
        agent = build_agent(name, env, seed=0, arguments={"agent_every": None})
        assert isinstance(agent, LearningAgent)
        warm_up(agent, STEPS)
        states: list[Any] = []
        agent.learn(2, lambda: None, lambda: states.append(agent.state_dict()["history"]))
        again = History(agent.remembers, steps=STEPS)
        again.load_state_dict(states[-1], env.device)
        own = [tensor for batch in again.batches for _, tensor in named_tensors(batch)]
    return {
        "bits": bits(agent),
        "short": short_of(agent.history),
        "gathered": [dict(named_tensors(batch)) for batch in states[-1]["batches"]],
        "rows": {len(tensor) for tensor in own},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pg", "dpg"])
def test_several_processes_learn_the_same_as_with_whole_observations(
    pair: Pair, name: str, tmp_path: Path
) -> None:
    short, whole = (
        pair(train_part, name, little, str(tmp_path / str(little))) for little in (0, HISTORY_BYTES)
    )
    for one, other in zip(short, whole, strict=True):
        assert (one["short"], other["short"]) == (True, False)
        assert one["bits"].equal(other["bits"])
        assert one["rows"] == {NUM_ENVS // 2}
        for batch in one["gathered"]:
            assert len(batch["observation.keys"].unique()) == NUM_ENVS
            assert {len(tensor) for tensor in batch.values()} == {NUM_ENVS}
