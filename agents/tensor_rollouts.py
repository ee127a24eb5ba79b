"""Rollouts of on-policy algorithms as tensors, behind Stable-Baselines3's own classes.

The library collects in arrays: every observation goes from the environment's device to the host,
into a buffer there, and back for the policy and for every minibatch. Here rewards, values and the
last observations leave the device, once a rollout, for the library's own arithmetic of returns.
Updates, policies and returns remain the library's.
"""

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from jaxtyping import Float
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import BaseBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from mtkd_env.wrappers.sb3 import SB3VecEnv


class TensorRolloutBuffer(RolloutBuffer):
    """The library's buffer with observations, actions and log-probabilities on the device.

    They are made once and written into in every rollout; the library makes new ones each time.
    Minibatches are those of the library's buffer, drawn by the same generator, but taken from where
    they are: there is no second copy of all observations in another order.

    Args:
        like: The buffer that it takes the place of.

    Attributes:
        observations: (steps, B, F), on the device.
        actions: (steps, B, A), on the device.
        log_probs: (steps, B), on the device.
        rewards: (steps, B), on the host once returns have been computed, as all that follow.
        values: (steps, B).
        advantages: (steps, B).
        returns: (steps, B).
        episode_starts: (steps, B).
    """

    observations: Tensor  # type: ignore[assignment] # an array in the library
    actions: Tensor  # type: ignore[assignment] # as above
    log_probs: Tensor  # type: ignore[assignment] # as above

    def __init__(self, like: RolloutBuffer) -> None:
        self._on_device: dict[str, Tensor] = {}
        super().__init__(
            like.buffer_size,
            like.observation_space,
            like.action_space,
            device=like.device,
            gae_lambda=like.gae_lambda,
            gamma=like.gamma,
            n_envs=like.n_envs,
        )

    def reset(self) -> None:
        """Forgets the rollout."""
        if not self._on_device:
            self._allocate()
        self.episode_starts = np.zeros((self.buffer_size, self.n_envs), dtype=np.float32)
        self.generator_ready = False
        BaseBuffer.reset(self)

    def _allocate(self) -> None:
        shape = self.buffer_size, self.n_envs

        def empty(*width: int, dtype: Any = np.float32) -> Tensor:
            numbers = torch.from_numpy(np.empty(0, dtype))
            return numbers.new_empty((*shape, *width), device=self.device)

        self.observations = empty(*self.obs_shape, dtype=self.observation_space.dtype)
        self.actions = empty(self.action_dim, dtype=self.action_space.dtype)
        self.log_probs = empty()
        self._on_device = {name: empty() for name in ("rewards", "values")}

    def add(
        self,
        obs: Any,
        action: Any,
        reward: Any,
        episode_start: np.ndarray,
        value: Tensor,
        log_prob: Tensor,
    ) -> None:
        """Keeps a step; its observations, actions and rewards are tensors or arrays."""
        self.observations[self.pos].copy_(torch.as_tensor(obs))
        self.actions[self.pos].copy_(torch.as_tensor(action))
        self.log_probs[self.pos].copy_(log_prob)
        self._on_device["rewards"][self.pos].copy_(torch.as_tensor(reward))
        self._on_device["values"][self.pos].copy_(value.flatten())
        self.episode_starts[self.pos] = episode_start
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Advantages and returns by the library's arithmetic, and copies of both on the device."""
        rewards, values = (self._on_device[name] for name in ("rewards", "values"))
        # Small tensors, and hundreds of steps one after the other: quicker on the host anywhere.
        self.rewards, self.values = torch.stack([rewards, values]).cpu().numpy()
        self.advantages = np.zeros_like(self.values)
        super().compute_returns_and_advantage(last_values, dones)
        for name, array in (("advantages", self.advantages), ("returns", self.returns)):
            self._on_device[name] = torch.from_numpy(array).to(self.device)

    def get(self, batch_size: int | None = None) -> Generator[RolloutBufferSamples, None, None]:
        """Minibatches of all samples in a random order, the same as the library's."""
        assert self.full
        count = self.buffer_size * self.n_envs
        order = np.random.permutation(count)  # noqa: NPY002 - the generator that the library seeds
        # The library numbers samples by environment, then step; here they lie by step.
        environment, step = np.divmod(order, self.buffer_size)
        rows = torch.from_numpy(step * self.n_envs + environment).to(self.device)
        for taken in rows.split(batch_size or count):
            yield self._taken(taken)

    def _taken(self, rows: Tensor) -> RolloutBufferSamples:
        known = self._on_device
        before = [self.observations, self.actions.float(), known["values"], self.log_probs]
        parts = [*before, known["advantages"], known["returns"]]
        return RolloutBufferSamples(*(part.flatten(0, 1).index_select(0, rows) for part in parts))


class TensorRollouts(OnPolicyAlgorithm):
    """An on-policy algorithm that collects tensors; a base in front of the algorithm's own class.

    In an `SB3VecEnv` without wrappers, `collect_rollouts` does what the library's does, step by
    step, and comes to the same numbers up to rounding: of episodes that are truncated the values of
    all last observations are computed together. Under wrappers it is the library's. Callbacks find
    the local variables of the library under their names; `actions`, `clipped_actions`, `new_obs`
    and `rewards` are tensors.
    """

    def _setup_model(self) -> None:
        super()._setup_model()
        if type(self.rollout_buffer) is RolloutBuffer:
            self.rollout_buffer = TensorRolloutBuffer(self.rollout_buffer)

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """Fills the buffer; gives whether the callback let it."""
        if not isinstance(env, SB3VecEnv) or not isinstance(rollout_buffer, TensorRolloutBuffer):
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        callback.on_rollout_start()
        found: dict[str, Any] = {"self": self, "env": env, "callback": callback}
        found |= {"rollout_buffer": rollout_buffer, "n_rollout_steps": n_rollout_steps}
        seen = torch.as_tensor(self._last_obs, device=self.device)
        try:
            for n_steps in range(n_rollout_steps):
                self._renew_noise(env, n_steps)
                found |= self._step(env, seen) | {"n_steps": n_steps}
                callback.update_locals(found)
                if not callback.on_step():
                    return False
                self._keep(rollout_buffer, found)
                seen = found["new_obs"]
        finally:
            # An array outside of a rollout, for everybody who looks there.
            self._last_obs = seen.cpu().numpy()
        last = self._values_of(seen)
        rollout_buffer.compute_returns_and_advantage(last_values=last, dones=found["dones"])
        callback.update_locals(found | {"n_steps": n_rollout_steps, "values": last})
        callback.on_rollout_end()
        return True

    def _renew_noise(self, env: VecEnv, n_steps: int) -> None:
        if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
            self.policy.reset_noise(env.num_envs)

    def _step(self, env: SB3VecEnv, seen: Float[Tensor, "B F"]) -> dict[str, Any]:
        """Acts once; gives what the library has in local variables then."""
        with torch.no_grad():
            actions, values, log_probs = self.policy(seen)
        executed = self._executed(actions)
        step = env.step_tensors(executed)
        self.num_timesteps += env.num_envs
        return {
            "obs_tensor": seen,
            "actions": actions,
            "values": values,
            "log_probs": log_probs,
            "clipped_actions": executed,
            "new_obs": step.observations.to(self.device),
            "rewards": step.rewards.to(self.device),
            "dones": step.dones,
            "infos": step.infos,
            "final_observations": step.final_observations,
        }

    def _executed(self, actions: Float[Tensor, "B A"]) -> Float[Tensor, "B A"]:
        assert isinstance(self.action_space, Box)
        # The same for all logits.
        low, high = float(self.action_space.low[0]), float(self.action_space.high[0])
        if self.policy.squash_output:
            return low + 0.5 * (actions + 1) * (high - low)
        return actions.clamp(low, high)

    def _keep(self, buffer: TensorRolloutBuffer, found: Mapping[str, Any]) -> None:
        """Adds a step to the buffer, whose reward counts what follows a truncation."""
        assert self._last_episode_starts is not None
        rewards, final = found["rewards"], found["final_observations"]
        if final is not None:
            rewards = rewards + self.gamma * self._values_of(final.to(self.device)).flatten()
        buffer.add(
            found["obs_tensor"],
            found["actions"],
            rewards,
            self._last_episode_starts,
            found["values"],
            found["log_probs"],
        )
        self._last_episode_starts = found["dones"]

    @torch.no_grad()
    def _values_of(self, observations: Float[Tensor, "B F"]) -> Float[Tensor, "B 1"]:
        return self.policy.predict_values(observations)


def can_collect_tensors(algorithm: type[BaseAlgorithm], arguments: Mapping[str, Any]) -> bool:
    """Whether an algorithm can: it is on-policy, and collects in the library's way and buffer.

    Args:
        algorithm: Its class.
        arguments: What it is built with.
    """
    return (
        issubclass(algorithm, OnPolicyAlgorithm)
        and algorithm.collect_rollouts is OnPolicyAlgorithm.collect_rollouts
        and not any(arguments.get(f"rollout_buffer_{what}") for what in ("class", "kwargs"))
    )


def on_tensors(algorithm: type[BaseAlgorithm]) -> type[BaseAlgorithm]:
    """The same algorithm, collecting tensors; see `TensorRollouts`.

    What its models save is what the algorithm's own models do, so that its `load` reads it.

    Args:
        algorithm: Its class, which can; see `can_collect_tensors`.
    """
    names = {"__module__": algorithm.__module__, "__doc__": algorithm.__doc__}
    return type(algorithm.__name__, (TensorRollouts, algorithm), names)
