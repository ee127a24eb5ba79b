from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from agents import (
    AGENTS,
    Agent,
    Oracle,
    PolicyGradient,
    Transition,
    Uniform,
    WeightingAgent,
    build_agent,
    check_agent,
)
from agents.policy_gradient import (
    LOSSES,
    TeacherPolicy,
    bce_ones_loss,
    entropy,
    policy_gradient_loss,
    policy_gradient_slope,
)
from known_optimum import (
    STEPS,
    draw,
    ignore,
    known_env,
    scores,
    started_env,
    teach,
    the_surest,
)
from mtkd_env.action import fuse, generated_weights
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.reward import minmax_center
from mtkd_env.types import TeacherWeights
from mtkd_env.weighting import WEIGHTINGS, Weighting
from tiny import NUM_ENVS, TEACHERS, generator, seldom

M = len(TEACHERS)


def transition(env: MTKDVectorEnv, advantages: Tensor) -> Transition:
    """The batch that waits, with advantages given by hand."""
    return Transition(env.keepable_observation, advantages, env.fusion.evidence(env.state))


def generated(agent: Agent) -> TeacherWeights:
    return generated_weights(agent.act(agent.env.observation))


def parameters(agent: PolicyGradient) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in agent.policy.parameters()])


def events(agent: PolicyGradient) -> list[str]:
    """Collects "s" for every student step and "a" for every agent step from now on."""
    found: list[str] = []
    agent.env.subscribe(lambda _: found.append("s"))
    agent.optimizer.register_step_post_hook(lambda *_: found.append("a"))
    return found


# The loss of Equ. 7.


@pytest.mark.parametrize("share", [1.0, 1 / 3])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_closed_form_leaves_the_gradient_that_back_propagation_would(
    layers: int, share: float
) -> None:
    torch.manual_seed(0)
    policy = TeacherPolicy(7, M, hidden=5, layers=layers)
    observation, advantages = draw(NUM_ENVS, 7), draw(NUM_ENVS, M, seed=1)
    made = generated_weights(policy(observation))
    weights = TeacherWeights(logit=share * made.logit, feature=share * made.feature)
    exact = torch.autograd.grad(policy_gradient_loss(weights, advantages), [*policy.parameters()])
    policy.back_propagate(
        observation, lambda logits: policy_gradient_slope(logits, advantages, share)
    )
    torch.testing.assert_close([p.grad for p in policy.parameters()], [*exact])


def gradient(loss: Callable[..., Tensor], logits: Tensor, advantages: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    loss(generated_weights(logits), advantages).backward()
    return logits.grad


def test_gradient_is_that_of_equation_7() -> None:
    logits, advantages = draw(5, 2 * M), draw(5, M, seed=1)
    ascent = []
    for head in logits.chunk(2, dim=1):
        weights = head.softmax(1)
        # Σ_m A^m ∂w^m/∂z_k, from the derivative of the softmax.
        jacobian = torch.diag_embed(weights) - torch.einsum("bm,bk->bmk", weights, weights)
        ascent.append(torch.einsum("bm,bmk->bk", advantages, jacobian) / len(logits))
    found = gradient(policy_gradient_loss, logits, advantages)
    torch.testing.assert_close(-found, torch.cat(ascent, dim=1))


def test_gradient_is_that_of_the_expectation_over_sampled_teachers() -> None:
    # REINFORCE's, Σ_m w^m A^m ∇log w^m, summed over all actions.
    logits, advantages = draw(5, 2 * M), draw(5, M, seed=1)

    def score_function_loss(weights: TeacherWeights, advantages: Tensor) -> Tensor:
        heads = (weights.logit, weights.feature)
        return -sum((w.detach() * advantages * w.log()).sum(1).mean() for w in heads)

    found = gradient(policy_gradient_loss, logits, advantages)
    torch.testing.assert_close(found, gradient(score_function_loss, logits, advantages))


@pytest.mark.parametrize("fusion", ["generator", "paper", "learnable"])
def test_one_step_raises_the_expected_advantage(fusion: str) -> None:
    env = started_env(fusion=fusion)
    agent = PolicyGradient(env, optimizer="sgd", lr=0.01)
    known = transition(env, minmax_center(draw(NUM_ENVS, M)))

    def objective() -> Tensor:
        return -policy_gradient_loss(env.to_weights(agent.act(env.observation)), known.advantages)

    before = objective()
    teach(agent, [known])
    assert objective() > before


def test_many_steps_find_the_best_teacher_of_every_sample_of_a_batch() -> None:
    env = started_env(fusion="generator")
    agent = PolicyGradient(env, lr=1e-2)
    known = transition(env, minmax_center(draw(NUM_ENVS, M)))
    teach(agent, [known] * 100)
    found = generated(agent)
    best = known.advantages.argmax(1)
    for weights in (found.logit, found.feature):
        assert weights.argmax(1).equal(best)
        assert weights.max(1).values.min() > 0.9


# The loss of the released code.


@pytest.mark.parametrize("seed", range(3))
def test_released_loss_is_stationary_at_uniform_weights_whatever_the_reward(seed: int) -> None:
    rewards = torch.rand(5, 1, generator=generator(seed)).expand(5, M)
    found = gradient(bce_ones_loss, torch.zeros(5, 2 * M), rewards)
    torch.testing.assert_close(found, torch.zeros(5, 2 * M))
    assert gradient(bce_ones_loss, draw(5, 2 * M, seed=seed), rewards).norm() > 0.1 / M


def test_released_loss_is_the_binary_cross_entropy_with_ones() -> None:
    """The mean over samples and teachers, each sample's weighted by its reward; both heads."""
    rewards, weights = torch.rand(5, 1, generator=generator(0)), generated_weights(draw(5, 2 * M))
    expected = sum(
        functional.binary_cross_entropy(head, torch.ones_like(head), weight=rewards)
        for head in (weights.logit, weights.feature)
    )
    torch.testing.assert_close(bce_ones_loss(weights, rewards.expand(5, M)), expected)


@pytest.mark.parametrize("reward", [0.1, 1.0, None], ids=["low", "high", "mixed"])
def test_released_loss_makes_the_totals_uniform_whatever_the_reward(reward: float | None) -> None:
    env = started_env(fusion="paper")
    agent = PolicyGradient(env, loss="bce_ones", lr=1e-2)
    # Evidence near enough to uniform for a third of the mass to make up for it.
    tilted = generated_weights(0.3 * draw(NUM_ENVS, 2 * M))
    evidence = {"confidence": tilted, "divergence": tilted}
    drawn = 0.1 + 0.9 * torch.rand(NUM_ENVS, 1, generator=generator(1))
    rewards = (drawn if reward is None else torch.full_like(drawn, reward)).expand(NUM_ENVS, M)

    def distance() -> float:
        parts = {**evidence, "generator": generated(agent)}
        total = fuse(env.fusion.coefficients, parts)
        return float((torch.cat([total.logit, total.feature]) - 1 / M).abs().max())

    before = distance()
    teach(agent, [Transition(env.keepable_observation, rewards, evidence)] * 150)
    assert distance() < 0.01 < before
    # So the generator cancels the evidence instead of following it.
    assert (generated(agent).logit.argmax(1) == tilted.logit.argmin(1)).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_finite_at_one_hot_weights(loss: str) -> None:
    logits = 300 * torch.eye(2 * M)[:M]
    assert gradient(LOSSES[loss], logits, torch.ones(M, M)).isfinite().all()


# The entropy bonus.


def test_entropy_is_zero_for_a_one_hot_and_largest_for_uniform_weights() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    expected = torch.tensor([1.0, 2.0, 4.0]).log()
    torch.testing.assert_close(entropy(rows), expected)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_entropy_bonus_turns_the_optimum_into_a_softmax_of_the_advantages(
    temperature: float,
) -> None:
    env = started_env(fusion="generator")
    agent = PolicyGradient(env, lr=3e-3, entropy_coef=temperature)
    known = transition(env, minmax_center(draw(NUM_ENVS, M)))
    teach(agent, [known] * 300)
    expected = (known.advantages / temperature).softmax(1)
    found = generated(agent)
    torch.testing.assert_close(found.logit, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(found.feature, expected, atol=0.01, rtol=0)


# Algorithms 1 and 2: when the student and when the agent learns.


@pytest.mark.parametrize(
    ("arguments", "epoch"),
    [
        ({}, "sss" + "aaa"),
        ({"passes": 2}, "sss" + "aaaaaa"),
        ({"agent_every": 1}, "sa" * 3),
        ({"agent_every": 2}, "ss" + "aa" + "s" + "a"),
        ({"agent_every": 2, "passes": 2}, "ss" + "aaaa" + "s" + "aa"),
        ({"agent_every": 3}, "sss" + "aaa"),
        ({"agent_every": 1001}, "sss" + "aaa"),
    ],
    ids=str,
)
def test_agent_learns_at_the_end_of_the_epoch_or_when_its_memory_is_full(
    arguments: dict[str, Any], epoch: str
) -> None:
    agent = PolicyGradient(started_env(), **arguments)
    found = events(agent)
    agent.learn(2, lambda: found.append("|"))
    assert "".join(found) == 2 * (epoch + "|")


def test_warm_up_is_learned_from_by_one_pass_in_its_order() -> None:
    env = started_env()
    agent = PolicyGradient(env)
    found = events(agent)
    history = [transition(env, minmax_center(draw(NUM_ENVS, M, seed=s))) for s in range(4)]
    before = parameters(agent)
    teach(agent, history)
    assert "".join(found) == "aaaa"
    assert not parameters(agent).equal(before)
    reverse = PolicyGradient(env)
    teach(reverse, history[::-1])
    assert not parameters(agent).equal(parameters(reverse))


# Learnable fusion.


def test_learnable_fusion_moves_and_stays_on_the_simplex() -> None:
    env = started_env(fusion="learnable")
    before = env.fusion.coefficients.detach().clone()
    agent = PolicyGradient(env, lr=1e-2)
    agent.learn(5, ignore)
    after = env.fusion.coefficients.detach()
    assert (after - before).abs().max() > 0.01
    assert (after > 0).all()
    torch.testing.assert_close(after.sum(1), torch.ones(2))


def test_learnable_fusion_comes_to_rely_on_the_part_that_knows_the_best_teacher() -> None:
    # Confidence, Equ. 9, prefers the very teachers that pay here.
    env = known_env(the_surest, fusion="learnable")
    PolicyGradient(env, lr=1e-2).learn(10, ignore)
    generator_, confidence, divergence = env.fusion.coefficients.detach()[0].tolist()
    assert divergence < min(generator_, confidence)


def test_fixed_fusion_has_nothing_to_learn() -> None:
    env = started_env(fusion="paper")
    before = env.fusion.coefficients.clone()
    PolicyGradient(env).learn(1, ignore)
    assert env.fusion.coefficients.equal(before)


# References.


def test_uniform_has_score_0() -> None:
    env = known_env()
    agent = Uniform(env)
    assert scores(agent, 2) == pytest.approx([0, 0], abs=1e-6)
    assert generated(agent).logit.unique().tolist() == pytest.approx([1 / M])


def test_the_oracle_comes_close_to_score_1() -> None:
    sharp, flat = (scores(Oracle(known_env(), temperature=t), 1)[0] for t in (0.2, 1.0))
    assert 0 < flat < 0.9 < sharp < 1


@pytest.mark.parametrize("reward", ["paper", "alignment"])
def test_the_oracle_has_score_1_at_low_temperature(reward: str) -> None:
    env = started_env(reward=reward, fusion="generator")
    found = scores(Oracle(env, temperature=1e-3), 2)
    assert found == pytest.approx([1, 1], abs=5e-3)


def rewarded(env: MTKDVectorEnv, logits: Tensor) -> float:
    """Mean reward of the waiting batch under an action."""
    weights = env.to_weights(logits)
    return env.reward(env.state, weights).scalar.mean().item()


@pytest.mark.parametrize("reward", ["paper", "alignment"])
@pytest.mark.parametrize("normalization", ["minmax_center", "raw_mean", "center", "none"])
def test_the_oracle_bounds_what_rewards_per_teacher_pay(reward: str, normalization: str) -> None:
    env = started_env(reward=reward, reward_normalization=normalization)
    most = rewarded(env, Oracle(env, temperature=1e-5).act(env.observation))
    for seed in range(20):
        assert rewarded(env, 10 * draw(NUM_ENVS, 2 * M, seed=seed)) <= most + 1e-6


def test_a_reward_of_the_sample_pays_more_where_each_head_follows_its_nearest_teacher() -> None:
    env = started_env(reward="aggregate")
    nearest = [-1e5 * side for side in (env.state.divergence, env.state.distance)]
    oracle = Oracle(env, temperature=1e-5)
    assert rewarded(env, torch.cat(nearest, dim=1)) > rewarded(env, oracle.act(env.observation))


def test_the_oracle_answers_for_the_batch_that_waits() -> None:
    env = started_env(fusion="generator")
    agent = Oracle(env, temperature=0.5)
    advantages = env.advantages()
    found = generated(agent)
    torch.testing.assert_close(found.logit, (advantages / 0.5).softmax(1))
    assert found.feature.equal(found.logit)
    env.distill(env.to_weights(agent.act(env.observation)))
    assert not generated(agent).logit.equal(found.logit)


# Methods are one agent with other weightings.
@pytest.mark.parametrize("name", seldom(sorted({*AGENTS, *WEIGHTINGS}), {*AGENTS, "aver", "mmkd"}))
class TestEveryAgent:
    def test_learns_for_exactly_the_given_epochs(self, name: str) -> None:
        env = started_env()
        ends: list[int] = []
        agent = build_agent(name, env, seed=0, arguments={})
        agent.learn(2, lambda: ends.append(env.steps))
        agent.learn(1, lambda: ends.append(env.steps))
        assert ends == [STEPS * epoch for epoch in (1, 2, 3)]
        assert env.steps == ends[-1]

    def test_learns_in_inference_mode_as_elsewhere(self, name: str) -> None:
        students = []
        for mode in (torch.no_grad, torch.inference_mode):
            env = started_env()
            agent = build_agent(name, env, seed=0, arguments={})
            with mode():
                agent.learn(1, lambda: None)
            students.append(env.distiller.module.state_dict())
        expected, found = students
        assert all(tensor.equal(found[key]) for key, tensor in expected.items())

    def test_acts_on_observations_without_a_graph(self, name: str) -> None:
        env = started_env()
        agent = build_agent(name, env, seed=0, arguments={})
        action = agent.act(env.observation)
        assert action.shape == (NUM_ENVS, 2 * M)
        assert not action.requires_grad
        assert action.isfinite().all()
        assert agent.act(env.observation).equal(action)

    def test_is_no_better_than_the_oracle(self, name: str) -> None:
        env = started_env(fusion="generator")
        found = scores(build_agent(name, env, seed=0, arguments={}), 2)
        assert max(found) <= 1 + 1e-6

    def test_writes_itself_into_a_folder(self, name: str, tmp_path: Path) -> None:
        agent = build_agent(name, started_env(), seed=0, arguments={})
        agent.log_to(tmp_path / "events")
        agent.save(tmp_path)
        written = [path for path in tmp_path.iterdir() if path.is_file()]
        assert {path.stem for path in written} == {"agent"}
        assert all(path.stat().st_size > 0 for path in written)

    def test_goes_on_from_its_state(self, name: str) -> None:
        envs = started_env(), started_env()
        first, second = (build_agent(name, e, seed=s, arguments={}) for s, e in enumerate(envs))
        first.learn(1, ignore)
        envs[1].load_state_dict(deepcopy(envs[0].state_dict()))
        second.load_state_dict(first.state_dict())
        assert second.act(envs[1].observation).equal(first.act(envs[0].observation))


# Weightings as agents.


def test_equal_weights_have_score_0() -> None:
    agent = build_agent("aver", known_env(fusion="paper"), seed=0, arguments={})
    assert scores(agent, 2) == pytest.approx([0, 0], abs=1e-6)


class Sharp(Weighting):
    """Weights that depend on the state, among them a zero."""

    def __call__(self, state: Any) -> TeacherWeights:
        logit = state.divergence.softmax(1)
        feature = torch.zeros_like(logit)
        feature[:, 0], feature[:, 2] = 0.75, 0.25
        return TeacherWeights(logit, feature)


def test_actions_of_a_weighting_stand_for_its_weights() -> None:
    env = started_env(fusion="generator")
    weighting = Sharp(env.distiller)
    agent = WeightingAgent(env, weighting)
    weights = weighting(env.state)
    action = agent.act(env.observation)
    torch.testing.assert_close(action[:, :M], weights.logit.log())
    assert action.isfinite().all()
    found = env.to_weights(action)
    torch.testing.assert_close(found.logit, weights.logit)
    torch.testing.assert_close(found.feature, weights.feature)


def test_a_weighting_is_executed_without_fusion() -> None:
    env = started_env(fusion="paper")
    records: list[Any] = []
    expected: list[TeacherWeights] = []
    learned_from: list[Any] = []
    env.subscribe(records.append)

    class Remembered(Sharp):
        def __call__(self, state: Any) -> TeacherWeights:
            expected.append(super().__call__(state))
            return expected[-1]

        def after_update(self, state: Any) -> None:
            assert len(records) == len(expected)
            learned_from.append(state)

    WeightingAgent(env, Remembered(env.distiller)).learn(1, ignore)
    assert len(records) == len(expected) == len(learned_from) == STEPS
    for record, weights in zip(records, expected, strict=True):
        assert record.weights.logit.equal(weights.logit)
        assert record.weights.feature.equal(weights.feature)


# By name.


@pytest.mark.parametrize(
    ("name", "kind"), [("pg", PolicyGradient), ("oracle", Oracle), ("aver", WeightingAgent)]
)
def test_agents_are_found_by_name(name: str, kind: type[Agent]) -> None:
    assert type(build_agent(name, started_env(), seed=0, arguments={})) is kind


@pytest.mark.parametrize(
    ("name", "arguments", "messages"),
    [
        ("pgg", {}, ["agent: unknown name 'pgg'; did you mean 'pg'?", "known: ", "ppo"]),
        ("avre", {}, ["did you mean 'aver'?", "module:Class"]),
        ("pg", {"lrr": 1}, ["agent.arguments.lrr: unknown key; did you mean 'lr'?"]),
        ("oracle", {"temprature": 1}, ["agent.arguments.temprature", "'temperature'"]),
        ("aver", {"alpha": 1}, ["agent.arguments.alpha: unknown key"]),
        ("pg", {"seed": 1}, ["agent.arguments.seed: cannot be given; the run sets it"]),
        ("ppo", {"env": 1}, ["agent.arguments.env: cannot be given"]),
    ],
)
def test_unknown_names_and_arguments_are_named_with_the_nearest(
    name: str, arguments: dict[str, Any], messages: Sequence[str]
) -> None:
    for check in (check_agent, lambda n, a: build_agent(n, started_env(), seed=0, arguments=a)):
        with pytest.raises(ConfigError) as error:
            check(name, arguments)
        for message in messages:
            assert message in str(error.value)
        assert "\n" not in str(error.value)
