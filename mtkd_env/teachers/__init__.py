"""Frozen teachers: how they are made, kept, and asked about a batch all at once."""

from mtkd_env.teachers.ensemble import TeacherEnsemble, class_means
from mtkd_env.teachers.pool import (
    PoolSpec,
    TeacherPool,
    TeacherSpec,
    build_pool,
    load_pool_spec,
)
from mtkd_env.teachers.training import TrainingSet

__all__ = [
    "PoolSpec",
    "TeacherEnsemble",
    "TeacherPool",
    "TeacherSpec",
    "TrainingSet",
    "build_pool",
    "class_means",
    "load_pool_spec",
]
