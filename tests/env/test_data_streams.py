"""What holds for the streams of every dataset, wherever its images are."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fake_datasets import FAKES
from mtkd_env.data import BatchStream, ImageSet, Mixing
from mtkd_env.errors import ConfigError
from mtkd_env.types import Batch
from tiny import assert_same_batches, load_dataset, take

BATCH = 6
BOTH = Mixing(mixup=0.8, cutmix=1.0)

# Keeps all parts small.
TRAIN = 4 * BATCH + 1


@pytest.fixture(scope="module", params=FAKES)
def data(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ImageSet[Any]]:
    with pytest.MonkeyPatch.context() as patch:
        arguments = FAKES[request.param](tmp_path_factory.mktemp(request.param), patch)
        yield load_dataset(request.param, **arguments)


@pytest.fixture
def stream(data: ImageSet[Any]) -> Callable[..., BatchStream]:
    train = data.split(train_size=TRAIN).train

    def make(**changes: Any) -> BatchStream:
        arguments = {"batch_size": BATCH, "device": "cpu", "seed": 0, **changes}
        return data.stream(train, **arguments)

    return make


def joined(parts: list[Batch]) -> Batch:
    """One batch of the rows of several."""
    mixtures = [part.mixture for part in parts]
    return Batch(
        inputs=torch.cat([part.inputs for part in parts]),
        targets=torch.cat([part.targets for part in parts]),
        index=torch.cat([part.index for part in parts]),
        mixture=None if mixtures[0] is None else torch.cat(mixtures),
    )


def test_batches_are_float32_images_of_their_index(
    data: ImageSet[Any], stream: Callable[..., BatchStream]
) -> None:
    train = data.split(train_size=TRAIN).train
    for batch in take(stream(), 5):
        assert batch.inputs.shape == (BATCH, *data.image_shape)
        assert batch.inputs.dtype == torch.float32
        assert torch.equal(batch.targets, train.targets[batch.index])
        assert batch.mixture is None


def test_epoch_visits_every_image_at_most_once(stream: Callable[..., BatchStream]) -> None:
    batches = stream()
    assert (batches.samples, batches.steps_per_epoch) == (TRAIN, 4)
    for epoch in range(2):
        assert (batches.epoch, batches.step) == (epoch, 0)
        index = torch.cat([batch.index for batch in take(batches, 4)])
        assert len(index.unique()) == len(index) == 4 * BATCH


def test_every_epoch_has_an_order_of_its_own(stream: Callable[..., BatchStream]) -> None:
    batches = stream(batch_size=TRAIN)
    first, second = take(batches, 2)
    assert not torch.equal(first.index, second.index)


@pytest.mark.parametrize("mixing", [Mixing(), BOTH])
def test_same_seed_gives_the_same_stream(
    stream: Callable[..., BatchStream], mixing: Mixing
) -> None:
    expected = take(stream(mixing=mixing), 6)
    torch.manual_seed(5)
    assert_same_batches(take(stream(mixing=mixing), 6), expected)
    reseeded = stream(mixing=mixing, seed=3)
    take(reseeded, 2)
    reseeded.reseed(0)
    assert (reseeded.epoch, reseeded.step) == (0, 0)
    assert_same_batches(take(reseeded, 6), expected)


def test_different_seeds_give_different_streams(stream: Callable[..., BatchStream]) -> None:
    first, second = next(stream()), next(stream(seed=1))
    assert not torch.equal(first.index, second.index)


def test_stream_neither_reads_nor_moves_the_global_generator(
    stream: Callable[..., BatchStream],
) -> None:
    before = torch.get_rng_state()
    take(stream(mixing=BOTH), 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("position", "mixing"), [(0, Mixing()), (1, BOTH), (3, Mixing()), (4, BOTH), (6, Mixing())]
)
def test_resumed_stream_gives_the_same_batches(
    stream: Callable[..., BatchStream], position: int, mixing: Mixing
) -> None:
    batches = stream(mixing=mixing)
    take(batches, position)
    file = io.BytesIO()
    torch.save(batches.state_dict(), file)
    file.seek(0)
    expected = take(batches, 5)
    resumed = stream(mixing=mixing, seed=9)
    take(resumed, 2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert (resumed.epoch, resumed.step) == divmod(position, 4)
    assert_same_batches(take(resumed, 5), expected)


def test_stream_goes_on_in_another_number_of_processes(
    stream: Callable[..., BatchStream],
) -> None:
    whole = stream()
    take(whole, 2)
    parts = [stream(shard=(rank, 3), seed=4) for rank in range(3)]
    for part in parts:
        part.load_state_dict(whole.state_dict())
    assert_same_batches([joined([next(part) for part in parts]) for _ in range(4)], take(whole, 4))


@pytest.mark.parametrize("processes", [2, 6])
def test_parts_of_all_processes_are_the_whole(
    stream: Callable[..., BatchStream], processes: int
) -> None:
    parts = [stream(shard=(rank, processes)) for rank in range(processes)]
    for part in parts:
        assert (part.batch_size, part.local_batch_size) == (BATCH, BATCH // processes)
        assert (part.samples, part.steps_per_epoch) == (TRAIN, 4)
    found = [joined([next(part) for part in parts]) for _ in range(6)]
    assert_same_batches(found, take(stream(), 6))


def test_all_processes_mix_the_same_images_alike_with_their_own(
    stream: Callable[..., BatchStream],
) -> None:
    whole, parts = stream(mixing=BOTH), [stream(shard=(rank, 2), mixing=BOTH) for rank in range(2)]
    for batch in take(whole, 5):
        found = joined([next(part) for part in parts])
        assert torch.equal(found.index, batch.index)
        # A process's first image is mixed with its last; all others as by a single process.
        rows = [row for row in range(BATCH) if row % (BATCH // 2)]
        assert torch.equal(found.inputs[rows], batch.inputs[rows])
        assert torch.equal(found.mixture[rows], batch.mixture[rows])


def test_batch_that_the_processes_cannot_share_is_an_error(
    stream: Callable[..., BatchStream],
) -> None:
    message = "batch_size: expected a multiple of 4, the number of processes, found 6"
    with pytest.raises(ConfigError, match=message):
        stream(shard=(0, 4))


@pytest.mark.parametrize("batch_size", [0, TRAIN + 1])
def test_batch_that_the_images_do_not_fill_is_an_error(
    stream: Callable[..., BatchStream], batch_size: int
) -> None:
    message = f"batch_size: expected 1 to {TRAIN}, the number of images, found {batch_size}"
    with pytest.raises(ConfigError, match=message):
        stream(batch_size=batch_size)


# Evaluation.


def passed(data: ImageSet[Any], batch_size: int, **shard: Any) -> Batch:
    test = data.split().test
    return joined(list(data.evaluation_batches(test, batch_size, device="cpu", **shard)))


@pytest.mark.parametrize("batch_size", [7, 512])
def test_evaluation_passes_once_in_order_over_all_images(
    data: ImageSet[Any], batch_size: int
) -> None:
    test = data.split().test
    found = passed(data, batch_size)
    assert found.index.tolist() == list(range(len(test)))
    assert torch.equal(found.targets, test.targets)
    pixels = data.pixels(test, torch.arange(len(test))) / 255
    expected = (pixels - data.mean[:, None, None]) / data.std[:, None, None]
    torch.testing.assert_close(found.inputs, expected)


def test_evaluations_of_all_processes_cover_all_images_once(data: ImageSet[Any]) -> None:
    processes = 5
    parts = [passed(data, 4, shard=(rank, processes)) for rank in range(processes)]
    assert_same_batches([joined(parts)], [passed(data, 512)])
    lengths = [len(part.targets) for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_evaluation_without_a_batch_size_is_an_error(data: ImageSet[Any]) -> None:
    with pytest.raises(ConfigError, match="batch_size: expected at least 1, got 0"):
        data.evaluation_batches(data.split().test, 0, device="cpu")


# Splits.


def test_held_out_images_are_not_trained_on(data: ImageSet[Any]) -> None:
    whole, splits = data.split(), data.split(0.25)
    both = torch.cat([splits.train.index, splits.val.index])
    assert both.sort().values.tolist() == list(range(len(whole.train)))
    for split in (splits.train, splits.val):
        assert torch.equal(split.targets, whole.train.targets[split.index])
        found, expected = data.pixels(split, torch.tensor([1])), split.index[1:2]
        assert torch.equal(found, data.pixels(whole.train, expected))


@pytest.mark.gpu
def test_stream_is_the_same_on_the_gpu(stream: Callable[..., BatchStream]) -> None:
    for here, there in zip(take(stream(), 5), take(stream(device="cuda"), 5), strict=True):
        assert there.inputs.is_cuda
        assert torch.equal(there.index.cpu(), here.index)
        assert torch.equal(there.targets.cpu(), here.targets)
        torch.testing.assert_close(there.inputs.cpu(), here.inputs)
