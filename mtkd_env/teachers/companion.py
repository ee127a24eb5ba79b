"""How a stream's batches come by the teachers' outputs: kept, computed ahead, or not at all."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtkd_env.data.stream import BatchStream, Companion
from mtkd_env.data.views import MemoryViews, ViewSet
from mtkd_env.errors import ConfigError
from mtkd_env.teachers.ahead import TeachersAhead, batches_ahead
from mtkd_env.teachers.pool import TeacherPool
from mtkd_env.teachers.store import StoredTeachers, StoreSpec, TeacherStore, store_folder
from mtkd_env.teachers.training import TrainingSet


def check_ahead(ahead: int | None) -> None:
    """Checks a number of batches that the teachers look at together.

    Raises:
        ConfigError: It is below 1.
    """
    if ahead is not None and ahead < 1:
        raise ConfigError(f"ahead: expected at least 1, got {ahead}")


def make_companion(
    pool: TeacherPool,
    stream: BatchStream,
    images: TrainingSet,
    spec: StoreSpec,
    *,
    ahead: int | None,
    cache: Path,
) -> Companion | None:
    """What lets the batches of a stream bring the teachers' outputs along.

    Args:
        pool: The teachers.
        stream: The stream.
        images: What it was made from.
        spec: Whether outputs are kept, and where.
        ahead: Batches that the teachers look at together; None for what suits the device.
        cache: Folder of stores on disk.

    Returns:
        Nothing if the teachers are to be asked when their outputs are needed.

    Raises:
        ConfigError: The store cannot be as large as it would have to be.
    """
    teachers = pool.ensemble
    device = next(teachers.parameters()).device
    together = batches_ahead(ahead, stream.local_batch_size, device)
    if not spec:
        return TeachersAhead(teachers, together) if together > 1 else None
    assert isinstance(stream.views, MemoryViews)
    about = _about(pool, images, stream.views.view_set, spec)
    store = TeacherStore(
        teachers,
        stream.views,
        spec,
        batch_size=together * stream.local_batch_size,
        folder=store_folder(cache, about) if spec.place == "disk" else None,
    )
    return StoredTeachers(store)


def _about(
    pool: TeacherPool, images: TrainingSet, view_set: ViewSet, spec: StoreSpec
) -> Mapping[str, Any]:
    """All that the outputs of a store depend on, but rounding."""
    index = images.splits.train.index.numpy().tobytes()
    return {
        "teachers": list(pool.digests.values()),
        "precision": pool.ensemble.precision,
        "data": images.data.digest,
        "train_images": hashlib.sha256(index).hexdigest(),
        # How many are seen in turn does not count: the first ones are always the same.
        "views": "all" if view_set.count is None else view_set.seed,
        "dtype": spec.dtype,
    }
