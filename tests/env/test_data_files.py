"""Images that are decoded while the training goes on."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision.transforms import v2

from fake_datasets import IMAGE_SIZE, RESIZE, draw, write_images
from mtkd_env.data import BatchStream, ImageFiles, Mixing, decoding
from mtkd_env.data.augment import normalize
from mtkd_env.data.decoding import (
    CHUNK,
    MOST_AHEAD,
    Ahead,
    View,
    central_view,
    default_workers,
    deit_view,
    standard_view,
    view_bytes,
)
from mtkd_env.data.image_files import AUGMENTATIONS, INTERPOLATIONS
from mtkd_env.data.reading import ORIENTATION
from mtkd_env.data.views import ViewSet
from mtkd_env.errors import ConfigError
from mtkd_env.seeding import seeded
from tiny import assert_same_batches, load_dataset, take

BATCH = 8
CLASSES = ("cat", "dog", "fox")
COUNT = 11  # of each class


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, classes=CLASSES, count=COUNT)
    return folder


@pytest.fixture
def load(root: Path) -> Callable[..., ImageFiles]:
    def make(**changes: Any) -> ImageFiles:
        sizes = {"image_size": IMAGE_SIZE, "resize": RESIZE}
        return load_dataset("folder", **{"root": root, "workers": 0, **sizes, **changes})

    return make


def stream(data: ImageFiles, **changes: Any) -> BatchStream:
    arguments = {"batch_size": BATCH, "device": "cpu", "seed": 0, **changes}
    return data.stream(data.train, **arguments)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were decoded in this process."""
    paths: list[str] = []
    patch_reader(monkeypatch, paths.append)
    return paths


def patch_reader(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]) -> None:
    """Does something before a file is read, in all processes."""
    load = View.read

    def read(view: View, path: str, **options: bool) -> Tensor:
        before(path)
        return load(view, path, **options)

    monkeypatch.setattr(View, "read", read)


def alive() -> int:
    """Processes that this one has started."""
    deadline = time.monotonic() + 5
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(multiprocessing.active_children())


# Views.


def image(height: int = 60, width: int = 90) -> Image.Image:
    return Image.fromarray(draw(3, height, width, 3))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_central_view_is_the_middle_of_the_resized_image(interpolation: str) -> None:
    # 60 x 90 becomes 30 x 45; of that, the middle 20 x 20.
    found = central_view(20, 30, interpolation)(image())
    method = Image.Resampling[interpolation.upper()]
    resized = v2.functional.pil_to_tensor(image().resize((45, 30), method))
    assert torch.equal(found, resized[:, 5:25, 12:32])


def test_standard_view_is_torchvisions_crop_and_mirror() -> None:
    reference = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(24), v2.RandomHorizontalFlip()])
    for seed in range(10):
        with seeded(seed):
            expected = reference(image())
        with seeded(seed):
            assert torch.equal(standard_view(24)(image()), expected)
        with seeded(seed):  # Pillow's own crop is the same one.
            pillow = v2.functional.pil_to_tensor(v2.Compose(reference.transforms[1:])(image()))
        assert (pillow.float() - expected.float()).abs().mean() < 2


def test_exif_counts_in_training_evaluation_and_use_alike(tmp_path: Path) -> None:
    upright = Image.fromarray(draw(5, 60, 90, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # Which says that a quarter turn clockwise is due.
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    data = {}
    for name, image, options in (("upright", upright, {}), ("stored", stored, {"exif": exif})):
        for place in ("train/a", "train/b", "test/a", "test/b"):
            (tmp_path / name / place).mkdir(parents=True)
            image.save(tmp_path / name / place / "1.png", **options)
        for asked in (False, True):
            data[name, asked] = load_dataset(
                "folder", root=tmp_path / name, image_size=24, resize=30, workers=0, exif=asked
            )
    seen = {}
    for key, images in data.items():
        test = next(images.evaluation_batches(images.test, 2, device="cpu")).inputs
        used = images.preprocessing(images.test.paths([0])[0])
        assert torch.equal(used, test[0])
        seen[key] = [*take(stream(images, batch_size=2), 2), test]
    for one, other in zip(seen["upright", False], seen["stored", True], strict=True):
        assert torch.equal(getattr(one, "inputs", one), getattr(other, "inputs", other))
    assert not torch.equal(seen["stored", False][2], seen["stored", True][2])
    assert data["stored", False].digest != data["stored", True].digest
    assert data["stored", True].preprocessing.exif


# Scaled decoding.


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of 300 x 200 pixels, smooth as large photographs are; half of them to be turned."""
    folder = tmp_path_factory.mktemp("photographs")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (folder / place).mkdir(parents=True)
        for number, options in enumerate(({}, {"exif": exif})):
            shown = image(8, 12).resize((300, 200), Image.Resampling.BICUBIC)
            shown.save(folder / place / f"{number}.jpg", quality=95, **options)
    return folder


def test_scaled_views_are_nearly_the_same_and_evaluation_is_exact(photographs: Path) -> None:
    scaled, exact = (
        load_dataset("folder", root=photographs, image_size=24, workers=0, exif=True, scaled=asked)
        for asked in (True, False)
    )
    batches = [take(stream(data, batch_size=4), 5) for data in (scaled, exact)]
    for one, other in zip(*batches, strict=True):
        assert one.index.equal(other.index)
        assert not one.inputs.equal(other.inputs)
        assert (one.inputs - other.inputs).abs().mean() < 0.1 * other.inputs.std()
    assert_same_batches(
        *(list(data.evaluation_batches(data.test, 4, device="cpu")) for data in (scaled, exact))
    )
    assert scaled.digest != exact.digest


@pytest.mark.parametrize("make", AUGMENTATIONS.values())
def test_view_of_a_small_image_is_the_same_where_scaling_is_allowed(
    make: Callable[..., View], photographs: Path
) -> None:
    path = photographs / "train/a/0.jpg"
    for seed in range(5):
        seen = []
        for scaled in (False, True):
            with seeded(seed):
                # No part of the image has 2 x 128 pixels in height.
                seen.append(make(128, scaled=scaled).read(str(path), exif=False))
        with seeded(seed):
            seen.append(make(128)(Image.open(path)))
        assert seen[0].equal(seen[1])
        assert seen[0].equal(seen[2])


# Few views.


def test_numbered_views_depend_on_image_number_and_seed_alone(
    load: Callable[..., ImageFiles],
) -> None:
    def epochs(view_set: ViewSet, workers: int = 0, seed: int = 0) -> list[Tensor]:
        data = load(workers=workers)
        batches = stream(data, batch_size=3 * COUNT, seed=seed, view_set=view_set)
        return [batch.inputs[batch.index.argsort()] for batch in take(batches, 3)]

    first, second, third = epochs(ViewSet(2))
    assert third.equal(first)
    assert not (first == second).flatten(1).all(1).any()
    for other in (epochs(ViewSet(2), workers=1), epochs(ViewSet(2), seed=1), epochs(ViewSet(3))):
        assert other[0].equal(first)
        assert other[1].equal(second)
    assert not epochs(ViewSet(2, seed=1))[0].equal(first)
    data = load()
    part = data.train.take(torch.tensor([4, 1]))
    few = next(data.stream(part, batch_size=2, device="cpu", seed=0, view_set=ViewSet(2)))
    assert few.inputs[few.index.argsort()].equal(first[[4, 1]])


def test_few_views_of_repeated_images_are_refused(load: Callable[..., ImageFiles]) -> None:
    with pytest.raises(ConfigError, match="views: expected none where repeats is 3"):
        stream(load(repeats=3), view_set=ViewSet(2))


def test_deit_view_is_normalised_and_partly_erased_in_a_quarter_of_all_cases() -> None:
    view, plain = deit_view(16), Image.new("RGB", (40, 40), (255, 255, 255))
    erased = 0
    for seed in range(300):
        with seeded(seed):
            found = view(plain)
        assert found.dtype == torch.float32
        assert found.shape == (3, 16, 16)
        # What RandAugment leaves of a white image has few values; noise has very many.
        erased += len(found.unique()) > 60
    assert 50 <= erased <= 100


def test_randaugment_has_magnitudes_around_nine_of_ten_and_draws_them_per_image() -> None:
    choice = decoding._rand_augment()
    levels = torch.tensor([t.magnitude / (t.num_magnitude_bins - 1) for t in choice.transforms])
    share = torch.tensor(choice.p)
    mean = (levels * share).sum()
    std = ((levels - mean).square() * share).sum().sqrt()
    assert {t.num_ops for t in choice.transforms} == {2}
    torch.testing.assert_close(mean, torch.tensor(0.9))
    torch.testing.assert_close(std, torch.tensor(0.05), atol=0.01, rtol=0)


@pytest.mark.parametrize("make", AUGMENTATIONS.values())
def test_view_depends_on_the_seed(make: Callable[[int], View]) -> None:
    def see(seed: int) -> torch.Tensor:
        with seeded(seed):
            return make(24)(image())

    assert torch.equal(see(1), see(1))
    assert not torch.equal(see(1), see(2))


def test_bytes_of_a_view_are_those_of_its_tensor() -> None:
    assert view_bytes(standard_view(24)) == 3 * 24 * 24
    assert view_bytes(deit_view(24)) == 4 * 3 * 24 * 24


@pytest.mark.parametrize("augmentation", [*AUGMENTATIONS, "none"])
def test_batches_are_normalised_views_of_their_index(
    load: Callable[..., ImageFiles], augmentation: str
) -> None:
    data = load(augmentation=augmentation)
    batch = next(stream(data))
    central = normalize(data.pixels(data.train, batch.index), data.mean, data.std)
    assert torch.equal(batch.inputs, central) == (augmentation == "none")
    assert batch.inputs.abs().max() < 6  # erased parts are standard normal


def test_augmentation_changes_neither_the_order_nor_the_split(
    load: Callable[..., ImageFiles],
) -> None:
    orders = [
        [batch.index.tolist() for batch in take(stream(load(augmentation=name)), 6)]
        for name in ("standard", "deit", "none")
    ]
    assert orders[0] == orders[1] == orders[2]


def test_views_of_an_image_differ_from_epoch_to_epoch(load: Callable[..., ImageFiles]) -> None:
    batches = stream(load(), batch_size=3 * COUNT)
    first, second = (next(batches) for _ in range(2))
    one, two = (batch.inputs[batch.index.argsort()] for batch in (first, second))
    assert not (one == two).flatten(1).all(1).any()


# Workers.


@pytest.mark.parametrize("augmentation", ["standard", "deit"])
def test_number_of_workers_changes_nothing(
    load: Callable[..., ImageFiles], augmentation: str
) -> None:
    data = [load(workers=workers, augmentation=augmentation) for workers in (0, 1, 2)]
    expected, *found = (take(stream(each), 6) for each in data)
    for batches in found:
        assert_same_batches(batches, expected)
    passes = [list(each.evaluation_batches(each.test, 5, device="cpu")) for each in data]
    assert_same_batches(passes[1], passes[0])
    assert_same_batches(passes[2], passes[0])


def test_workers_share_a_batch_that_is_larger_than_a_chunk(
    load: Callable[..., ImageFiles],
) -> None:
    size = 3 * COUNT
    assert size > CHUNK
    expected = take(stream(load(), batch_size=size), 2)
    assert_same_batches(take(stream(load(workers=2), batch_size=size), 2), expected)


def test_resumed_stream_decodes_no_image_that_was_seen(
    load: Callable[..., ImageFiles], read: list[str]
) -> None:
    data = load()
    batches = stream(data)
    take(batches, 3)
    state = batches.state_dict()
    expected = take(batches, 1)
    read.clear()
    resumed = stream(data)
    resumed.load_state_dict(state)
    assert_same_batches(take(resumed, 1), expected)
    assert read == data.train.paths(expected[0].index.tolist())


def test_processes_decode_their_own_images_only(
    load: Callable[..., ImageFiles], read: list[str]
) -> None:
    data = load()
    batch = next(stream(data, shard=(1, 2)))
    assert len(read) == BATCH // 2
    assert read == data.train.paths(batch.index.tolist())


def test_workers_end_with_their_stream_or_pass(load: Callable[..., ImageFiles]) -> None:
    data = load(workers=2)
    batches = stream(data)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.reseed(1)
    assert alive() == 0
    next(batches)
    del batches
    assert alive() == 0
    part = data.evaluation_batches(data.test, 4, device="cpu")
    next(part)
    del part
    assert alive() == 0
    list(data.evaluation_batches(data.test, 4, device="cpu"))
    assert alive() == 0


@pytest.mark.slow
def test_program_that_ends_in_mid_epoch_ends_quietly(root: Path) -> None:
    program = f"""
from mtkd_env.data import DataSpec
data = DataSpec("folder", {{"root": {str(root)!r}, "workers": 2}}).load()
stream = data.stream(data.train, batch_size=4, device="cpu", seed=0)
next(stream)
passing = data.evaluation_batches(data.test, 4, device="cpu")
next(passing)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, timeout=120, check=True
    )
    assert (done.stdout, done.stderr) == (b"", b"")


def test_there_are_no_more_workers_by_default_than_cores() -> None:
    assert 1 <= default_workers() <= min(8, os.cpu_count() or 1)


# Memory.


@given(cap=st.integers(0, 10**10), chunk=st.integers(1, 10**9), workers=st.integers(0, 64))
def test_what_is_decoded_ahead_fits_into_the_memory_it_may_take(
    cap: int, chunk: int, workers: int
) -> None:
    ahead = Ahead.within(cap, chunk, workers)
    assert (ahead.workers == 0) == (ahead.chunks == 0) == (workers == 0)
    assert ahead.workers <= workers
    assert ahead.chunks <= MOST_AHEAD
    in_all = ahead.workers * ahead.chunks
    assert in_all * chunk <= cap or in_all <= 1


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The number of images that were decoded in all processes."""
    count = multiprocessing.Value("i", 0)

    def add(_: str) -> None:
        with count.get_lock():
            count.value += 1

    patch_reader(monkeypatch, add)
    return count


def settled(count: Any) -> int:
    """The count when it has stopped growing."""
    before = -1
    while before != count.value:
        before = count.value
        time.sleep(0.3)
    return before


@pytest.mark.parametrize("chunks", [1, 2])
def test_no_more_images_are_decoded_ahead_than_fit(
    load: Callable[..., ImageFiles], decoded: Any, monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    monkeypatch.setattr("mtkd_env.data.image_files.CHUNK", 4)
    cap = chunks * 4 * view_bytes(standard_view(IMAGE_SIZE))
    batches = stream(load(workers=2, prefetch_bytes=cap), batch_size=4)
    next(batches)
    assert settled(decoded) == 4 + 4 * chunks


# Mistakes.


def damage(root: Path, content: bytes) -> Path:
    write_images(root, classes=CLASSES, count=4)
    for part in ("train", "val"):
        path = root / part / "dog" / "2.png"
        path.write_bytes(content)
    return path


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"no image", PNG, PNG + b"\0\0\0\rIHDR", None])
def test_damaged_image_is_named(tmp_path: Path, workers: int, content: bytes | None) -> None:
    if content is None:
        write_images(tmp_path, classes=CLASSES, count=4)
        whole = (tmp_path / "val" / "dog" / "2.png").read_bytes()
        content, tmp_path = whole[: len(whole) // 2], tmp_path / "cut"
    damage(tmp_path, content)
    data = load_dataset("folder", root=tmp_path, workers=workers)
    batches = stream(data, batch_size=12)
    for part, run in (
        ("train", lambda: next(batches)),
        ("train", lambda: next(batches)),
        ("val", lambda: list(data.evaluation_batches(data.test, 5, device="cpu"))),
        ("val", lambda: data.pixels(data.test, torch.tensor([6]))),
    ):
        with pytest.raises(ConfigError) as caught:
            run()
        path = tmp_path / part / "dog" / "2.png"
        assert str(caught.value).startswith(f"{path}: cannot be read as an image (")
        assert "\n" not in str(caught.value)


def test_image_that_went_away_is_named(tmp_path: Path) -> None:
    path = damage(tmp_path, b"")
    data = load_dataset("folder", root=tmp_path, workers=0)
    path.unlink()
    with pytest.raises(ConfigError, match=r"val/dog/2\.png: cannot be read as an image .*No such"):
        list(data.evaluation_batches(data.test, 5, device="cpu"))


def test_stream_whose_image_was_mended_goes_on(tmp_path: Path) -> None:
    damage(tmp_path, b"")
    path = tmp_path / "train" / "dog" / "2.png"
    data = load_dataset("folder", root=tmp_path, workers=0)
    batches = stream(data, batch_size=12)
    with pytest.raises(ConfigError, match="cannot be read"):
        next(batches)
    path.write_bytes((tmp_path / "train" / "dog" / "1.png").read_bytes())
    expected = take(stream(data, batch_size=12), 3)
    assert_same_batches(take(batches, 3), expected)


def test_killed_worker_is_one_clear_error(
    load: Callable[..., ImageFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: str) -> None:
        assert get_worker_info() is not None
        os._exit(1)

    patch_reader(monkeypatch, die)
    batches = stream(load(workers=1))
    with pytest.raises(ConfigError, match=r"data\.arguments\.workers: a process that decodes im"):
        next(batches)


def test_mistake_in_a_view_is_no_mistake_of_the_files(
    load: Callable[..., ImageFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int, *, scaled: bool) -> View:
        del scaled

        def make(_: Image.Image) -> torch.Tensor:
            raise RuntimeError("broken")

        return View(make)

    data = load()
    monkeypatch.setattr("mtkd_env.data.image_files.view_bytes", lambda _: 1)
    monkeypatch.setitem(AUGMENTATIONS, "standard", broken)
    with pytest.raises(RuntimeError, match="broken"):
        next(stream(data))


# Repeated augmentation.


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_images_are_seen_in_different_views_and_the_epoch_keeps_its_length(
    load: Callable[..., ImageFiles], repeats: int
) -> None:
    batches = stream(load(repeats=repeats), batch_size=3)
    epoch = take(batches, batches.steps_per_epoch)
    assert batches.steps_per_epoch == COUNT
    index = torch.cat([batch.index for batch in epoch])
    views = torch.cat([batch.inputs for batch in epoch])
    counts = index.bincount()
    assert counts.max() == repeats
    assert (counts == repeats).sum() == 3 * COUNT // repeats
    for position in counts.nonzero().flatten():
        own = views[index == position].flatten(1)
        assert len(own.unique(dim=0)) == len(own)


def test_views_of_one_image_lie_apart_in_a_batch(load: Callable[..., ImageFiles]) -> None:
    for batch in take(stream(load(repeats=3), batch_size=12), 4):
        assert len(batch.index.unique()) <= 5
        assert (batch.index != batch.index.roll(1)).all()


def test_repeated_images_depend_on_the_seed_alone(load: Callable[..., ImageFiles]) -> None:
    data = load(repeats=3)
    whole = stream(data)
    parts = [stream(data, shard=(rank, 2)) for rank in range(2)]
    for batch in take(whole, 5):
        found = torch.cat([next(part).inputs for part in parts])
        assert torch.equal(found, batch.inputs)


# All of DeiT's augmentation together.


def test_deit_augmentation_mixes_decoded_batches(load: Callable[..., ImageFiles]) -> None:
    data = load(augmentation="deit", repeats=3)
    batches = stream(data, mixing=Mixing(mixup=0.8, cutmix=1.0))
    for batch in take(batches, 5):
        assert batch.mixture.shape == (BATCH, len(CLASSES))
        assert batch.inputs.isfinite().all()
