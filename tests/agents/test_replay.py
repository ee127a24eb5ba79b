"""What an agent remembers of the tasks before: an even sample, of any number of teachers."""

from typing import Any

import pytest
import torch

from agents import PolicyGradient, build_agent
from agents.history import Replay
from agents.policy_gradient import Labelled, Transition
from known_optimum import started_env
from mtkd_env.action import generated_weights
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.observation import RelativeObserver
from mtkd_env.types import TeacherWeights
from tiny import generator, make_tiny_distiller

WIDTH = RelativeObserver.features_per_teacher
CPU = torch.device("cpu")
ARGUMENTS: dict[str, Any] = {
    "policy": "shared",
    "hidden": 8,
    "agent_every": 1,
    "entropy_coef": 0.5,
    "replay": 2,
}


def lesson(teachers: int, mark: float = 0.0) -> dict[str, Any]:
    rows = torch.randn(4, teachers, WIDTH, generator=generator(teachers))
    rows[..., -1] = 1
    seen, values = rows.flatten(1), torch.full((4, teachers), mark)
    evidence = {"prior": TeacherWeights(values, values)}
    return {
        "known": Transition(seen, values, evidence),
        "labelled": Labelled(seen[:2], {}, values[:2]),
    }


def memory(size: int, seed: int) -> Replay:
    return Replay(size, CPU, seed, (Transition, Labelled))


def env(teachers: int, prior: str | None = None) -> MTKDVectorEnv:
    distiller = make_tiny_distiller(count=teachers)
    fusion = "generator" if prior is None else "prior"
    return started_env(distiller=distiller, observation="relative", fusion=fusion, prior=prior)


def learner(where: MTKDVectorEnv, **arguments: Any) -> PolicyGradient:
    made = build_agent("pg", where, seed=0, arguments={**ARGUMENTS, **arguments})
    assert isinstance(made, PolicyGradient)
    return made


def test_every_lesson_so_far_is_as_likely_to_be_remembered() -> None:
    counts = torch.zeros(30)
    for seed in range(200):
        replay = memory(10, seed)
        for number in range(30):
            replay.add(lesson(1, float(number)))
        kept = [int(entry["known"]["advantages"][0, 0]) for entry in replay.state_dict()["kept"]]
        assert len(set(kept)) == 10
        counts[kept] += 1
    shares = counts.view(3, 10).sum(1) / counts.sum()
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.04, rtol=0)


def test_nothing_is_drawn_before_there_is_a_lesson() -> None:
    assert memory(3, 0).draw(2) is None


def test_lessons_of_fewer_teachers_are_widened_by_ones_that_are_not_there() -> None:
    replay = memory(10, 0)
    replay.add(lesson(2, 1.0))
    replay.add(lesson(3, 2.0))
    drawn = replay.draw(8)
    assert drawn is not None
    known = drawn["known"]
    assert known.observation.shape == (32, 3 * WIDTH)
    assert drawn["labelled"].observation.shape == (16, 3 * WIDTH)
    of_two = known.advantages[:, 0] == 1
    assert 0 < of_two.sum() < 32
    weights = generated_weights(learner(env(2)).policy(known.observation)).logit
    assert weights[of_two, 2].eq(0).all()
    assert weights[~of_two, 2].gt(0).all()
    assert known.advantages[of_two, 2].eq(0).all()
    assert known.evidence["prior"].feature.equal(known.advantages)


def test_memory_goes_on_from_what_was_saved() -> None:
    one, other = memory(3, 0), memory(3, 1)
    for number in range(9):
        one.add(lesson(2, float(number)))
    other.load_state_dict(one.state_dict())
    for replay in (one, other):
        replay.add(lesson(2, 9.0))
    drawn = [replay.draw(5)["known"] for replay in (one, other)]
    assert drawn[0].advantages.equal(drawn[1].advantages)


@pytest.mark.parametrize("prior", [None, "entropy"])
@pytest.mark.parametrize("likelihood", [0.0, 1.0])
def test_what_was_learned_in_one_environment_is_learned_again_in_the_next(
    likelihood: float, prior: str | None
) -> None:
    weight = 0.5 if prior else 0.0
    agent = learner(env(3, prior), likelihood=likelihood, prior_weight=weight)
    agent.learn(1, lambda: None)
    before = agent.parts["replay"].state_dict()["seen"]
    agent.enter(env(2, prior))
    agent.learn(1, lambda: None)
    state = agent.parts["replay"].state_dict()
    assert state["seen"] > before > 0
    assert {entry["known"]["advantages"].shape[1] for entry in state["kept"]} == {2, 3}
    assert {"labelled" in entry for entry in state["kept"]} == {likelihood > 0}
    fresh = learner(env(2), replay=0, likelihood=likelihood)
    assert "replay" not in fresh.parts


@pytest.mark.parametrize(
    ("fusion", "arguments", "message"),
    [
        ("generator", {"policy": "teacher"}, "replay: needs policy 'shared' and loss"),
        ("generator", {"loss": "clipped"}, "replay: needs policy 'shared' and loss"),
        ("generator", {"replay": -1}, "replay: expected"),
        ("generator", {"replay_size": 0}, "replay_size: expected"),
        ("paper", {}, "replay: knows generated weights and a prior"),
    ],
)
def test_replay_that_cannot_be_is_refused(
    fusion: str, arguments: dict[str, Any], message: str
) -> None:
    where = started_env(
        distiller=make_tiny_distiller(count=2), observation="relative", fusion=fusion
    )
    with pytest.raises(ConfigError, match=message):
        learner(where, **arguments)
