"""PPO in one file, after CleanRL: gymnasium and torch, no library of algorithms.

python experiments/examples/cleanrl_ppo.py --epochs 10 --reward alignment --fusion generator

Trains a student on the digits under the weights of a PPO agent, and prints the mean reward (0 for
equal weights) and the student's accuracy after every epoch. The environment gives and takes
tensors, so nothing leaves its device but what is printed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import mtkd_env

HIDDEN = 64
ROLLOUT = 11  # steps between two updates: two updates to an epoch of the digits
MINIBATCHES = 2
PASSES = 10
LEARNING_RATE = 2e-3
GAMMA, LAMBDA = 0.99, 0.95  # without effect while every step ends an episode
CLIP = 0.2
VALUE_COEFFICIENT = 0.5
MAX_GRADIENT_NORM = 0.5


def network(inputs: int, outputs: int) -> nn.Sequential:
    """Two hidden layers."""
    hidden = [nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, outputs))


class ActorCritic(nn.Module):
    """A Gaussian policy whose spread does not depend on the state, and a value function."""

    def __init__(self, observations: int, actions: int) -> None:
        super().__init__()
        self.mean = network(observations, actions)
        self.log_std = nn.Parameter(torch.zeros(actions))
        self.value = network(observations, 1)

    def policy(self, observation: Tensor) -> Normal:
        """The distribution of the actions."""
        return Normal(self.mean(observation), self.log_std.exp())


@dataclass
class Rollout:
    """T steps of B samples each; the first axis is time."""

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    dones: Tensor


@torch.no_grad()
def collect(env: Any, agent: ActorCritic, observation: Tensor, steps: int) -> tuple[Rollout, Any]:
    """Some steps under the agent's policy, and the observation after them."""
    rows: list[tuple[Tensor, ...]] = []
    for _ in range(steps):
        policy = agent.policy(observation)
        action = policy.sample()
        value = agent.value(observation).squeeze(1)
        after, reward, terminated, truncated, _ = env.step(action)
        log_prob = policy.log_prob(action).sum(1)
        done = (terminated | truncated).float()
        rows.append((observation, action, log_prob, value, reward, done))
        observation = after
    return Rollout(*(torch.stack(column) for column in zip(*rows, strict=True))), observation


@torch.no_grad()
def advantages_of(rollout: Rollout, value_after: Tensor) -> Tensor:
    """Generalised advantage estimates; nothing of the next episode counts."""
    advantages = torch.zeros_like(rollout.rewards)
    following = torch.zeros_like(value_after)
    for step in reversed(range(len(advantages))):
        goes_on = 1 - rollout.dones[step]
        delta = rollout.rewards[step] + GAMMA * value_after * goes_on - rollout.values[step]
        following = advantages[step] = delta + GAMMA * LAMBDA * goes_on * following
        value_after = rollout.values[step]
    return advantages


def loss_of(agent: ActorCritic, rows: Sequence[Tensor]) -> Tensor:
    """The clipped objective and the squared error of the values."""
    observation, action, old_log_prob, advantage, target = rows
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = (agent.policy(observation).log_prob(action).sum(1) - old_log_prob).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    gain = torch.minimum(ratio * advantage, clipped * advantage).mean()
    error = (agent.value(observation).squeeze(1) - target).square().mean()
    return VALUE_COEFFICIENT * error - gain


def update(agent: ActorCritic, optimizer: torch.optim.Optimizer, data: Sequence[Tensor]) -> None:
    """Some passes over a rollout, each in minibatches of its samples in a new order."""
    rows = [part.flatten(0, 1) for part in data]
    for _ in range(PASSES):
        for chosen in torch.randperm(len(rows[0])).chunk(MINIBATCHES):
            loss = loss_of(agent, [part[chosen] for part in rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()


def train_epoch(
    env: Any, agent: ActorCritic, optimizer: torch.optim.Optimizer, observation: Tensor
) -> tuple[float, Tensor]:
    """One epoch of the student; the mean reward in it, and the observation after it."""
    rewards: list[Tensor] = []
    for start in range(0, env.steps_per_epoch, ROLLOUT):
        steps = min(ROLLOUT, env.steps_per_epoch - start)
        rollout, observation = collect(env, agent, observation, steps)
        with torch.no_grad():
            value_after = agent.value(observation).squeeze(1)
        advantages = advantages_of(rollout, value_after)
        known = rollout.observations, rollout.actions, rollout.log_probs
        update(agent, optimizer, (*known, advantages, advantages + rollout.values))
        rewards.append(rollout.rewards.flatten())
    return float(torch.cat(rewards).mean()), observation


def train(env: Any, epochs: int, seed: int) -> list[float]:
    """Trains a student and an agent; gives the mean reward of every epoch."""
    torch.manual_seed(seed)
    observation, _ = env.reset(seed=seed)
    sizes = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    agent = ActorCritic(*sizes).to(env.device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE)
    rewards: list[float] = []
    for epoch in range(1, epochs + 1):
        reward, observation = train_epoch(env, agent, optimizer, observation)
        rewards.append(reward)
        accuracy = env.evaluate().accuracy
        sys.stdout.write(f"epoch {epoch:3}  reward {reward:6.3f}  student {accuracy:6.1%}\n")
    return rewards


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; gives its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--epochs", type=int, default=10, help="of the student")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reward", default="alignment", choices=sorted(mtkd_env.REWARDS))
    parser.add_argument("--fusion", default="generator", help="generator: the agent decides alone")
    parser.add_argument("--batch-size", type=int, default=64, help="samples of the student's batch")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(argv)
    try:
        env = gymnasium.make_vec(
            "MTKD/Digits-v0",
            num_envs=given.batch_size,
            reward=given.reward,
            fusion=given.fusion,
            device=given.device,
            epochs=given.epochs,
            output="torch",
        )
    except mtkd_env.ConfigError as error:
        parser.error(str(error))
    train(env, given.epochs, given.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
