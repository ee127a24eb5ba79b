"""Augmented random search on batches: every candidate acts on its share of the samples."""

from copy import deepcopy
from typing import Any

import numpy as np
import sb3_contrib
import torch
from sb3_contrib.common.vec_env.async_eval import AsyncEval
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

__all__ = ["ARS"]


class ARS(sb3_contrib.ARS):
    """sb3-contrib's ARS, its candidates judged by the rewards of one batch.

    The library's own judges each of its 2 `n_delta` perturbed policies by episodes of its own and
    calls this evaluation. Here every step is one of the student's, so all candidates act together
    in each: candidate c on the samples c, c + 2 `n_delta`, ..., by whose mean reward it is judged.
    A step is one update of the policy, whatever the scope of the episodes.

    Raises:
        ValueError: A batch has fewer samples than there are candidates, or `n_eval_episodes` or
            `alive_bonus_offset` is given: candidates are not judged by episodes.
    """

    def _setup_model(self) -> None:
        samples = self.n_envs
        if self.pop_size > samples:
            raise ValueError(
                f"n_delta: {self.n_delta} makes {self.pop_size} candidates, which need as many "
                f"samples in a batch, got {samples}"
            )
        if self.n_eval_episodes != 1 or self.alive_bonus_offset != 0:
            raise ValueError(
                "n_eval_episodes, alive_bonus_offset: have no effect here; candidates are judged "
                "by the rewards of one batch"
            )
        super()._setup_model()

    def _do_one_update(self, callback: BaseCallback, async_eval: AsyncEval | None) -> None:
        """One update; a rollout begins before its candidates are drawn, as nothing else has."""
        callback.on_rollout_start()
        super()._do_one_update(callback, async_eval)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """Counts from the first call of `learn`; the library's counts a later call's as all."""
        del total_timesteps
        super()._update_current_progress_remaining(num_timesteps, self._total_timesteps)

    def evaluate_candidates(
        self, candidate_weights: Tensor, callback: BaseCallback, async_eval: AsyncEval | None
    ) -> Tensor:
        """The mean reward of every candidate in one step of the environment.

        Args:
            candidate_weights: Weights of all candidates, one row each.
            callback: Called once, after the step.
            async_eval: Not supported: there is one student.
        """
        del async_eval
        assert self.env is not None
        observations, rewards, _, _ = self.env.step(self._actions(candidate_weights))
        assert isinstance(observations, np.ndarray)
        self._last_obs = observations
        self.num_timesteps += self.env.num_envs
        callback.on_step()
        callback.on_rollout_end()
        earned = torch.as_tensor(rewards, device=self.device)
        owner = torch.arange(len(earned), device=self.device) % self.pop_size
        sums = torch.zeros(self.pop_size, device=self.device).index_add(0, owner, earned)
        return sums / torch.bincount(owner, minlength=self.pop_size)

    def _actions(self, candidate_weights: Tensor) -> np.ndarray[Any, Any]:
        """Each candidate's actions for its samples."""
        observations: Any = self._last_obs
        policy = deepcopy(self.policy)
        actions = np.empty((len(observations), *self.action_space.shape), np.float32)  # type: ignore[misc] # a Box has a shape
        for row, weights in enumerate(candidate_weights):
            policy.load_from_vector(weights.cpu().numpy())
            share = slice(row, None, self.pop_size)
            actions[share], _ = policy.predict(observations[share], deterministic=True)
        return actions
