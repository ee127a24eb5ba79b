"""What agents keep of the batches of an update, and how much of it."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import AGENTS, Agent, PolicyGradient, Transition, build_agent
from agents.dpg import Tried
from agents.history import HISTORY_BYTES, Derived, History, Plan, named_tensors, with_tensors
from agents.learning import LearningAgent
from agents.reinforce import Drawn
from agents.warmup import warm_up
from known_optimum import STEPS, started_env
from mtkd_env.types import TeacherWeights
from tiny import generator

B, F, M = 4, 50, 3
DEVICE = torch.device("cpu")

LEARNING = ["pg", "reinforce", "dpg"]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed))


def weights(seed: int) -> TeacherWeights:
    return TeacherWeights(rand(B, M, seed=seed), rand(B, M, seed=seed + 100))


def transition(seed: int) -> Transition:
    return Transition(
        observation=100 * rand(B, F, seed=seed) - 50,
        advantages=rand(B, M, seed=seed),
        evidence={"confidence": weights(seed + 1), "divergence": weights(seed + 2)},
    )


def tried(seed: int) -> Tried:
    return Tried(rand(B, F, seed=seed), weights(seed), rand(B, seed=seed))


def drawn(seed: int) -> Drawn:
    return Drawn(rand(B, F, seed=seed), torch.arange(2 * B).view(B, 2), rand(B, 2, seed=seed))


KINDS = {"pg": transition, "dpg": tried, "reinforce": drawn}
every_kind = pytest.mark.parametrize("name", KINDS)


def bytes_of(batch: Any) -> int:
    return sum(tensor.nbytes for _, tensor in named_tensors(batch))


def halved(batch: Any) -> int:
    return bytes_of(batch) - batch.observation.nbytes // 2


def filled(batches: list[Any], **arguments: Any) -> History[Any]:
    history = History(type(batches[0]), **{"steps": len(batches), **arguments})
    for batch in batches:
        history.append(batch)
    return history


def same(first: Any, second: Any) -> bool:
    pairs = zip(named_tensors(first), named_tensors(second), strict=True)
    return type(first) is type(second) and all(
        name == other and one.equal(two) and one.dtype == two.dtype
        for (name, one), (other, two) in pairs
    )


# Everything fits.


@every_kind
def test_batches_come_back_as_they_were(name: str) -> None:
    batches = [KINDS[name](seed) for seed in range(5)]
    history = filled(batches, steps=7)
    assert history.plan == Plan(every=1, rows=7, half=False)
    assert len(history) == len(history.batches) == history.seen == 5
    assert all(same(found, batch) for found, batch in zip(history.batches, batches, strict=True))
    assert same(history.batches[-1], batches[-1])
    assert [same(found, batches[3]) for found in history.batches[2:4]] == [False, True]
    with pytest.raises(IndexError):
        history.batches[5]


@every_kind
def test_batches_are_copies_and_are_read_without_another(name: str) -> None:
    batch = KINDS[name](0)
    history = filled([batch])
    expected = deepcopy(batch)
    batch.observation.zero_()
    assert same(history.batches[0], expected)
    places = {history.batches[0].observation.data_ptr() for _ in range(2)}
    places.add(history.joined().observation.data_ptr())
    assert len(places) == 1


@every_kind
def test_joined_batches_are_all_rows_in_their_order(name: str) -> None:
    batches = [KINDS[name](seed) for seed in range(3)]
    found = filled(batches, steps=5).joined()
    together = [
        torch.cat(parts)
        for parts in zip(*([t for _, t in named_tensors(one)] for one in batches), strict=True)
    ]
    assert [tensor.shape for _, tensor in named_tensors(found)] == [t.shape for t in together]
    assert all(one.equal(two) for (_, one), two in zip(named_tensors(found), together, strict=True))


def test_the_tensors_are_made_once_and_hold_no_more_than_all_steps() -> None:
    history = History(Transition, steps=3)
    assert history.nbytes == 0
    places = set()
    for seed in range(7):
        history.append(transition(seed))
        places.add(history.batches[0].observation.data_ptr())
        assert history.nbytes == 3 * bytes_of(transition(0))
        if history.seen == 3:
            history.clear()
            assert len(history) == len(history.batches) == 0
    assert len(places) == 1


def test_what_is_released_takes_nothing_and_may_be_of_another_kind_after() -> None:
    history = filled([transition(0)])
    history.release()
    assert history.nbytes == len(history) == history.seen == 0
    generated = weights(5)
    more = Transition(rand(B, F), rand(B, M), {"generator": generated})
    history.append(more)
    assert same(history.batches[0], more)


def test_a_graph_is_not_kept() -> None:
    batch = transition(0)
    batch.observation.requires_grad_()
    history = filled([batch])
    assert not any(tensor.requires_grad for _, tensor in named_tensors(history.batches[0]))


# Not everything fits.


def test_observations_are_halved_before_batches_are_left_out() -> None:
    batches = [transition(seed) for seed in range(8)]
    whole, half = bytes_of(batches[0]), halved(batches[0])
    plans = {
        8 * whole: Plan(every=1, rows=8, half=False),
        8 * whole - 1: Plan(every=1, rows=8, half=True),
        8 * half: Plan(every=1, rows=8, half=True),
        8 * half - 1: Plan(every=2, rows=4, half=True),
        4 * half: Plan(every=2, rows=4, half=True),
        4 * half - 1: Plan(every=3, rows=3, half=True),
        2 * half: Plan(every=4, rows=2, half=True),
        half: Plan(every=8, rows=1, half=True),
        1: Plan(every=8, rows=1, half=True),
    }
    for cap, plan in plans.items():
        history = filled(batches, max_bytes=cap)
        assert history.plan == plan
        assert history.nbytes <= cap or len(history) == 1
        assert len(history) == plan.rows


@pytest.mark.parametrize("steps", [1, 7, 10, 782])
@pytest.mark.parametrize("most", [1, 2, 3, 9, 500])
def test_the_smallest_interval_that_fits_is_taken(steps: int, most: int) -> None:
    plan = Plan.within(10 * most + 9, steps, batch_bytes=11, half_bytes=10)
    if steps * 11 <= 10 * most + 9:
        assert plan == Plan(every=1, rows=steps, half=False)
        return
    fitting = [every for every in range(1, steps + 1) if ceil(steps / every) <= most]
    assert plan == Plan(every=fitting[0], rows=ceil(steps / fitting[0]), half=True)


@pytest.mark.parametrize("seen", [1, 2, 3, 4, 5, 8])
def test_every_kth_batch_is_kept_from_the_first(seen: int) -> None:
    batches = [transition(seed) for seed in range(seen)]
    history = History(Transition, steps=8, max_bytes=3 * halved(batches[0]))
    for _ in range(2):
        for batch in batches:
            history.append(batch)
        assert history.plan is not None
        assert history.plan.every == 3
        assert history.seen == seen
        expected = batches[::3]
        for found, batch in zip(history.batches, expected, strict=True):
            assert found.advantages.equal(batch.advantages)
        history.clear()


def test_halved_observations_are_read_in_the_precision_that_was_given() -> None:
    batch = transition(0)
    history = filled([batch], max_bytes=1)
    for found in (history.batches[0], history.joined()):
        assert found.observation.dtype == torch.float32
        assert found.observation.equal(batch.observation.half().float())
        error = (found.observation - batch.observation).abs() / batch.observation.abs()
        assert 0 < error.max() <= 2**-11
        rest = [(n, t) for n, t in named_tensors(batch) if n != "observation"]
        kept = dict(named_tensors(found))
        assert all(kept[name].equal(tensor) for name, tensor in rest)


def test_observations_beyond_half_precision_become_its_largest_number() -> None:
    batch = transition(0)
    batch.observation[0, :3] = torch.tensor([1e6, -1e6, float("inf")])
    batch.observation[1, 0] = float("nan")
    found = filled([batch], max_bytes=1).batches[0].observation
    assert found[0, :3].tolist() == [65504, -65504, 65504]
    assert found[1, 0].isnan()


def test_half_precision_observations_are_not_rounded_again() -> None:
    batch = transition(0)
    batch = Transition(batch.observation.half(), batch.advantages, batch.evidence)
    history = filled([batch, batch], max_bytes=bytes_of(batch))
    assert history.plan == Plan(every=2, rows=1, half=True)
    assert same(history.batches[0], batch)


# Checkpoints.


@pytest.mark.parametrize("cap", [HISTORY_BYTES, 6 * 600, 1])
@pytest.mark.parametrize("seen", [0, 1, 4, 5])
def test_a_loaded_history_goes_on_as_the_saved_one_would(seen: int, cap: int) -> None:
    batches = [transition(seed) for seed in range(8)]
    first, second = (History(Transition, steps=8, max_bytes=cap) for _ in range(2))
    second.append(batches[7])
    for batch in batches[:seen]:
        first.append(batch)
    state = first.state_dict()
    second.load_state_dict(deepcopy(state), DEVICE)
    for history in (first, second):
        for batch in batches[seen:]:
            history.append(batch)
        assert history.seen == 8
    assert first.plan == second.plan
    assert all(same(*pair) for pair in zip(first.batches, second.batches, strict=True))


def test_a_state_is_not_written_into_and_holds_nothing_else() -> None:
    history = filled([transition(0)], steps=100)
    state = history.state_dict()
    kept = deepcopy(state)
    history.clear()
    history.append(transition(1))
    tensors = [t for _, t in named_tensors({str(i): b for i, b in enumerate(state["batches"])})]
    before = [t for _, t in named_tensors({str(i): b for i, b in enumerate(kept["batches"])})]
    assert all(one.equal(two) for one, two in zip(tensors, before, strict=True))
    assert sum(t.untyped_storage().nbytes() for t in tensors) == bytes_of(transition(0))


# Agents.


def learned(name: str, **arguments: Any) -> LearningAgent[Any]:
    agent = build_agent(name, started_env(), seed=0, arguments=arguments)
    warm_up(agent, STEPS)
    agent.learn(2, lambda: None)
    assert isinstance(agent, LearningAgent)
    return agent


def policy(agent: LearningAgent[Any]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


@pytest.mark.parametrize("name", LEARNING)
def test_what_fits_is_learned_from_exactly(name: str) -> None:
    roomy = learned(name, history_bytes=2**30, agent_every=None)
    assert roomy.history.plan == Plan(every=1, rows=STEPS, half=False)
    exact = learned(name, history_bytes=roomy.history.nbytes, agent_every=None)
    assert policy(exact).equal(policy(roomy))


@pytest.mark.parametrize("name", LEARNING)
def test_agents_learn_from_what_may_be_kept(name: str) -> None:
    roomy = learned(name, agent_every=None)
    halved = learned(name, history_bytes=roomy.history.nbytes - 1, agent_every=None)
    assert halved.history.plan == Plan(every=1, rows=STEPS, half=True)
    torch.testing.assert_close(policy(halved), policy(roomy), rtol=0.05, atol=0.02)
    assert not policy(halved).equal(policy(roomy))
    few = learned(name, history_bytes=1, agent_every=None)
    assert few.history.plan == Plan(every=STEPS, rows=1, half=True)
    assert policy(few).isfinite().all()
    assert few.updates < roomy.updates or name == "reinforce"


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize(("agent_every", "rows"), [(1, 1), (2, 2), (None, STEPS), (9, STEPS)])
def test_no_more_is_made_room_for_than_an_update_takes(
    name: str, agent_every: int | None, rows: int
) -> None:
    found = learned(name, agent_every=agent_every)
    assert found.history.plan == Plan(every=1, rows=rows, half=False)


def test_updates_between_epochs_count_batches_that_are_not_kept() -> None:
    agent = build_agent(
        "pg", started_env(steps=6), seed=0, arguments={"agent_every": 4, "history_bytes": 1}
    )
    found: list[tuple[int, int]] = []
    agent._learn_from = lambda history: found.append((history.seen, len(history)))
    agent.learn(2, lambda: None)
    assert found == 2 * [(4, 1), (2, 1)]


class Pupil(PolicyGradient):
    """Looks at what it is given of the warm-up."""

    def pretrain(self, history: Any) -> None:
        self.given = list(history)
        super().pretrain(history)


def test_the_warm_up_is_kept_within_the_same_bytes() -> None:
    roomy, tight = Pupil(started_env()), Pupil(started_env(), history_bytes=1)
    for agent in (roomy, tight):
        warm_up(agent, STEPS)
    assert len(roomy.given) == roomy.updates == STEPS
    assert len(tight.given) == tight.updates == 1
    assert tight.given[0].advantages.equal(roomy.given[0].advantages)
    close = tight.given[0].observation, roomy.given[0].observation
    torch.testing.assert_close(*close, rtol=0.02, atol=0.02)


def test_the_warm_up_goes_on_with_what_is_there() -> None:
    env = started_env()
    agent = Pupil(env)
    history = History(Transition, steps=2 * STEPS)
    warm_up(agent, STEPS, history=history)
    warm_up(agent, 1, history=history)
    assert history.seen == len(agent.given) == STEPS + 1
    assert agent.updates == 2 * STEPS + 1


def test_every_learning_agent_says_what_it_may_keep() -> None:
    assert Agent.history_bytes == HISTORY_BYTES
    for name in LEARNING:
        assert issubclass(AGENTS[name], LearningAgent)
        made = build_agent(name, started_env(), seed=0, arguments={"history_bytes": 7})
        assert made.history_bytes == 7


# Parts.


@dataclass(frozen=True)
class Nested:
    first: Tensor
    rest: Mapping[str, Any]


def test_tensors_are_named_by_their_way_and_put_back_in_order() -> None:
    value = Nested(torch.zeros(1), {"a": weights(0), "b": {"c": torch.ones(2)}})
    names = [name for name, _ in named_tensors(value)]
    assert names == ["first", "rest.a.logit", "rest.a.feature", "rest.b.c"]
    doubled = with_tensors(value, (2 * tensor for _, tensor in named_tensors(value)))
    assert isinstance(doubled, Nested)
    assert isinstance(doubled.rest["a"], TeacherWeights)
    assert doubled.rest["a"].logit.equal(2 * value.rest["a"].logit)
    assert doubled.rest["b"]["c"].tolist() == [2, 2]


def test_derived_items_are_made_when_they_are_asked_for() -> None:
    made: list[int] = []

    def make(position: int) -> int:
        made.append(position)
        return position**2

    items = Derived(5, make)
    assert len(items) == 5
    assert made == []
    assert items[2] == 4
    assert items[-1] == 16
    assert list(items[1:4]) == [1, 4, 9]
    assert list(items[::-2]) == [16, 4, 0]
    assert made == [2, 4, 1, 2, 3, 4, 2, 0]
