"""Teachers ready for a student: trained, in the precision and form of a run, their outputs kept."""

from dataclasses import replace
from pathlib import Path

import torch

from mtkd_env.data.stream import BatchStream
from mtkd_env.precision import FULL
from mtkd_env.teachers.ahead import batches_ahead
from mtkd_env.teachers.companion import make_companion
from mtkd_env.teachers.forms import Note
from mtkd_env.teachers.pool import PoolProgress, PoolSpec, TeacherPool, build_pool
from mtkd_env.teachers.quantization import INT8, Fidelity, quantize_teachers
from mtkd_env.teachers.store import StoreSpec
from mtkd_env.teachers.training import TrainingSet

# Enough training images for steady scales of int8 teachers, and how many are looked at together.
CALIBRATION_IMAGES, CALIBRATION_BATCH = 256, 64


def prepare_teachers(
    spec: PoolSpec,
    images: TrainingSet,
    stream: BatchStream,
    *,
    val_fraction: float,
    store: StoreSpec,
    precision: str,
    compile: str,
    ahead: int | None,
    device: str,
    cache: Path,
    progress: PoolProgress | None,
    note: Note,
) -> tuple[TeacherPool, dict[str, Fidelity]]:
    """The teachers of a spec; the batches of the stream bring what is known of their outputs.

    Args:
        spec: The teachers; those that were never trained before are trained now and kept.
        images: What they are trained, calibrated and evaluated on.
        stream: The student's batches.
        val_fraction: Share of the training images that `images` holds out.
        store: Whether their outputs are kept, and where.
        precision: What they compute in.
        compile: `auto` takes the fastest exact form of each.
        ahead: Batches that they look at together; None for what suits the device.
        device: Where they compute.
        cache: Folder of trained teachers, of measured forms and of stores on disk.
        progress: Called while one is being trained.
        note: Called with a line about each that is compiled or in int8.

    Returns:
        The pool, and how near each int8 teacher is to what it was in float32.

    Raises:
        ConfigError: A teacher or a store that cannot be.
    """
    trained_in = FULL if precision == INT8 else precision
    pool = build_pool(
        spec, images, device=device, cache=cache, precision=trained_in, progress=progress
    )
    fidelities = _quantize(pool, images, val_fraction, note) if precision == INT8 else {}
    # The results of int8 teachers are not those of what they were made from.
    found = {name: fidelity.evaluation for name, fidelity in fidelities.items()}
    pool = replace(pool, evaluations=pool.evaluations | found)
    if compile == "auto":
        _fit(pool, stream, images.data.image_shape, ahead=ahead, cache=cache, note=note)
    stream.companion = make_companion(pool, stream, images, store, ahead=ahead, cache=cache)
    return pool, fidelities


def _quantize(
    pool: TeacherPool, images: TrainingSet, val_fraction: float, note: Note
) -> dict[str, Fidelity]:
    """Lets the teachers compute in int8, at scales of a few images of every class."""
    data, count = images.data, min(CALIBRATION_IMAGES, len(images.splits.train))
    few = data.split(val_fraction, train_size=count).train
    return quantize_teachers(
        pool.ensemble,
        data.evaluation_batches(few, CALIBRATION_BATCH, device="cpu"),
        images.evaluation_batches(images.splits.test, "cpu"),
        note=note,
    )


def _fit(
    pool: TeacherPool,
    stream: BatchStream,
    image_shape: tuple[int, int, int],
    *,
    ahead: int | None,
    cache: Path,
    note: Note,
) -> None:
    """Takes the teachers' fastest exact forms for the batches that they will be asked about."""
    device = next(pool.ensemble.parameters()).device
    count = stream.local_batch_size * batches_ahead(ahead, stream.local_batch_size, device)
    images = torch.randn(count, *image_shape, generator=torch.Generator().manual_seed(0))
    pool.ensemble.fit(images.to(device), cache=cache, note=note)
