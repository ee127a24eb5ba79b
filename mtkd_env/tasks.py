"""One environment after the other, a task and a student each, behind spaces that fit them all."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from mtkd_env.env import MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.evaluation import Evaluation
from mtkd_env.inference import as_under_no_grad
from mtkd_env.observation import RelativeObserver
from mtkd_env.registration import Quiet, warn_of_one
from mtkd_env.seeding import derive_seed
from mtkd_env.task_list import HELD_OUT, TRAINING, Task, TaskFamily, TaskList
from mtkd_env.teachers.preparation import Progress
from mtkd_env.types import map_tensors
from mtkd_env.vector import SharedStudentEnv, StepOutcome, StepRecord


class TasksVectorEnv(SharedStudentEnv):
    """A student of one task after the other; the agent weights the teachers of every sample.

    ## Description
    Each student has a task: teachers, images, network and loss of its own, drawn from a list
    (`TaskList`): a pass through all of it in a random order, then another. What a step does, is
    said by `MTKDVectorEnv`, of which there is one for every task. A policy that is to get along
    with all of them sees the observation `relative`, which means the same in all.

    ## Action Space
    `Box(-logit_bound, logit_bound, (2·M,), float32)` per sample, M the largest number of teachers
    of any task: logits of the logit-term weights, then those of the feature-term weights. Where a
    task has fewer teachers, logits of the others mean nothing, and their weights are exactly 0.

    ## Observation Space
    `Box(-inf, inf, (M·(K+1),), float32)` per sample: the K + 1 numbers of every teacher, the last
    of which is 1; K + 1 zeros for each teacher that is not there. See `RelativeObserver`.

    ## Rewards
    Those of `MTKDVectorEnv`.

    ## Starting State
    `reset(seed=s)` starts anew with the first task, and reproduces everything that follows.
    `reset()` goes on with the student that is there; `reset(options={"reinit": True})` draws the
    next task.

    ## Episode End
    As in `MTKDVectorEnv`. When a student's schedule has ended, the next task follows within the
    same step, whatever the scope of episodes is.

    ## Information
    As in `MTKDVectorEnv`, with zeros for teachers that are not there, and:

    | Key    | Shape | Meaning                                          |
    |--------|-------|--------------------------------------------------|
    | `task` | B     | name of the task of this step, an array of texts |

    ## Arguments
    `gymnasium.make_vec("MTKD/Tasks-v0", tasks="tasks.yaml", num_envs=64)`; `tasks` may also be what
    such a file holds. Further keywords are fields of `Computing`, such as `device="cpu"`.

    ## Autoreset
    `AutoresetMode.SAME_STEP`.

    ## Version History
    * v0: initial version.

    Args:
        tasks: The tasks.
        held_out: Whether those that are held out are drawn, in place of those to learn from.
        progress: What is told of teachers in training; by default notes are logged.

    Attributes:
        task: The task of the student that is there.
        options: What the environments of all tasks have in common.

    Raises:
        ConfigError: There is no task of the kind.
    """

    def __init__(
        self, tasks: TaskList, *, held_out: bool = False, progress: Progress | None = None
    ) -> None:
        families = tasks.held_out if held_out else tasks.training
        if not families:
            raise ConfigError(f"{HELD_OUT if held_out else TRAINING}: expected at least one task")
        self.most_teachers = tasks.most_teachers
        self.options = tasks.options
        self.device = tasks.computing.place()
        self._families: Mapping[str, TaskFamily] = {family.name: family for family in families}
        self._progress = progress or Quiet()
        self.steps = 0
        width = self.most_teachers * RelativeObserver.features_per_teacher
        self.set_spaces(tasks.num_envs, width, self.most_teachers)
        self.begin(0)

    def begin(self, seed: int) -> None:
        """Starts anew with the first task of a seed, which is made when it is first needed."""
        self._random = np.random.default_rng(derive_seed(seed, "tasks"))
        self._queue: list[str] = []
        self.reinit()

    def reinit(self) -> None:
        """Draws the next task, with a new student."""
        if not self._queue:
            self._queue = list(self._random.permutation(list(self._families)).tolist())
        family = self._families[self._queue.pop(0)]
        self._hold(family.draw(self._random), int(self._random.integers(2**31)))

    def _hold(self, task: Task, seed: int) -> None:
        self.task = task
        self._student_seed = seed
        self._env: MTKDVectorEnv | None = None
        self.steps = 0

    @property
    def env(self) -> MTKDVectorEnv:
        """The environment of the task that is there, for agents that act in one after the other.

        Raises:
            ConfigError: It cannot be made; names the task.
        """
        if self._env is None:
            env = self.task.make(self._progress)
            env.reset(seed=self._student_seed)
            env.subscribe(self._tell)
            self._env, self.splits = env, env.splits
        return self._env

    def _tell(self, record: StepRecord) -> None:
        self.steps = record.step + 1
        super()._tell(record)

    @property
    def steps_per_epoch(self) -> int:
        """SGD steps of one epoch of the student that is there."""
        return self.env.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether the schedule of the student that is there has ended."""
        return self.steps >= self.env.steps_in_training

    @property
    def observation(self) -> Float[Tensor, "B F"]:
        """The observation of the batch that waits, with zeros for teachers that are not there."""
        self.check_ready()
        return self._widened(self.env.observation)

    def _widened(self, observation: Float[Tensor, "B F"]) -> Float[Tensor, "B W"]:
        width = self.single_observation_space.shape[0]  # type: ignore[index] # a Box has one
        return pad(observation, (0, width - observation.shape[1]))

    def go_on(self) -> None:
        """Draws the next task if the student is finished, where a step could not do so any more."""
        if self._env is not None and self.finished:
            self.reinit()

    def evaluate(self, split: str = "test") -> Evaluation:
        """The accuracy and cross-entropy of the student that is there."""
        return self.env.evaluate(split)

    def narrowed(self, actions: Float[Tensor, "B A"]) -> Float[Tensor, "B N"]:
        """Logits (B, 2·M) of the teachers that are there."""
        there = len(self.env.teacher_names)
        return actions.unflatten(1, (2, self.most_teachers))[..., :there].flatten(1)

    @as_under_no_grad
    def advance(self, actions: Any) -> StepOutcome:
        """`step` with tensors on the device and flags on the host; for adapters."""
        self.check_ready()
        env = self.env
        outcome = env.advance(self.narrowed(self.checked(actions)))
        final = outcome.final_observation
        widened = replace(
            outcome,
            record=widened_record(outcome.record, self.most_teachers),
            final_observation=None if final is None else self._widened(final),
        )
        self._acted = self.task.name
        if self.finished:
            self.reinit()
        return replace(widened, observation=self.observation)

    def info_of(self, record: StepRecord) -> dict[str, Any]:
        """What `info` says of every step, with a leading axis B."""
        return {**super().info_of(record), "task": np.full(self.num_envs, self._acted)}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest depends on, for a checkpoint between two steps."""
        return {
            "task": {"name": self.task.name, "arguments": dict(self.task.arguments)},
            "seed": self._student_seed,
            "queue": list(self._queue),
            "random": self._random.bit_generator.state,
            "own": self.np_random.bit_generator.state,
            "steps": self.steps,
            "env": self.env.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._queue = list(state["queue"])
        self._random.bit_generator.state = state["random"]
        self.np_random.bit_generator.state = state["own"]
        self._hold(Task(**state["task"]), state["seed"])
        self.env.load_state_dict(state["env"])
        self.steps = state["steps"]


def widened_record(record: StepRecord, teachers: int) -> StepRecord:
    """A step's record with so many teachers: those that were not there weigh and earn 0."""
    missing = teachers - record.weights.logit.shape[1]

    def wide(values: Tensor) -> Tensor:
        """With zeros, where there is a number for each teacher."""
        return pad(values, (0, missing)) if values.ndim == 2 else values

    return map_tensors(wide, record.whole())


def make_tasks_env(
    *,
    tasks: str | Path | Mapping[str, Any] | TaskList,
    num_envs: int | None = None,
    max_episode_steps: int | None = None,
    held_out: bool = False,
    progress: Progress | None = None,
    **computing: Any,
) -> TasksVectorEnv:
    """The environment behind `MTKD/Tasks-v0`.

    Args:
        tasks: A YAML file of tasks, what it holds, or tasks that were read.
        num_envs: B, in place of the batch size of the data.
        max_episode_steps: Not supported: `base.env.episode` decides where episodes end.
        held_out: Whether the tasks are those that are held out.
        progress: What is told of teachers in training.
        computing: Fields of `Computing`, over what the file says.

    Raises:
        ConfigError: Any argument that cannot be used; names it.
    """
    if max_episode_steps is not None:
        raise ConfigError("max_episode_steps: not supported; set base.env.episode of the tasks")
    if not isinstance(tasks, TaskList):
        warn_of_one(num_envs)
        tasks = TaskList(tasks, num_envs, computing)
    return TasksVectorEnv(tasks, held_out=held_out, progress=progress)
