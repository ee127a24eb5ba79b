"""Frozen teachers: how they are made, kept, and asked about a batch all at once.

- `pool.py`: a pool from its description, each teacher by `training.py` or a file (`weights.py`);
  `parts.py`: the images that it was raised on; `inputs.py`: what it sees of the student's.
- `ensemble.py`: all of them behind one call; `store.py`: what they said before;
  `quantization.py`: in int8.
- `preparation.py`: all of that, for a student, and about several batches at once.
"""

from mtkd_env.teachers.ensemble import TeacherEnsemble, class_means
from mtkd_env.teachers.pool import PoolSpec, TeacherPool, TeacherSpec, build_pool, load_pool_spec
from mtkd_env.teachers.store import StoreSpec
from mtkd_env.teachers.training import TrainingSet

__all__ = [
    "PoolSpec",
    "StoreSpec",
    "TeacherEnsemble",
    "TeacherPool",
    "TeacherSpec",
    "TrainingSet",
    "build_pool",
    "class_means",
    "load_pool_spec",
]
