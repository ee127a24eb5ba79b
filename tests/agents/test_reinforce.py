from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from agents import Reinforce
from agents.distributions import (
    DISTRIBUTIONS,
    SMALLEST_WEIGHT,
    Categorical,
    Dirichlet,
    Distribution,
    Gaussian,
    per_head,
)
from agents.policy_gradient import policy_gradient_loss
from agents.reinforce import RunningMean, score_function_loss
from known_optimum import draw, started_env
from mtkd_env.action import generated_weights
from mtkd_env.reward import Rewards
from tiny import NUM_ENVS, TEACHERS, generator

M = len(TEACHERS)
every_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)


def make(name: str, seed: int = 0) -> Distribution:
    """A distribution whose own parameters are not at their start."""
    distribution = DISTRIBUTIONS[name](2 * M)
    for parameter in distribution.parameters():
        parameter.data.add_(0.3 * draw(*parameter.shape, seed=seed + 7))
    return distribution


# The loss.


def test_loss_is_minus_the_mean_of_advantages_times_log_probabilities() -> None:
    log_probability = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    advantages = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    # −½ (−0.5 + 2 − 6 + 0)
    assert score_function_loss(log_probability, advantages) == 2.25


def expected_gradient(logits: Tensor, advantages: Tensor, baseline: float) -> Tensor:
    """The loss's gradient, averaged exactly: every pair of teachers by its probability."""
    logits = logits.clone().requires_grad_()
    weights = per_head(logits).softmax(2).detach()
    distribution = Categorical()
    total = torch.zeros(())
    for pair in product(range(M), repeat=2):
        choice = torch.tensor(pair).expand(len(logits), 2)
        probability = weights[:, 0, pair[0]] * weights[:, 1, pair[1]]
        earned = advantages.gather(1, choice) - baseline
        log_probability = distribution.log_probability(logits, choice)
        total = total + score_function_loss(log_probability, probability.unsqueeze(1) * earned)
    total.backward()
    return logits.grad


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_drawing_teachers_gives_equation_7_on_average_whatever_the_baseline(
    baseline: float,
) -> None:
    logits, advantages = draw(5, 2 * M), draw(5, M, seed=1)
    exact = logits.clone().requires_grad_()
    policy_gradient_loss(generated_weights(exact), advantages).backward()
    torch.testing.assert_close(expected_gradient(logits, advantages, baseline), exact.grad)


def sampled_gradient(
    distribution: Distribution, outputs: Tensor, earn: Callable[[Tensor], Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """The loss's gradient for one sample, from many draws of it, and its standard error."""
    rows = outputs.expand(count, -1).clone().requires_grad_()
    choice = distribution.draw(rows, generator(0))
    log_probability = distribution.log_probability(rows, choice)
    score_function_loss(log_probability, earn(choice)).backward()
    scaled = count * rows.grad
    return scaled.mean(0), scaled.std(0) / count**0.5


def gaussian_case(outputs: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Logits that pay linearly, so their mean pays the mean."""
    price = draw(2 * M, seed=2)
    return lambda logits: (logits @ price).unsqueeze(1), outputs @ price


def dirichlet_case(outputs: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Weights that pay linearly, so their mean, α / Σ α, pays the mean."""
    price = draw(2, M, seed=2)
    concentration = torch.nn.functional.softplus(per_head(outputs)) + 0.1
    mean = concentration / concentration.sum(2, keepdim=True)
    return lambda weights: (weights * price).sum((1, 2)).unsqueeze(1), (mean * price).sum()


def categorical_case(outputs: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    price = draw(M, seed=2)
    return lambda choice: price[choice], (per_head(outputs).softmax(2) * price).sum()


CASES = {
    "categorical": categorical_case,
    "dirichlet": dirichlet_case,
    "gaussian": gaussian_case,
}


@every_distribution
def test_many_draws_give_the_gradient_of_the_expected_reward(name: str) -> None:
    outputs = draw(1, 2 * M).requires_grad_()
    earn, expected_reward = CASES[name](outputs)
    (expected,) = torch.autograd.grad(-expected_reward.sum(), outputs)
    found, error = sampled_gradient(make(name), outputs.detach(), earn, 100_000)
    assert (found - expected[0]).abs().le(4.5 * error).all()
    assert expected.abs().max() > 20 * error.max()


def test_the_deviations_of_logits_have_a_gradient_too() -> None:
    # Far from a peak of the reward wide draws earn no more than narrow ones; on the peak they do.
    outputs, distribution = torch.zeros(20_000, 2 * M), Gaussian(2 * M)
    choice = distribution.draw(outputs, generator(0))
    peaked = -choice.square().sum(1, keepdim=True)
    advantages = peaked - peaked.mean()
    score_function_loss(distribution.log_probability(outputs, choice), advantages).backward()
    # d/dσ of E[−x²] = −σ² is −2σ²: the loss goes up with log σ by 2 at σ = 1.
    torch.testing.assert_close(
        distribution.log_std.grad, torch.full((2 * M,), 2.0), atol=0.15, rtol=0
    )


# Distributions.


@pytest.mark.parametrize("seed", range(3))
def test_dirichlet_agrees_with_scipy(seed: int) -> None:
    outputs = 2 * draw(4, 2 * M, seed=seed)
    distribution = Dirichlet()
    choice = distribution.draw(outputs, generator(seed))
    concentration = np.log1p(np.exp(outputs.double().numpy())).reshape(4, 2, M) + 0.1
    weights = choice.double().numpy()
    weights /= weights.sum(2, keepdims=True)
    rows = zip(concentration, weights, strict=True)
    density = [[scipy.stats.dirichlet.logpdf(w[h], a[h]) for h in (0, 1)] for a, w in rows]
    entropy = [[scipy.stats.dirichlet.entropy(a[h]) for h in (0, 1)] for a in concentration]
    found = distribution.log_probability(outputs, choice)
    assert found.squeeze(1).tolist() == pytest.approx(np.sum(density, 1), rel=1e-3, abs=1e-3)
    assert distribution.entropy(outputs).tolist() == pytest.approx(
        np.sum(entropy, 1), rel=1e-3, abs=1e-3
    )


def test_gaussian_agrees_with_scipy() -> None:
    outputs, distribution = draw(4, 2 * M), make("gaussian")
    choice = distribution.draw(outputs, generator(1))
    std = distribution.log_std.detach().exp().numpy()
    density = scipy.stats.norm.logpdf(choice.numpy(), outputs.numpy(), std).sum(1)
    found = distribution.log_probability(outputs, choice).squeeze(1)
    assert found.tolist() == pytest.approx(density, rel=1e-4)
    entropy = scipy.stats.norm.entropy(0, std).sum()
    assert distribution.entropy(outputs).tolist() == pytest.approx([entropy] * 4, rel=1e-4)


def test_categorical_entropy_is_that_of_the_weights() -> None:
    certain, even = [80.0, 0, 0], [1.0, 1, 1]
    outputs = torch.tensor([certain + certain, certain + even, even + even])
    expected = torch.tensor([0.0, 1, 2]) * np.log(3)
    torch.testing.assert_close(Categorical().entropy(outputs), expected.float())


@every_distribution
def test_gradients_are_finite_far_out(name: str) -> None:
    outputs = torch.tensor([[300.0, -300, 0] * 2, [-300.0] * 6], requires_grad=True)
    distribution = make(name)
    choice = distribution.draw(outputs, generator(0))
    value = (
        distribution.log_probability(outputs, choice).sum() + distribution.entropy(outputs).sum()
    )
    value.backward()
    assert value.isfinite()
    assert outputs.grad.isfinite().all()
    assert distribution.action(outputs, choice).isfinite().all()
    assert distribution.mean_action(outputs).isfinite().all()


def test_the_environment_executes_the_weights_that_were_drawn() -> None:
    env = started_env(fusion="generator")
    outputs, distribution = draw(NUM_ENVS, 2 * M), Dirichlet()
    choice = distribution.draw(outputs, generator(3))
    assert choice.max() > 0.6
    found = env.to_weights(distribution.action(outputs, choice))
    torch.testing.assert_close(found.logit, choice[:, 0], atol=3 * SMALLEST_WEIGHT, rtol=1e-4)
    torch.testing.assert_close(found.feature, choice[:, 1], atol=3 * SMALLEST_WEIGHT, rtol=1e-4)


def test_a_weight_of_zero_is_executed_as_a_small_one() -> None:
    choice = torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0]]])
    action = Dirichlet().action(torch.zeros(1, 2 * M), choice)
    assert action.isfinite().all()
    torch.testing.assert_close(generated_weights(action).feature, choice[:, 1], atol=1e-5, rtol=0)


@every_distribution
def test_the_deterministic_action_is_that_of_the_mean(name: str) -> None:
    outputs, distribution = draw(1, 2 * M), make(name)
    rows = outputs.expand(20_000, -1)
    choice = distribution.draw(rows, generator(0))
    mean = generated_weights(distribution.mean_action(outputs))
    if name == "gaussian":
        torch.testing.assert_close(choice.mean(0), outputs[0], atol=0.05, rtol=0)
        assert distribution.mean_action(outputs).equal(outputs)
    elif name == "dirichlet":
        torch.testing.assert_close(choice.mean(0)[0], mean.logit[0], atol=0.02, rtol=0)
        torch.testing.assert_close(choice.mean(0)[1], mean.feature[0], atol=0.02, rtol=0)
    else:
        for head, weights in enumerate((mean.logit, mean.feature)):
            share = choice[:, head].bincount(minlength=M) / len(choice)
            torch.testing.assert_close(share, weights[0], atol=0.02, rtol=0)


@every_distribution
def test_draws_carry_no_gradient(name: str) -> None:
    distribution, outputs = make(name), draw(5, 2 * M).requires_grad_()
    assert not distribution.draw(outputs, generator(0)).requires_grad


REWARDS = Rewards(
    teacher=torch.zeros(2, M),
    advantages=torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]),
    scalar=torch.tensor([0.7, 0.8]),
)


def test_drawn_teachers_earn_their_own_advantages() -> None:
    choice = torch.tensor([[2, 0], [1, 1]])
    assert Categorical().earned(REWARDS, choice).equal(torch.tensor([[0.3, 0.1], [0.5, 0.5]]))


@pytest.mark.parametrize("name", ["dirichlet", "gaussian"])
def test_drawn_weights_earn_the_environments_reward(name: str) -> None:
    found = make(name).earned(REWARDS, torch.zeros(2, 2 * M))
    assert found.equal(torch.tensor([[0.7], [0.8]]))


# The baseline.


def test_running_mean_is_that_of_the_hand_computed_example() -> None:
    mean = RunningMean(decay=0.5)
    assert mean() == 0
    mean.update(torch.tensor([3.0, 5.0]))
    assert mean() == 4
    mean.update(torch.tensor([1.0]))
    # (¼ · 4 + ½ · 1) / (¼ + ½)
    assert mean() == 2


def test_the_baseline_does_not_know_the_choices_that_it_is_used_for() -> None:
    agent = Reinforce(started_env(), baseline_decay=0.0)
    first, second = draw(NUM_ENVS, 2), draw(NUM_ENVS, 2, seed=1)
    torch.testing.assert_close(agent._advantages(first), first)
    torch.testing.assert_close(agent._advantages(second), second - first.mean())


def test_without_a_baseline_advantages_are_what_was_earned() -> None:
    agent = Reinforce(started_env(), baseline="none")
    for seed in range(2):
        earned = draw(NUM_ENVS, 2, seed=seed)
        assert agent._advantages(earned).equal(earned)


def test_normalized_advantages_have_a_root_mean_square_of_1() -> None:
    agent = Reinforce(started_env(), normalize_advantage=True)
    for seed in range(2):
        found = agent._advantages(1 + 5 * draw(NUM_ENVS, 2, seed=seed))
        assert found.square().mean().item() == pytest.approx(1, abs=1e-5)
    assert agent._advantages(torch.zeros(NUM_ENVS, 2)).isfinite().all()


# Updates.


@pytest.mark.parametrize(
    ("agent_every", "epoch"),
    [(1, "sasasa"), (2, "ssasa"), (None, "sssa")],
)
def test_every_update_is_one_optimiser_step_so_that_its_choices_are_the_policys(
    agent_every: int | None, epoch: str
) -> None:
    agent = Reinforce(started_env(), agent_every=agent_every)
    found: list[str] = []
    agent.env.subscribe(lambda _: found.append("s"))
    agent.optimizer.register_step_post_hook(lambda *_: found.append("a"))
    agent.learn(2, lambda: found.append("|"))
    assert "".join(found) == 2 * (epoch + "|")


def test_an_update_of_several_batches_follows_their_mean_gradient() -> None:
    arguments: dict[str, Any] = {"optimizer": "sgd", "lr": 1.0, "baseline": "none"}
    agent = Reinforce(started_env(), agent_every=None, **arguments)
    memory = [agent.collect() for _ in range(3)]
    start = [p.detach().clone() for p in agent.policy.parameters()]

    def moved(batches: list[Any]) -> Tensor:
        for parameter, value in zip(agent.policy.parameters(), start, strict=True):
            parameter.data.copy_(value)
        agent.history.clear()
        for batch in batches:
            agent.history.add(batch)
        agent.update()
        after = zip(agent.policy.parameters(), start, strict=True)
        return torch.cat([(p.detach() - value).flatten() for p, value in after])

    together = moved(memory)
    alone = torch.stack([moved([batch]) for batch in memory])
    torch.testing.assert_close(together, alone.mean(0))
    assert together.norm() > 0.01
