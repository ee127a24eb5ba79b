import pytest
import torch
from torch import Tensor

from agents import DPG
from agents.dpg import TeacherCritic, actor_loss, critic_loss
from agents.policy_gradient import policy_gradient_loss
from known_optimum import (
    STEPS,
    draw,
    ignore,
    known_env,
    started_env,
    the_surest,
)
from mtkd_env.action import generated_weights
from mtkd_env.reward import expected_advantage
from tiny import TEACHERS

M = len(TEACHERS)


def parameters(network: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


# The losses.


def test_critic_loss_is_the_mean_squared_error_of_the_rewards() -> None:
    values, rewards = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert critic_loss(values, rewards) == 2.5


def test_a_true_critic_gives_the_actor_half_the_gradient_of_equation_7() -> None:
    # The scalar reward is half the expected advantage of both heads.
    advantages = draw(5, M, seed=1)
    found, exact = (draw(5, 2 * M).requires_grad_() for _ in range(2))
    actor_loss(expected_advantage(generated_weights(found), advantages)).backward()
    policy_gradient_loss(generated_weights(exact), advantages).backward()
    torch.testing.assert_close(2 * found.grad, exact.grad)
    assert found.grad.norm() > 0.05


def test_actor_gradient_is_that_of_the_deterministic_policy_gradient_theorem() -> None:
    critic, logits = TeacherCritic(7, M, hidden=16), draw(5, 2 * M).requires_grad_()
    observation = draw(5, 7, seed=2)
    generated = generated_weights(logits)
    actor_loss(critic(observation, torch.cat([generated.logit, generated.feature], 1))).backward()
    # ∇_w Q at the policy's own weights, then the Jacobian of both softmaxes.
    own = generated_weights(logits.detach())
    weights = [own.logit.requires_grad_(), own.feature.requires_grad_()]
    slopes = torch.autograd.grad(critic(observation, torch.cat(weights, 1)).sum(), weights)
    ascent = [
        w * (slope - (slope * w).sum(1, keepdim=True))
        for w, slope in zip(weights, slopes, strict=True)
    ]
    torch.testing.assert_close(-logits.grad, torch.cat(ascent, dim=1).detach() / 5)


def test_critic_sees_the_observation_and_both_heads() -> None:
    critic = TeacherCritic(7, M)
    observation = draw(5, 7).requires_grad_()
    weights = [draw(5, M, seed=s).softmax(1).requires_grad_() for s in (1, 2)]
    values = critic(observation, torch.cat(weights, 1))
    assert values.shape == (5, 1)
    found = torch.autograd.grad(values.sum(), [observation, *weights])
    assert all(gradient.abs().sum() > 0 for gradient in found)


# The agent.


def test_critic_and_policy_take_turns_on_the_remembered_batches() -> None:
    agent = DPG(started_env(), passes=2)
    found: list[str] = []
    agent.env.subscribe(lambda _: found.append("s"))
    agent.critic_optimizer.register_step_post_hook(lambda *_: found.append("c"))
    agent.optimizer.register_step_post_hook(lambda *_: found.append("p"))
    agent.learn(2, ignore)
    assert "".join(found) == 2 * (STEPS * "s" + 2 * STEPS * "cp")


@pytest.mark.parametrize(("moves", "stays"), [("lr", "critic_lr"), ("critic_lr", "lr")])
def test_each_network_is_moved_by_its_own_optimiser_alone(moves: str, stays: str) -> None:
    agent = DPG(started_env(), **{moves: 1e-2, stays: 0.0})
    networks = {"lr": agent.policy, "critic_lr": agent.critic}
    before = {name: parameters(network) for name, network in networks.items()}
    agent.learn(1, ignore)
    assert parameters(networks[stays]).equal(before[stays])
    assert not parameters(networks[moves]).equal(before[moves])


def test_the_policy_climbs_what_the_critic_believes() -> None:
    agent = DPG(started_env(), optimizer="sgd", lr=0.1, critic_lr=0.0, entropy_coef=0.0)
    tried = agent.collect()
    observation = agent.env.recall(tried.observation)

    def believed() -> Tensor:
        weights = generated_weights(agent.policy(observation))
        return agent.values(observation, weights).mean()

    before = believed()
    agent.history.add(tried)
    agent.update()
    assert believed() > before


@pytest.mark.slow
def test_the_critic_comes_to_know_the_rewards() -> None:
    agent = DPG(known_env(the_surest, num_envs=16, steps=10), lr=0.0, critic_lr=3e-3)
    agent.learn(15, ignore)
    tried = [agent.collect() for _ in range(10)]
    seen = agent.env.recall
    errors = torch.stack([agent.values(seen(t.observation), t.weights) - t.rewards for t in tried])
    rewards = torch.stack([t.rewards for t in tried])
    # On batches that it has not seen.
    assert errors.square().mean() < 0.1 * rewards.var()


def test_exploration_is_noise_of_the_given_deviation_on_the_logits() -> None:
    agent = DPG(started_env(), noise_std=0.5)
    logits = draw(5000, 2 * M)
    noise = agent._explore(logits) - logits
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(0.5, abs=0.02)
    assert not agent._explore(logits).equal(logits + noise)


def test_without_noise_the_policys_own_weights_are_executed() -> None:
    env = started_env(fusion="generator")
    agent = DPG(env, noise_std=0.0)
    expected = env.to_weights(agent.act(env.observation))
    assert agent.collect().weights.logit.equal(expected.logit)


# Known optima.


# By name.
