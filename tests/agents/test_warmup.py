from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import Agent, PolicyGradient, Transition, Uniform
from agents.warmup import WARMUP_WEIGHTS, warm_up
from known_optimum import STEPS, started_env
from mtkd_env.env import MTKDVectorEnv, StepRecord
from mtkd_env.errors import ConfigError
from tiny import TEACHERS

M = len(TEACHERS)


def refuse(*_: Any) -> Any:
    raise AssertionError("asked for more than to learn from the warm-up")


class Pupil(Agent):
    """Keeps what it is given to learn from; must not be asked to act."""

    learns_from_warmup = True

    def __init__(self, env: MTKDVectorEnv) -> None:
        super().__init__(env)
        self.histories: list[Sequence[Transition]] = []

    act = learn = save = refuse

    def pretrain(self, history: Sequence[Transition]) -> None:
        self.histories.append(history)


class Unaware(Pupil):
    """The same, but it has no use for what others did."""

    learns_from_warmup = False


def records_of(env: MTKDVectorEnv) -> list[StepRecord]:
    found: list[StepRecord] = []
    env.subscribe(found.append)
    return found


def student(env: MTKDVectorEnv) -> dict[str, Tensor]:
    return env.distiller.module.state_dict()


def test_agent_learns_once_from_all_steps() -> None:
    env = started_env()
    pupil = Pupil(env)
    warm_up(pupil, STEPS)
    (history,) = pupil.histories
    assert len(history) == env.steps == STEPS


def test_agent_without_use_for_it_gets_nothing() -> None:
    pupil = Unaware(started_env())
    warm_up(pupil, STEPS)
    assert [len(history) for history in pupil.histories] == [0]


def test_no_action_of_the_agents_is_asked_for() -> None:
    env, other = started_env(), started_env()
    warm_up(Pupil(env), STEPS)
    warm_up(PolicyGradient(other, seed=5), STEPS)
    # The same student, whoever comes to learn from it.
    assert all(tensor.equal(student(other)[name]) for name, tensor in student(env).items())


def test_observations_are_normalised_by_the_statistics_of_the_end() -> None:
    env = started_env()
    seen: list[Tensor] = []
    raw: list[Tensor] = []
    observe = env._observe

    def spy() -> tuple[Tensor, Tensor]:
        found = observe()
        if not raw or found[0] is not raw[-1]:
            raw.append(found[0])
            seen.append(found[1])
        return found

    env._observe = spy
    pupil = Pupil(env)
    warm_up(pupil, STEPS)
    (history,) = pupil.histories
    rows = torch.cat(raw[:STEPS]).double()
    mean, deviation = rows.mean(0), rows.std(0, correction=0)
    for transition, observation in zip(history, raw, strict=False):
        expected = ((observation.double() - mean) / deviation.clamp(min=1e-6)).clamp(-10, 10)
        torch.testing.assert_close(transition.observation, expected.float(), atol=1e-4, rtol=1e-4)
    assert not history[0].observation.allclose(seen[0])


def test_raw_observations_stay_raw() -> None:
    env = started_env(normalize_observation=False)
    first = env.observation
    pupil = Pupil(env)
    warm_up(pupil, 1)
    assert pupil.histories[0][0].observation.equal(first)


@pytest.mark.parametrize("fusion", ["paper", "learnable"])
def test_transitions_say_what_happened(fusion: str) -> None:
    env = started_env(fusion=fusion)
    records = records_of(env)
    pupil = Pupil(env)
    evidence = env.fusion.evidence(env.state)
    warm_up(pupil, STEPS)
    (history,) = pupil.histories
    for record, transition in zip(records, history, strict=True):
        assert transition.advantages.equal(record.rewards.advantages)
    assert history[0].evidence.keys() == evidence.keys() == {"confidence", "divergence"}
    for part, weights in evidence.items():
        assert history[0].evidence[part].logit.equal(weights.logit)
        assert history[0].evidence[part].feature.equal(weights.feature)
    tensors = [
        tensor
        for transition in history
        for tensor in (
            transition.observation,
            transition.advantages,
            *(weights.logit for weights in transition.evidence.values()),
            *(weights.feature for weights in transition.evidence.values()),
        )
    ]
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize(("weights", "expected"), [("uniform", 1 / M), ("ones", 1.0)])
def test_all_teachers_count_the_same(weights: str, expected: float) -> None:
    env = started_env()
    records = records_of(env)
    warm_up(Uniform(env), STEPS, weights)
    for record in records:
        for found in (record.weights.logit, record.weights.feature):
            assert found.unique().tolist() == pytest.approx([expected])
    first = records[0].losses
    scale = env.distiller
    terms = scale.alpha * first.kd.sum(1) + scale.beta * first.feature.sum(1)
    torch.testing.assert_close(first.total, first.cross_entropy + expected * terms)


def test_uniform_weights_are_the_default() -> None:
    envs = started_env(), started_env()
    warm_up(Uniform(envs[0]), STEPS)
    warm_up(Uniform(envs[1]), STEPS, "uniform")
    assert all(tensor.equal(student(envs[1])[name]) for name, tensor in student(envs[0]).items())


def test_unknown_weights_are_named_before_the_student_is_touched() -> None:
    env = started_env()
    message = r"unknown warm-up weights 'one'; did you mean 'ones'\? \(known: ones, uniform\)"
    with pytest.raises(ConfigError, match=message):
        warm_up(Uniform(env), STEPS, "one")
    assert env.steps == 0
    assert set(WARMUP_WEIGHTS) == {"ones", "uniform"}
