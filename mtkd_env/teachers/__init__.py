"""Frozen teachers: how they are made, kept, and asked about a batch all at once."""

from mtkd_env.teachers.ensemble import TeacherEnsemble, class_means
from mtkd_env.teachers.pool import (
    PoolSpec,
    TeacherPool,
    TeacherSpec,
    build_pool,
    load_pool_spec,
)
from mtkd_env.teachers.prefetch import check_prefetch
from mtkd_env.teachers.preparation import prepare_teachers
from mtkd_env.teachers.quantization import (
    INT8,
    TEACHER_PRECISIONS,
    Fidelity,
    Note,
    check_teacher_precision,
)
from mtkd_env.teachers.store import StoreSpec
from mtkd_env.teachers.training import TrainingSet

__all__ = [
    "INT8",
    "TEACHER_PRECISIONS",
    "Fidelity",
    "Note",
    "PoolSpec",
    "StoreSpec",
    "TeacherEnsemble",
    "TeacherPool",
    "TeacherSpec",
    "TrainingSet",
    "build_pool",
    "check_prefetch",
    "check_teacher_precision",
    "class_means",
    "load_pool_spec",
    "prepare_teachers",
]
