"""The adapter to Stable-Baselines3: numpy on its side, tensors on the environment's."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from jaxtyping import Float
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn
from torch import Tensor

from mtkd_env import distributed
from mtkd_env.vector import SharedStudentEnv, StepOutcome, info_tensors

# What process 0 tells the others to do next.
STEP, RESET, REST, CLOSE = range(4)


class SB3VecEnv(VecEnv):
    """Lets any Stable-Baselines3 algorithm act in an `MTKDVectorEnv` or `TasksVectorEnv`.

    Actions reach the device, and observations and rewards leave it, in one transfer each a step.
    Under Stable-Baselines3's contract a terminated row needs no info, so by default one list of
    empty infos serves all steps; wrappers that read or keep infos need `full_infos`.

    `seed(s)` takes effect at the next `reset()` and starts a new student, as in Gymnasium; a
    `reset()` without it goes on with the student that is there. A model with a seed hands it on
    when it is built or loaded with an environment: to go on with a student, load the model without
    one, then call its `set_env`.

    Every step trains the student, so `evaluate_policy`, and with it `EvalCallback`, is refused:
    whatever it would measure is not the policy on the student that is there. `env.evaluate()`
    measures the student; `agents.callbacks.StudentEvaluation` does so after every epoch.

    Of several processes (see `mtkd_env.distributed`) only process 0 runs the algorithm. Its adapter
    shows the samples of all processes, which each act in a part of them; the others call `follow`.

    Args:
        env: The environment, as `gymnasium.make_vec` made it, without Gymnasium wrappers.
        full_infos: Whether every row gets an info of its own, with `terminal_observation`,
            `TimeLimit.truncated` and the sample's part of the environment's info.

    Raises:
        TypeError: `env` is neither an `MTKDVectorEnv` nor a `TasksVectorEnv`.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], *, full_infos: bool = False) -> None:
        if not isinstance(env, SharedStudentEnv):
            raise TypeError(
                "env: expected an MTKDVectorEnv or TasksVectorEnv without wrappers, got "
                f"{type(env).__name__}; use Stable-Baselines3's own wrappers around SB3VecEnv "
                "instead"
            )
        self.env = env
        self.full_infos = full_infos
        self._actions: np.ndarray | None = None
        samples = env.num_envs * distributed.processes()
        super().__init__(samples, env.single_observation_space, env.single_action_space)
        self._empty_infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]

    def reset(self) -> np.ndarray:
        """Observations (B, F); consumes the seed and the options that were set.

        Raises:
            RuntimeError: Called by `evaluate_policy`, or by a `learn` that would call it in a
                callback, before anything is trained.
        """
        if _caller(evaluate_policy) or _evaluates(
            _caller(BaseAlgorithm._setup_learn).get("callback")
        ):
            raise RuntimeError(
                "evaluate_policy and EvalCallback step the environment, and every step trains its "
                "student; use env.evaluate(), or the callback agents.callbacks.StudentEvaluation"
            )
        self._tell(RESET)
        observation = self._reset_together(self._seeds[0], self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        return self._numpy(observation)

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps the actions (B, 2·M) for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Observations (B, F), rewards (B,), dones (B,) and infos of the step.

        Raises:
            ValueError: Actions of another shape, before any process acts.
        """
        actions = torch.as_tensor(np.array(self._actions), dtype=torch.float32)
        expected = (self.num_envs, *self.action_space.shape)  # type: ignore[misc] # a Box has one
        if tuple(actions.shape) != expected:
            raise ValueError(f"actions: expected shape {expected}, got {tuple(actions.shape)}")
        self._tell(STEP)
        tensors, ended, infos = self._step_together(actions)
        # One transfer for both; on a CPU, and for a single process, nothing is copied any more.
        packed = tensors.cpu().numpy()
        own = self.num_envs // len(packed)
        observations = packed[:, :-own].reshape(self.num_envs, -1)
        observations = observations.astype(self.observation_space.dtype, copy=False)
        # Rewards of their own, since whoever keeps them would keep the observations with them.
        rewards = packed[:, -own:].flatten()
        return observations, rewards, np.full(self.num_envs, ended), infos

    def rest(self, pause: Callable[[], None]) -> None:
        """Lets every process do something between two steps; see `follow`."""
        self._tell(REST)
        pause()

    def follow(self, pause: Callable[[], None]) -> None:
        """In a process other than 0: does what process 0 does, until it closes.

        Args:
            pause: What to do when process 0 rests.
        """
        shape = self.num_envs, *self.action_space.shape  # type: ignore[misc] # a Box has one
        unheard = torch.tensor(CLOSE, device=self.env.device)
        while (command := int(distributed.broadcast(unheard))) != CLOSE:
            if command == STEP:
                self._step_together(torch.zeros(shape))
            elif command == RESET:
                self._reset_together(None, None)
            else:
                pause()

    def close(self) -> None:
        """Closes the environment; other processes then stop to follow."""
        self._tell(CLOSE)
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute of the shared environment, once for each index."""
        return [getattr(self.env, attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets an attribute of the shared environment; `indices` must be all or None.

        Raises:
            ValueError: Only some of the sub-environments were named.
        """
        if len(self._rows(indices)) != self.num_envs:
            raise ValueError("indices: the sub-environments share one student; name all or none")
        setattr(self.env, attr_name, value)

    def env_method(
        self,
        method_name: str,
        *method_args: Any,
        indices: VecEnvIndices = None,
        **method_kwargs: Any,
    ) -> list[Any]:
        """Calls a method of the shared environment once; its result for each index."""
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [result] * len(self._rows(indices))

    def env_is_wrapped(
        self,
        wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]],
        indices: VecEnvIndices = None,
    ) -> list[bool]:
        """False: sub-environments are samples of one batch and cannot be wrapped alone."""
        del wrapper_class
        return [False] * len(self._rows(indices))

    def get_images(self) -> Sequence[np.ndarray | None]:
        """A picture of each sample, if the environment has a `render_mode`; of a single process."""
        frames = None if distributed.active() else self.env.render()
        return [None] * self.num_envs if frames is None else frames

    def _tell(self, command: int) -> None:
        """Says what comes next to the processes that follow."""
        if distributed.active() and distributed.rank() == 0:
            distributed.broadcast(torch.tensor(command, device=self.env.device))

    def _reset_together(self, seed: int | None, options: dict[str, Any] | None) -> Tensor:
        seed, options = distributed.agree((seed, options))
        self.env.reset(seed=seed, options=options)
        return distributed.gather(self.env.observation)

    def _step_together(
        self, actions: Float[Tensor, "N A"]
    ) -> tuple[Float[Tensor, "P K"], bool, list[dict[str, Any]]]:
        """One step of all processes under the actions of process 0.

        Returns:
            Observations of the next batch, then rewards, of each of the P processes; whether the
            episodes ended; and the infos.
        """
        if distributed.active():
            actions = distributed.broadcast(actions.to(self.env.device))
        # Actions on the host stay there until they were checked: no answer has to come back.
        outcome = self.env.advance(distributed.local_part(actions))
        parts = outcome.observation.float().flatten(), outcome.record.rewards.scalar
        packed = distributed.gather(torch.cat(parts).unsqueeze(0))
        return packed, outcome.terminated or outcome.truncated, self._infos(outcome)

    def _rows(self, indices: VecEnvIndices) -> list[int]:
        return list(self._get_indices(indices))

    def _infos(self, outcome: StepOutcome) -> list[dict[str, Any]]:
        final = outcome.final_observation if self.full_infos or outcome.truncated else None
        if final is None and not self.full_infos:
            return self._empty_infos
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if self.full_infos:
            for name, tensor in info_tensors(outcome.record).items():
                _fill(infos, name, self._numpy(distributed.gather(tensor)))
        if final is not None:
            _fill(infos, "terminal_observation", self._numpy(distributed.gather(final)))
            _fill(infos, "TimeLimit.truncated", [outcome.truncated] * self.num_envs)
        return infos

    @staticmethod
    def _numpy(tensor: Tensor) -> np.ndarray:
        """A copy on the host that no later step writes into."""
        return np.array(tensor.detach().cpu().numpy())


def _fill(infos: list[dict[str, Any]], key: str, values: Iterable[Any]) -> None:
    for info, value in zip(infos, values, strict=True):
        info[key] = value


def _caller(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables of a function if it is among the callers; else nothing.

    `evaluate_policy` resets what it steps, through any wrappers, and announces itself by nothing
    else: it asks `env_is_wrapped` only where there is no `VecMonitor`, which asks the same on its
    own. An algorithm that begins to learn resets before it looks at its callbacks.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return {} if frame is None else frame.f_locals


def _evaluates(callback: Any) -> bool:
    """Whether a callback, or one within it, evaluates a policy in an `SB3VecEnv`."""
    if isinstance(callback, EvalCallback):
        return isinstance(callback.eval_env.unwrapped, SB3VecEnv)
    several = callback if isinstance(callback, list) else getattr(callback, "callbacks", [])
    one = getattr(callback, "callback", None)
    return any(map(_evaluates, several)) or (one is not None and _evaluates(one))
