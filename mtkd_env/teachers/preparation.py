"""Teachers ready for a student: trained, in the precision of a run, their outputs kept."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch

from mtkd_env.compilation import NONE
from mtkd_env.computing import Computing
from mtkd_env.data.stream import BatchStream, EpochPlan
from mtkd_env.data.views import ViewSet
from mtkd_env.files import cache_folder
from mtkd_env.networks import has_weights
from mtkd_env.precision import FULL, INT8
from mtkd_env.teachers.ensemble import TeacherEnsemble
from mtkd_env.teachers.pool import PoolSpec, TeacherPool, build_pool
from mtkd_env.teachers.quantization import Fidelity, Note, quantize_teachers
from mtkd_env.teachers.store import StoredTeachers, StoreSpec, store_folder
from mtkd_env.teachers.training import TrainingSet
from mtkd_env.types import Batch

# Enough training images for steady scales of int8 teachers, and how many are looked at together.
CALIBRATION_IMAGES, CALIBRATION_BATCH = 256, 64

# Images in a call of the teachers on a GPU, if nothing else was said: a call for many costs little
# more there than one for a few, and teachers need not wait for the student.
IMAGES_AT_ONCE = 512

# Of the way from chance to all, what is near chance; below what a file states, what is far.
NEAR, FAR = 0.1, 0.05
ADVICE = (
    " (is its `input` what it was trained on, and are its outputs in the order of the classes?)"
)


@runtime_checkable
class Progress(Protocol):
    """What is told while teachers are made ready."""

    def teacher(self, name: str, epoch: int, epochs: int, loss: float) -> None:
        """A teacher has been trained for another epoch, at a mean cross-entropy [nats]."""

    def note(self, text: str) -> None:
        """Something about the teachers is worth a line."""


def prepare_teachers(
    spec: PoolSpec,
    images: TrainingSet,
    stream: BatchStream,
    *,
    val_fraction: float,
    computing: Computing,
    device: torch.device,
    progress: Progress,
) -> tuple[TeacherPool, dict[str, Fidelity]]:
    """The teachers of a spec; the batches of the stream bring what is known of their outputs.

    Args:
        spec: The teachers; those that were never trained before are trained now and kept.
        images: What they are trained, calibrated and evaluated on.
        stream: The student's batches.
        val_fraction: Share of the training images that `images` holds out.
        computing: How they compute, and the folder of what is kept.
        device: Where they compute.
        progress: What is told of them.

    Returns:
        The pool, and how near each int8 teacher is to what it was in float32.

    Raises:
        ConfigError: A teacher or a store that cannot be.
    """
    cache = cache_folder(computing.cache)
    in_int8 = computing.for_teachers == INT8
    pool = build_pool(
        spec,
        images,
        device=device,
        cache=cache,
        precision=FULL if in_int8 else computing.for_teachers,
        progress=progress.teacher,
    )
    for line in _accuracies(spec, pool):
        progress.note(line)
    fidelities = _quantize(pool, images, val_fraction, progress.note) if in_int8 else {}
    # The results of int8 teachers are not those of what they were made from.
    found = {name: fidelity.evaluation for name, fidelity in fidelities.items()}
    pool = replace(pool, evaluations=pool.evaluations | found)
    together = batches_at_once(computing.prefetch, stream.local_batch_size, device)
    if computing.compile != NONE:
        pool.ensemble.compile_for(together * stream.local_batch_size, computing.compile)
    if spec.store:
        about = _about(pool, images, stream.views.view_set, spec.store)
        stream.teaching = store = StoredTeachers(
            pool.ensemble,
            stream.views,
            spec.store,
            batch_size=together * stream.local_batch_size,
            folder=store_folder(cache, about) if spec.store.place == "disk" else None,
        )
        sizes = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in store.sizes.items())
        progress.note(f"store of teacher outputs, when full: {sizes}")
    elif together > 1:
        stream.teaching = partial(ask_together, pool.ensemble, together)
    return pool, fidelities


def batches_at_once(prefetch: int | None, batch_size: int, device: torch.device) -> int:
    """How many batches the teachers are asked about together.

    Args:
        prefetch: What the user wants; None for what suits the device: on a CPU only calls for small
            images gain by being larger.
        batch_size: Images in a batch.
        device: Where the teachers are.
    """
    if prefetch is not None:
        return prefetch
    return max(1, IMAGES_AT_ONCE // batch_size) if device.type == "cuda" else 1


def ask_together(
    teachers: TeacherEnsemble, count: int, batches: Iterator[Batch], _plan: EpochPlan
) -> Iterator[Batch]:
    """The batches of an epoch, each with the teachers' outputs on it, asked for so many at once."""
    while group := list(islice(batches, count)):
        known = teachers(torch.cat([batch.inputs for batch in group]))
        size = len(group[0].targets)
        for place, batch in enumerate(group):
            yield replace(batch, teachers=known.take(slice(place * size, (place + 1) * size)))


def _accuracies(spec: PoolSpec, pool: TeacherPool) -> Iterator[str]:
    """What given teachers get right, with a warning if that is suspiciously little."""
    for teacher in spec.asked:
        if teacher.checkpoint is None and not has_weights(teacher.network):
            continue
        name = teacher.label
        found, classes = pool.evaluations[name], pool.ensemble.classes.get(name, ())
        accuracy = found.accuracy / max(found.labelled, 1e-12)
        chance = 1 / (len(classes) or pool.ensemble.num_classes)
        stated = pool.stated.get(name, 0.0)
        line = f"teacher {name}: {accuracy:.2%} of the test images"
        if classes:
            line += f" of its {len(classes)} classes, {found.accuracy:.2%} of all"
        if accuracy < chance + NEAR * (1 - chance):
            line += f"; WARNING: near chance, {chance:.2%}{ADVICE}"
        elif accuracy < stated - FAR:
            line += f"; WARNING: {stated:.2%} is stated of its weights{ADVICE}"
        yield line


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
        **({"maps": "means"} if spec.maps is False else {}),
        **({"classes": pool.ensemble.classes} if pool.ensemble.classes else {}),
        **({"inputs": inputs} if (inputs := pool.ensemble.inputs) else {}),
    }
