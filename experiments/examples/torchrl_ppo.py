"""PPO of TorchRL: its GymWrapper, collector, advantages and loss on the environment as it is.

pip install 'mtkd-env[torchrl]'
python experiments/examples/torchrl_ppo.py --epochs 10 --reward alignment --fusion generator

Trains a student on the digits under the weights of TorchRL's PPO, and prints the mean reward (0 for
equal weights) and the student's accuracy after every epoch.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium
import torch
from torch import nn

import mtkd_env

HIDDEN = 64
MINIBATCHES = 4  # of an epoch
PASSES = 10
LEARNING_RATE = 2e-3
GAMMA, LAMBDA = 0.99, 0.95  # without effect while every step ends an episode
CLIP = 0.2
MAX_GRADIENT_NORM = 0.5


def wrap(env: gymnasium.vector.VectorEnv[Any, Any, Any], seed: int) -> Any:
    """The environment as TorchRL's, at the start of a student.

    TorchRL finds out what `info` holds by some random steps, which train the student, so the seed
    comes after that: it starts a new one.
    """
    from torchrl.envs import GymWrapper

    wrapped = GymWrapper(env)
    wrapped.set_seed(seed)
    return wrapped


def make_actor(env: Any) -> Any:
    """A Gaussian policy whose spread does not depend on the observation."""
    from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
    from torchrl.modules import IndependentNormal, ProbabilisticActor

    actions = env.action_spec.shape[-1]
    network = nn.Sequential(_network(env, actions), AddStateIndependentNormalScale(actions))
    return ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=partial(IndependentNormal, tanh_loc=False),
        return_log_prob=True,
        spec=env.action_spec_unbatched,
    )


def _network(env: Any, outputs: int) -> nn.Sequential:
    inputs = env.observation_spec["observation"].shape[-1]
    hidden = [nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, outputs))


def make_collector(env: Any, actor: Any, epochs: int, steps_per_epoch: int) -> Any:
    """Gives out one epoch of the student at a time, (B, T) frames of it."""
    from torchrl.collectors import Collector

    frames = steps_per_epoch * env.batch_size.numel()
    return Collector(
        env,
        actor,
        frames_per_batch=frames,
        total_frames=epochs * frames,
        auto_register_policy_transforms=False,
    )


def update(loss: Any, advantages: Any, optimizer: torch.optim.Optimizer, data: Any) -> None:
    """Some passes over an epoch, each in minibatches of its samples in a new order."""
    for _ in range(PASSES):
        advantages(data)
        frames = data.reshape(-1)
        for chosen in torch.randperm(len(frames)).chunk(MINIBATCHES):
            terms = loss(frames[chosen])
            optimizer.zero_grad()
            sum(value for key, value in terms.items() if key.startswith("loss_")).backward()
            nn.utils.clip_grad_norm_(loss.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()


def train(env: Any, epochs: int, seed: int) -> list[float]:
    """Trains a student and an agent; gives the mean reward of every epoch."""
    from torchrl.modules import ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    torch.manual_seed(seed)
    wrapped = wrap(env, seed)
    actor = make_actor(wrapped).to(env.device)
    critic = ValueOperator(_network(wrapped, 1), in_keys=["observation"]).to(env.device)
    loss = ClipPPOLoss(
        actor, critic, clip_epsilon=CLIP, entropy_bonus=False, normalize_advantage=True
    )
    advantages = GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=critic)
    optimizer = torch.optim.Adam(loss.parameters(), lr=LEARNING_RATE)
    collector = make_collector(wrapped, actor, epochs, env.steps_per_epoch)
    rewards: list[float] = []
    for epoch, data in enumerate(collector, start=1):
        update(loss, advantages, optimizer, data)
        rewards.append(float(data["next", "reward"].mean()))
        accuracy = env.evaluate().accuracy
        sys.stdout.write(f"epoch {epoch:3}  reward {rewards[-1]:6.3f}  student {accuracy:6.1%}\n")
    collector.shutdown()
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
        import torchrl  # noqa: F401 - whether it is there
    except ImportError as error:
        parser.error(f"needs TorchRL ({error}); install it with pip install 'mtkd-env[torchrl]'")
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
