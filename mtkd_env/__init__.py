"""Multi-teacher knowledge distillation as a vectorized Gymnasium environment.

Importing the package registers an environment of every dataset for `gymnasium.make_vec`, such as
`MTKD/Digits-v0`, and `MTKD/Tasks-v0`. From the top down:

- `tasks.py`: an environment of one task after the other; `task_list.py` reads and draws them.
- `registration.py` assembles an environment from options; `testing.py` checks anybody's.
- `env.py`: the environment; `vector.py`: what Gymnasium asks of it; `rendering.py` draws it;
  `observation.py`, `action.py`, `reward.py`, `worth.py`: its sides; `wrappers`: adapters;
  `weighting`: the classical methods, which need no agent; `shared_policy.py`, `agent_file.py`: what
  agents learn, and its files.
- `distiller.py`: the student and its step; `terms.py` and `losses.py`: Equ. 2; `evaluation.py`;
  `reference.py`: images beside the batches; `student.py`: a trained student that stands alone.
- `teachers`: pools, their training, what is kept of them; `networks`; `data`; `optimization.py`.
- `keeping`: what lets any training, here or in `experiments`, be stopped and gone on with.
- `computing.py`, `precision.py`, `compilation.py`, `inference.py`, `distributed.py`: where and how.
- `types.py`, `options.py`, `seeding.py`, `files.py`, `file_kinds.py`, `imports.py`, `errors.py`:
  values between rooms, options, random numbers, files, `module:Name`, and what users are told.
"""

from typing import TYPE_CHECKING, Any

from mtkd_env.computing import Computing
from mtkd_env.data import DATASETS, DataSpec
from mtkd_env.distiller import Distiller
from mtkd_env.env import EnvSpec, MTKDVectorEnv
from mtkd_env.errors import ConfigError
from mtkd_env.evaluation import Evaluation
from mtkd_env.networks import NETWORKS, StudentSpec
from mtkd_env.observation import OBSERVATIONS
from mtkd_env.optimization import Recipe
from mtkd_env.registration import Assembly, assemble, make_env, register_envs
from mtkd_env.reward import REWARDS
from mtkd_env.student import Student, StudentDescription, load_student
from mtkd_env.task_list import Task, TaskList
from mtkd_env.tasks import TasksVectorEnv, make_tasks_env
from mtkd_env.teachers import PoolSpec, StoreSpec, TeacherEnsemble, TeacherSpec
from mtkd_env.terms import Distillation
from mtkd_env.types import Batch, DistillState, LossTerms, NetworkOutput, TeacherWeights
from mtkd_env.vector import StepRecord
from mtkd_env.weighting import WEIGHTINGS

if TYPE_CHECKING:
    from mtkd_env.wrappers.sb3 import SB3VecEnv

__all__ = [
    "DATASETS",
    "NETWORKS",
    "OBSERVATIONS",
    "REWARDS",
    "WEIGHTINGS",
    "Assembly",
    "Batch",
    "Computing",
    "ConfigError",
    "DataSpec",
    "DistillState",
    "Distillation",
    "Distiller",
    "EnvSpec",
    "Evaluation",
    "LossTerms",
    "MTKDVectorEnv",
    "NetworkOutput",
    "PoolSpec",
    "Recipe",
    "SB3VecEnv",
    "StepRecord",
    "StoreSpec",
    "Student",
    "StudentDescription",
    "StudentSpec",
    "Task",
    "TaskList",
    "TasksVectorEnv",
    "TeacherEnsemble",
    "TeacherSpec",
    "TeacherWeights",
    "assemble",
    "load_student",
    "make_env",
    "make_tasks_env",
]

__version__ = "0.1.0"

register_envs()


def __getattr__(name: str) -> Any:
    """`SB3VecEnv`, with which comes Stable-Baselines3, which not everybody needs."""
    if name == "SB3VecEnv":
        from mtkd_env.wrappers.sb3 import SB3VecEnv

        return SB3VecEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
