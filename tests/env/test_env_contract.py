"""The contract accepts what is right, whoever wrote it, and rejects what is wrong."""

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from mtkd_env.data import BatchStream
from mtkd_env.distiller import Distiller
from mtkd_env.env import MTKDVectorEnv
from mtkd_env.optimization import Recipe
from mtkd_env.terms import Distillation
from mtkd_env.testing import (
    GYMNASIUM_CHECKS,
    STEP_CHECKS,
    Check,
    MakeEnv,
    a_seed_reproduces_everything_that_follows,
    check_env,
    episodes_end_as_the_autoreset_mode_says,
    random_action,
    returned_arrays_are_fresh,
    returned_values_lie_in_the_spaces,
)
from mtkd_env.types import Batch
from tiny import (
    IMAGE_SHAPE,
    NUM_ENVS,
    STEPS_PER_EPOCH,
    TinyNetwork,
    make_tiny_env,
    stream,
    teachers,
)

STEPS = 2 * STEPS_PER_EPOCH + 1


class Still(Distiller):
    """A student that stands still: learning rate 0, and batch norms that do not look at a batch."""

    def __init__(self) -> None:
        super().__init__(
            TinyNetwork,
            teachers(),
            image_shape=IMAGE_SHAPE,
            steps_per_epoch=STEPS_PER_EPOCH,
            distillation=Distillation(),
            recipe=Recipe(epochs=4, lr=0.0),
        )

    def reinitialize(self, seed: int) -> None:
        super().reinitialize(seed)
        self.module.eval()


class Row(BatchStream):
    """One sample of every batch of a stream."""

    def __init__(self, whole: BatchStream, row: int) -> None:
        self.batch_size = self.local_batch_size = 1
        self.steps_per_epoch = whole.steps_per_epoch
        self._whole = whole
        self._row = slice(row, row + 1)

    def __next__(self) -> Batch:
        batch = next(self._whole)
        return Batch(batch.inputs[self._row], batch.targets[self._row], batch.index[self._row])

    def reseed(self, seed: int) -> None:
        self._whole.reseed(seed)

    def state_dict(self) -> dict[str, Any]:
        return self._whole.state_dict()


class Sample(gymnasium.Env[np.ndarray, np.ndarray]):
    """One sample of the tiny environment as an environment of its own."""

    def __init__(self, row: int, **kwargs: Any) -> None:
        self._env = still_env(batches=Row(stream(), row), **kwargs)
        self.observation_space = self._env.single_observation_space
        self.action_space = self._env.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        observation, _ = self._env.reset(seed=seed, options=options)
        return observation[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self._env.step(action[None])
        # The last observation of the episode; `reset` gives the next one.
        last = info.get("final_obs", observation)[0]
        return last, float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}


def still_env(**kwargs: Any) -> MTKDVectorEnv:
    return make_tiny_env(distiller=Still(), normalize_observation=False, **kwargs)


def samples(**kwargs: Any) -> SyncVectorEnv:
    makers = [partial(Sample, row, **kwargs) for row in range(NUM_ENVS)]
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)


def cartpole(maker: Callable[..., CartPoleVectorEnv] = CartPoleVectorEnv) -> CartPoleVectorEnv:
    return maker(num_envs=3, max_episode_steps=8)


def many_cartpoles(mode: AutoresetMode) -> SyncVectorEnv:
    make = partial(gymnasium.make, "CartPole-v1", max_episode_steps=8)
    return SyncVectorEnv([make] * 3, autoreset_mode=mode)


CORRECT: dict[str, MakeEnv] = {
    "single samples": samples,
    "single samples in epochs": partial(samples, episode="epoch"),
    "Gymnasium's vector environment": cartpole,
    "Gymnasium's environments": partial(many_cartpoles, AutoresetMode.NEXT_STEP),
    "Gymnasium's environments within a step": partial(many_cartpoles, AutoresetMode.SAME_STEP),
}


@pytest.mark.parametrize("name", CORRECT)
@pytest.mark.parametrize(
    "check", [*STEP_CHECKS, *GYMNASIUM_CHECKS], ids=lambda check: check.__name__
)
def test_what_is_right_is_accepted(check: Check, name: str) -> None:
    check(CORRECT[name])


# A student that stands still makes the samples independent of each other.


@pytest.mark.parametrize("episode", ["batch", "epoch"])
@pytest.mark.parametrize("reward", ["paper", "alignment"])
def test_a_batch_is_its_samples_one_by_one(reward: str, episode: str) -> None:
    together, single = (
        still_env(reward=reward, episode=episode),
        samples(reward=reward, episode=episode),
    )
    assert together.single_observation_space == single.single_observation_space
    expected, _ = together.reset(seed=5)
    found, _ = single.reset(seed=[5] * NUM_ENVS)
    assert_close(found, expected)
    for step in range(STEPS):
        action = random_action(together, step)
        *expected_arrays, expected_info = together.step(action)
        *found_arrays, found_info = single.step(action)
        for one, all_ in zip(found_arrays, expected_arrays, strict=True):
            assert_close(one, all_)
        assert ("final_obs" in found_info) == ("final_obs" in expected_info)
        if "final_obs" in found_info:
            assert_close(np.stack(found_info["final_obs"]), expected_info["final_obs"])


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    torch.testing.assert_close(as_tensor(found), as_tensor(expected), atol=1e-5, rtol=1e-5)


def as_tensor(array: np.ndarray) -> Tensor:
    return torch.as_tensor(array).double()


# Wrong ones.


class Reusing(CartPoleVectorEnv):
    """Writes every observation into the same array."""

    def step(self, action: Any) -> Any:
        observation, *others = super().step(action)
        if not hasattr(self, "_kept"):
            self._kept = observation
        self._kept[:] = observation
        return self._kept, *others


class Forgetful(CartPoleVectorEnv):
    """Takes a seed and does not use it."""

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        if seed is not None and not hasattr(self, "_seeded"):
            self._seeded = True
            return super().reset(seed=seed, options=options)
        return super().reset(options=options)


class Misdeclared(CartPoleVectorEnv):
    """Says that the next episode begins within the step, and lets it begin in the next."""

    metadata = {**CartPoleVectorEnv.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 - Gymnasium's own declaration


class Widened(CartPoleVectorEnv):
    """Gives observations of another precision than its space has."""

    def step(self, action: Any) -> Any:
        observation, *others = super().step(action)
        return observation.astype(np.float64), *others


class Endless(CartPoleVectorEnv):
    """Tells of no end."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated & False, truncated & False, info


WRONG: dict[type[CartPoleVectorEnv], tuple[Check, str]] = {
    Reusing: (returned_arrays_are_fresh, "two steps share memory of their observations"),
    Forgetful: (a_seed_reproduces_everything_that_follows, r"reset\(seed=7\) and two steps\[0\]: "),
    Misdeclared: (episodes_end_as_the_autoreset_mode_says, "info: final_obs: wanted where"),
    Widened: (returned_values_lie_in_the_spaces, "observation: float64 is not float32"),
    Endless: (episodes_end_as_the_autoreset_mode_says, "no episode ended within 40 steps"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_rejected(wrong: type[CartPoleVectorEnv]) -> None:
    check, message = WRONG[wrong]
    with pytest.raises(AssertionError, match=message):
        check(partial(cartpole, wrong))


def test_whoever_checks_an_environment_is_told_which_check_failed() -> None:
    check_env(cartpole)
    with pytest.raises(AssertionError) as failed:
        check_env(partial(cartpole, Endless))
    (note,) = failed.value.__notes__
    assert note.startswith("episodes_end_as_the_autoreset_mode_says: What ends is followed by")
