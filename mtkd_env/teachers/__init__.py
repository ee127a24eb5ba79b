"""Frozen teachers: how they are made, kept, and asked about a batch all at once."""

from mtkd_env.teachers.ensemble import TeacherEnsemble, class_means
from mtkd_env.teachers.pool import (
    PoolSpec,
    TeacherPool,
    TeacherSpec,
    build_pool,
    load_pool_spec,
)
from mtkd_env.teachers.preparation import Progress, prepare_teachers
from mtkd_env.teachers.quantization import (
    Fidelity,
    Note,
    check_teacher_precision,
)
from mtkd_env.teachers.store import StoreSpec
from mtkd_env.teachers.training import TrainingSet

__all__ = [
    "Fidelity",
    "Note",
    "PoolSpec",
    "Progress",
    "StoreSpec",
    "TeacherEnsemble",
    "TeacherPool",
    "TeacherSpec",
    "TrainingSet",
    "build_pool",
    "check_teacher_precision",
    "class_means",
    "load_pool_spec",
    "prepare_teachers",
]
