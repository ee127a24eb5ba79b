"""The warm-up of Algorithm 1."""

import pytest
import torch
from torch import Tensor

from agents import DPG, Agent, PolicyGradient, Reinforce, Uniform
from agents.base import WARMUP_WEIGHTS
from known_optimum import STEPS, started_env
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.vector import StepRecord
from tiny import TEACHERS

M = len(TEACHERS)


class Pupil(PolicyGradient):
    """Keeps what it learns from; must not be asked to act."""

    def learn_from(self, history):
        self.learned = [*history]

    def act(self, observation):
        raise AssertionError(f"asked to act on {observation}")


def records_of(env: MTKDVectorEnv) -> list[StepRecord]:
    found: list[StepRecord] = []
    env.subscribe(found.append)
    return found


def student(env: MTKDVectorEnv) -> dict[str, Tensor]:
    return env.distiller.module.state_dict()


def test_the_policy_gradient_learns_once_from_all_steps() -> None:
    pupil = Pupil(started_env())
    pupil.warm_up(STEPS)
    assert len(pupil.learned) == pupil.env.steps == STEPS
    assert len(pupil.history) == 0


@pytest.mark.parametrize("kind", [Reinforce, DPG, Uniform])
def test_agents_that_learn_from_actions_of_their_own_do_not_learn(kind: type[Agent]) -> None:
    agent = kind(started_env())
    agent.warm_up(STEPS)
    assert agent.env.steps == STEPS
    assert agent.updates == 0


def test_the_student_is_the_same_whoever_comes_to_learn_from_it() -> None:
    env, other = started_env(), started_env()
    Uniform(env).warm_up(STEPS)
    PolicyGradient(other, seed=5).warm_up(STEPS)
    assert all(tensor.equal(student(other)[name]) for name, tensor in student(env).items())


def test_observations_are_normalised_by_the_statistics_of_the_end() -> None:
    env = started_env()
    seen: list[Tensor] = []
    raw: list[Tensor] = []
    observe = env._observe

    def spy() -> tuple[Tensor, Tensor]:
        found = observe()
        if not raw or found[1] is not raw[-1]:
            seen.append(found[0])
            raw.append(found[1])
        return found

    env._observe = spy
    pupil = Pupil(env)
    pupil.warm_up(STEPS)
    history = pupil.learned
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
    pupil.warm_up(1)
    assert pupil.learned[0].observation.equal(first)


@pytest.mark.parametrize("fusion", ["paper", "learnable"])
def test_transitions_say_what_happened(fusion: str) -> None:
    env = started_env(fusion=fusion)
    records = records_of(env)
    pupil = Pupil(env)
    evidence = env.fusion.evidence(env.state)
    pupil.warm_up(STEPS)
    history = pupil.learned
    for record, transition in zip(records, history, strict=True):
        assert transition.advantages.equal(record.rewards.advantages)
    # The gradient knows nothing of what is added to the generated weights, but coefficients do.
    kept = {"confidence", "divergence"} if fusion == "learnable" else set()
    assert history[0].evidence.keys() == kept
    for part, weights in evidence.items() if kept else ():
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
    Uniform(env).warm_up(STEPS, weights)
    for record in records:
        for found in (record.weights.logit, record.weights.feature):
            assert found.unique().tolist() == pytest.approx([expected])
    first = records[0].losses
    scale = env.distiller.distillation
    terms = scale.alpha * first.kd.sum(1) + scale.beta * first.feature.sum(1)
    torch.testing.assert_close(first.total, first.cross_entropy + expected * terms)


def test_uniform_weights_are_the_default() -> None:
    envs = started_env(), started_env()
    Uniform(envs[0]).warm_up(STEPS)
    Uniform(envs[1]).warm_up(STEPS, "uniform")
    assert all(tensor.equal(student(envs[1])[name]) for name, tensor in student(envs[0]).items())


def test_unknown_weights_are_named_before_the_student_is_touched() -> None:
    env = started_env()
    message = (
        r"unknown warm-up weights 'one'; did you mean 'ones'\? \(known: ones, prior, uniform\)"
    )
    with pytest.raises(ConfigError, match=message):
        Uniform(env).warm_up(STEPS, "one")
    assert env.steps == 0
    assert set(WARMUP_WEIGHTS) == {"ones", "uniform", "prior"}


@pytest.mark.parametrize("kind", [Reinforce, PolicyGradient, Uniform])
def test_the_statistics_of_observations_know_every_batch_of_it(kind: type[Agent]) -> None:
    env = started_env()
    kind(env).warm_up(STEPS)
    assert env.normalizer.count == STEPS * env.num_envs
