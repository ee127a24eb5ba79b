"""The all-actions clipped objective of PPO, an option of `pg`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from agents import PolicyGradient, Transition, policy_gradient
from agents.policy_gradient import clipped_loss, entropy, policy_gradient_loss
from known_optimum import (
    STEPS,
    draw,
    started_env,
    teach,
)
from mtkd_env.action import generated_weights
from mtkd_env.errors import ConfigError
from mtkd_env.reward import minmax_center
from mtkd_env.types import TeacherWeights
from tiny import NUM_ENVS, TEACHERS

M = len(TEACHERS)
E = 0.2


def both(rows: list[list[float]]) -> TeacherWeights:
    """The same weights in both heads."""
    weights = torch.tensor(rows)
    return TeacherWeights(weights, weights.clone())


def test_is_that_of_the_hand_computed_example() -> None:
    old, now = both([[0.5, 0.5]]), both([[0.8, 0.2]])
    # Beyond the clip where it pays: 0.5 · 1.2 · 1; where it costs, all of it counts: 0.2 · 0.4.
    loss = clipped_loss(now, old, torch.tensor([[1.0, 0.4]]), E)
    torch.testing.assert_close(loss, torch.tensor(-2 * (0.6 + 0.08)))
    # The other way round: 0.8 · −1 in full, and no more than 0.5 · 0.8 · −0.4.
    loss = clipped_loss(now, old, torch.tensor([[-1.0, -0.4]]), E)
    torch.testing.assert_close(loss, torch.tensor(2 * (0.8 + 0.16)))


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_ratios_of_the_paper(seed: int) -> None:
    now, old = (generated_weights(draw(6, 2 * M, seed=seed + k)) for k in (0, 10))
    advantages = draw(6, M, seed=seed + 20)
    expected = torch.zeros(())
    for w, before in ((now.logit, old.logit), (now.feature, old.feature)):
        ratio = w / before
        pessimistic = torch.minimum(ratio * advantages, ratio.clamp(1 - E, 1 + E) * advantages)
        expected -= (before * pessimistic).sum(1).mean()
    torch.testing.assert_close(clipped_loss(now, old, advantages, E), expected)


def test_has_value_and_gradient_of_equation_7_where_nothing_has_changed() -> None:
    advantages = draw(5, M, seed=1)
    found, exact = (draw(5, 2 * M).requires_grad_() for _ in range(2))
    old = generated_weights(found.detach())
    loss = clipped_loss(generated_weights(found), old, advantages, E)
    expected = policy_gradient_loss(generated_weights(exact), advantages)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(found.grad, exact.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.3, 1.0, 0.0),  # has gained enough
        (0.7, -1.0, 0.0),  # has lost enough
        (1.3, -1.0, 1.0),  # has moved the wrong way, and comes back
        (0.7, 1.0, -1.0),
        (1.1, 1.0, -1.0),  # within the clip
        (0.9, -1.0, 1.0),
    ],
)
@pytest.mark.parametrize("head", ["logit", "feature"])
def test_gradient_vanishes_beyond_the_clip_only_where_that_pays(
    head: str, ratio: float, advantage: float, slope: float
) -> None:
    old = both([[0.4, 0.3, 0.3]])
    now = both([[0.4 * ratio, 0.3, 0.3]])
    moved = getattr(now, head).requires_grad_()
    clipped_loss(now, old, torch.tensor([[advantage, 0.0, 0.0]]), E).backward()
    assert moved.grad[0].tolist() == pytest.approx([slope, 0, 0])


def test_is_finite_where_an_old_weight_was_zero() -> None:
    now = generated_weights(draw(1, 2 * M).requires_grad_())
    old = both([[1.0, 0.0, 0.0]])
    loss = clipped_loss(now, old, torch.tensor([[0.5, 1.0, -1.0]]), E)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [now.logit, now.feature]))


# The agent.


@pytest.mark.parametrize("fusion", ["paper", "generator"])
def test_old_weights_are_those_that_the_policy_generated_for_the_batch(
    fusion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = started_env(fusion=fusion)
    agent = PolicyGradient(env, loss="clipped", passes=2, lr=1e-2)
    executed: list[Any] = []
    env.subscribe(lambda record: executed.append(record.weights.parts.get("generator")))
    old: list[TeacherWeights] = []

    def spy(now: TeacherWeights, before: TeacherWeights, *rest: Any) -> Tensor:
        old.append(before)
        return clipped_loss(now, before, *rest)

    monkeypatch.setattr(policy_gradient, "clipped_loss", spy)
    # Not before the statistics of the observations have settled.
    agent.warm_up(STEPS)
    executed.clear()
    old.clear()
    agent.learn(1, lambda: None)
    assert len(old) == 2 * STEPS
    for before, weights in zip(old, 2 * executed, strict=True):
        assert before.logit.equal(weights.logit)
        assert before.feature.equal(weights.feature)


def warmed_up(passes: int, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Generated weights before and after learning from one batch of a warm-up."""
    env = started_env(fusion="generator")
    agent = PolicyGradient(env, passes=passes, lr=0.05, **arguments)
    advantages = minmax_center(draw(NUM_ENVS, M))
    known = Transition(env.keepable_observation, advantages, env.fusion.evidence(env.state))
    before = generated_weights(agent.act(env.observation)).logit
    teach(agent, [known])
    return before, generated_weights(agent.act(env.observation)).logit


def test_the_first_pass_over_the_warm_up_is_that_of_equation_7() -> None:
    clipped, exact = warmed_up(1, loss="clipped"), warmed_up(1)
    assert clipped[1].equal(exact[1])
    assert not clipped[1].equal(clipped[0])


def test_many_passes_over_a_batch_move_its_weights_less_than_without_the_clip() -> None:
    def growth(**arguments: Any) -> float:
        before, after = warmed_up(200, optimizer="sgd", **arguments)
        return float((after / before).max())

    unclipped, clipped = growth(), growth(loss="clipped")
    assert unclipped > 2
    # Some way beyond the clip: a weight also grows where the others fall.
    assert 1 + E < clipped < 1.6
    assert growth(loss="clipped", clip_range=0.05) < 1.2


def test_learnable_fusion_is_refused_because_it_would_not_learn() -> None:
    with pytest.raises(ConfigError, match=r"^loss: 'clipped' .* learnable fusion"):
        PolicyGradient(started_env(fusion="learnable"), loss="clipped")


# What an entropy coefficient of 0 must not do.


def test_gradient_of_the_entropy_is_finite_at_a_one_hot() -> None:
    rows = torch.eye(M).requires_grad_()
    entropy(rows).sum().backward()
    assert rows.grad.isfinite().all()
