"""What the images of a step cost: cropped, mirrored, normalised, and mixed if so configured."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from experiments.benchmarks.base import Outcome, Request
from experiments.benchmarks.contestant import make_env
from experiments.benchmarks.loader import CHANNELS, file_loader, loaded_batches
from experiments.benchmarks.timing import (
    Readings,
    Subject,
    per_unit,
    ratio_percentiles,
    stopwatch_for,
    take_turns,
    timed,
)
from experiments.benchmarks.timing_report import REFERENCE, TimingReport
from experiments.config import ExperimentConfig
from mtkd_env import Assembly
from mtkd_env.data import ImageData, ImageFiles
from mtkd_env.types import TeacherWeights

STREAM, LOADER = "stream", "torchvision"

# Rounds that are not counted.
WARMUP_ROUNDS = 2

# More of a step than this, and the images are worth an effort.
TARGET = 0.02

NOTES = (
    f"{REFERENCE}: a whole step, its images included",
    f"{STREAM}: the batches of a run",
    f"{LOADER}: its transforms on one image after the other; nothing is mixed, and files, decoded "
    "by as many workers as the stream's, are not normalised",
)


def measure(request: Request) -> Outcome:
    """Times a batch of the stream against a step, and against a batch of torchvision's."""
    config = request.configs([REFERENCE])[REFERENCE]
    assembly = request.build(config)
    watch = stopwatch_for(assembly.env.device)
    subjects = _subjects(assembly, config, request.steps)
    take_turns(subjects, watch, request.count(range(WARMUP_ROUNDS), "warm-up rounds"))
    readings = take_turns(subjects, watch, request.count(range(request.rounds), "rounds"))
    return TimingReport(
        title=f"Cost of a batch of images, as a share of a step of {REFERENCE}",
        readings=readings,
        unit="batch",
        assembly=assembly,
        config=config,
        notes=[*NOTES[: len(subjects)], _verdict(readings, watch.clocks[0])],
        amount=f"{request.steps} batches, of the stream {assembly.env.steps_per_epoch}",
        values={"target": TARGET},
    ).outcome()


def _subjects(assembly: Assembly, config: ExperimentConfig, steps: int) -> dict[str, Subject]:
    """Everything that is measured, read by the batch."""
    env, data, wanted = assembly.env, assembly.images.data, config.data
    split = assembly.images.splits.train
    # Not the environment's, whose batches may bring the teachers' outputs along.
    stream = data.stream(
        split,
        batch_size=wanted.batch_size,
        device=env.device,
        seed=config.seed,
        mixing=wanted.mixing,
        view_set=wanted.view_set,
    )
    own, count = make_env(assembly, config), stream.steps_per_epoch
    subjects = {
        REFERENCE: _by_batch(
            lambda: (
                own.distill(TeacherWeights.uniform(own.state.divergence)) for _ in range(steps)
            ),
            steps,
        ),
        STREAM: _by_batch(lambda: islice(stream, count), count),
    }
    if isinstance(data, ImageFiles):
        # Whole epochs, so that nobody's workers are ahead when the clock starts.
        loader = file_loader(data, split, wanted.batch_size)
        subjects[LOADER] = _by_batch(lambda: (one.to(env.device) for one, _ in loader), count)
    elif isinstance(data, ImageData) and data.image_shape[0] in CHANNELS:
        loaded = loaded_batches(data, split, wanted.batch_size, env.device)
        subjects[LOADER] = _by_batch(lambda: islice(loaded, steps), steps)
    return subjects


def _by_batch(batches: Callable[[], Iterator[object]], count: int) -> Subject:
    """Uses up so many batches, and is read by the batch."""
    return per_unit(timed(lambda: deque(batches(), maxlen=0)), count)


def _verdict(readings: Readings, clock: str) -> str:
    share = ratio_percentiles(readings, REFERENCE, clock)[STREAM].median
    reached = "reached" if share < TARGET else "missed"
    verdict = f"{STREAM}: {share:.1%} of a step; target: under {TARGET:.0%}, {reached}"
    if LOADER in readings:
        against = ratio_percentiles(readings, LOADER, "wall")[STREAM]
        verdict += f"; {against.median:.2f} times the {LOADER}'s time on the wall "
        verdict += f"({against.low:.2f} to {against.high:.2f})"
    return verdict
