import hashlib
import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import functional as vision

from fake_datasets import FAKES, IN_MEMORY
from mtkd_env.data import BatchStream, ImageData, digits, npz
from mtkd_env.data.augment import Crops, normalize
from mtkd_env.errors import ConfigError
from tiny import assert_same_batches, load_dataset, take

DIGITS_DIGEST = "dceb30033c91cc32f3045b75223179c7a1f07f925e063601b72438795de00fc6"
DIGITS_STREAM = "795ae9471dadfa5c0f90e3a4b15cb6245761d96c2ac1d1fb56f39e0d5de816ee"
Arrays = dict[str, np.ndarray]


def random_images(count: int, channels: int = 3, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    shape = (count, channels, height, width)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def toy(train: int = 30, test: int = 10, **changes: Any) -> ImageData:
    fields = {
        "name": "toy",
        "x_train": random_images(train),
        "y_train": torch.arange(train) % 3,
        "x_test": random_images(test),
        "y_test": torch.arange(test) % 3,
        "num_classes": 3,
        "flip": True,
        "crop_padding": 2,
    }
    return ImageData(**(fields | changes))


def toy_arrays(**changes: np.ndarray | None) -> Arrays:
    """Contents of a good archive of 8x10 images, less the arrays that are set to None."""
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (12, 8, 10, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": generator.integers(0, 256, (6, 8, 10, 3), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
    } | changes
    return {key: array for key, array in arrays.items() if array is not None}


def saved(folder: Path, arrays: Arrays) -> Path:
    path = folder / "mine.npz"
    np.savez(path, **arrays)
    return path


def stream(data: ImageData | None = None, **changes: Any) -> BatchStream:
    data = data or toy()
    return data.stream(
        data.split().train, **({"batch_size": 4, "device": "cpu", "seed": 0} | changes)
    )


def plain(data: ImageData) -> ImageData:
    """Some images that are neither cropped nor mirrored."""
    return replace(data, crop_padding=0, flip=False)


@pytest.fixture(params=IN_MEMORY)
def dataset(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ImageData:
    return load_dataset(request.param, **FAKES[request.param](tmp_path, monkeypatch))


# Datasets


def test_dataset_holds_bytes_and_labels_of_every_class(dataset: ImageData) -> None:
    for images, targets in (
        (dataset.x_train, dataset.y_train),
        (dataset.x_test, dataset.y_test),
    ):
        assert images.dtype == torch.uint8
        assert images.shape == (len(targets), *dataset.image_shape)
        assert targets.dtype == torch.int64
        assert targets.unique().tolist() == list(range(dataset.num_classes))


def test_normalised_training_images_have_mean_zero_and_variance_one(dataset: ImageData) -> None:
    images = normalize(dataset.x_train, dataset.mean, dataset.std)
    channels = images.transpose(0, 1).flatten(1)
    zeros = torch.zeros(len(channels))
    torch.testing.assert_close(channels.mean(dim=1), zeros, atol=1e-5, rtol=0)
    torch.testing.assert_close(channels.std(dim=1, correction=0), zeros + 1)


def test_dataset_makes_batches_of_its_own_images(dataset: ImageData) -> None:
    split = dataset.split(0.3).train
    batches = plain(dataset).stream(split, batch_size=4, device="cpu", seed=0)
    for batch in take(batches, batches.steps_per_epoch + 1):
        images = split.images[batch.index]
        assert torch.equal(batch.inputs, normalize(images, dataset.mean, dataset.std))
        assert torch.equal(batch.targets, split.targets[batch.index])


def test_mean_and_std_are_those_of_each_channel() -> None:
    data = toy()
    pixels = data.x_train.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(data.mean, pixels.mean(dim=1).float())
    torch.testing.assert_close(data.std, pixels.std(dim=1, correction=0).float())


def test_constant_channel_has_a_std_of_one() -> None:
    images = random_images(30)
    images[:, 1] = 200
    data = toy(x_train=images)
    assert data.std[1] == 1
    assert (data.std > 0).all()
    assert torch.isfinite(next(stream(data)).inputs).all()


def test_digest_depends_on_all_but_names() -> None:
    data = toy()
    changed = data.x_test.clone()
    changed[0, 0, 0, 0] += 1
    others = [
        replace(data, x_test=changed),
        replace(data, y_test=data.y_test.flip(0)),
        replace(data, num_classes=4),
        replace(data, flip=False),
        replace(data, crop_padding=1),
    ]
    digests = {other.digest for other in [data, *others]}
    assert len(digests) == 1 + len(others)
    assert replace(data, name="other", class_names=("a", "b", "c")).digest == data.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": torch.rand(30, 3, 8, 8)}, "x_train: expected uint8 .* torch.float32"),
        ({"x_test": random_images(10)[:, 0]}, r"x_test: expected 4 axes .* \(10, 8, 8\)"),
        ({"x_train": random_images(30, height=7)}, r"x_train: .* at least 8x8 .* \(3, 7, 8\)"),
        ({"x_train": random_images(30, channels=0)}, r"x_train: .* found .* \(0, 8, 8\)"),
        (
            {"x_train": random_images(0), "y_train": zeros(0)},
            "x_train: expected at least one image, found none",
        ),
        ({"x_test": random_images(10, channels=1)}, r"x_test: .* \(3, 8, 8\) .* \(1, 8, 8\)"),
        ({"y_train": torch.arange(30).int()}, "y_train: expected int64 .* torch.int32"),
        ({"y_train": zeros(30, 1)}, r"y_train: expected 1 axis .* \(30, 1\)"),
        ({"y_test": zeros(0)}, "y_test: expected 10 labels as in x_test, found 0"),
        ({"y_test": torch.arange(10) - 2}, "y_test: expected labels from 0 to 2, found -2"),
        ({"y_train": torch.arange(30) % 4}, "y_train: expected labels from 0 to 2, found 3"),
        ({"y_train": zeros(29)}, "y_train: expected 30 labels .* found 29"),
        (
            {"num_classes": 1, "y_train": zeros(30), "y_test": zeros(10)},
            "num_classes: expected at least 2, found 1",
        ),
        ({"crop_padding": -1}, "crop_padding: expected 0 or more, found -1"),
        ({"class_names": ("a", "b")}, "class_names: expected a name for each of 3 .* found 2"),
    ],
)
def test_dataset_that_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy(**changes)


def test_digits_are_the_bundled_ones_on_the_full_scale() -> None:
    data = digits.load()
    assert data.image_shape == (1, 8, 8)
    assert (len(data.y_train), len(data.y_test)) == (1437, 360)
    levels = {round(level * 255 / 16) for level in range(17)}
    assert set(data.x_train.unique().tolist()) == levels
    assert (data.num_classes, data.flip, data.crop_padding) == (10, False, 1)


def test_digits_are_stratified() -> None:
    data = digits.load()
    train, test = data.y_train.bincount(), data.y_test.bincount()
    torch.testing.assert_close(test / (train + test), torch.full((10,), 0.2), atol=0.01, rtol=0)


def test_digits_do_not_change_with_the_library_or_the_code() -> None:
    assert digits.load().digest == DIGITS_DIGEST


def test_unknown_dataset_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown dataset 'digit'; did you mean 'digits'"):
        load_dataset("digit")


def test_unknown_dataset_argument_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"arguments\.pth: unknown key; did you mean 'path'"):
        load_dataset("npz", pth="x")


def test_dataset_argument_may_be_called_name(tmp_path: Path) -> None:
    data = load_dataset("npz", path=saved(tmp_path, toy_arrays()), name="other")
    assert data.name == "other"


def test_missing_dataset_argument_is_named() -> None:
    with pytest.raises(ConfigError, match="dataset 'npz': missing a required argument: 'path'"):
        load_dataset("npz")


# Archives


@pytest.mark.parametrize("compressed", [False, True])
def test_archive_of_colour_images_is_read(tmp_path: Path, compressed: bool) -> None:
    arrays, path = toy_arrays(), tmp_path / "mine.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    data = npz.load(str(path))
    assert np.array_equal(data.x_train.permute(0, 2, 3, 1).numpy(), arrays["x_train"])
    assert np.array_equal(data.y_test.numpy(), arrays["y_test"])
    assert (data.name, data.num_classes, data.image_shape) == ("mine", 3, (3, 8, 10))
    assert (data.flip, data.crop_padding) == (True, 1)


def test_archive_of_grey_images_is_read(tmp_path: Path) -> None:
    arrays = toy_arrays()
    for key in ("x_train", "x_test"):
        arrays[key] = arrays[key][..., 0]
    data = npz.load(saved(tmp_path, arrays))
    assert data.image_shape == (1, 8, 10)
    assert np.array_equal(data.x_test[:, 0].numpy(), arrays["x_test"])
    assert not data.flip


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_archive_labels_may_be_any_integers(tmp_path: Path, dtype: type) -> None:
    labels = (np.arange(12) % 3).astype(dtype)
    data = npz.load(saved(tmp_path, toy_arrays(y_train=labels)))
    assert data.y_train.tolist() == labels.tolist()


def test_archive_arguments_come_before_the_defaults(tmp_path: Path) -> None:
    data = npz.load(saved(tmp_path, toy_arrays()), name="n", flip=False, crop_padding=0)
    assert (data.name, data.flip, data.crop_padding) == ("n", False, 0)


ZEROS = np.zeros((12, 8, 10, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None}, r"no array 'x_test'; did you mean .* \(found: x_train, y_train, y_te"),
        ({"x_train": ZEROS / 255}, "x_train: expected uint8 images .* found float64"),
        ({"x_train": ZEROS.astype(np.int64)}, "x_train: expected uint8 images .* found int64"),
        ({"x_train": ZEROS[:, 0, 0]}, r"x_train: expected shape .* found \(12, 3\)"),
        ({"x_train": ZEROS.transpose(0, 3, 1, 2)}, r"x_train: .* looks like .*use array.transpose"),
        ({"x_train": ZEROS.astype(object)}, "x_train: cannot be read .* expected an array of int"),
        ({"x_train": ZEROS[:, :4]}, r"x_train: .* at least 8x8 .* \(3, 4, 10\)"),
        ({"x_train": ZEROS[:0], "y_train": np.arange(0)}, "x_train: expected at least one image"),
        ({"x_test": ZEROS[:6, :, :9]}, r"x_test: .* \(3, 8, 10\) .* found \(3, 8, 9\)"),
        ({"y_train": np.arange(12.0)}, "y_train: expected integer labels, found float64"),
        ({"y_train": np.array(["cat"] * 12)}, "y_train: expected integer labels, found <U3"),
        ({"y_train": np.array([None] * 12)}, "y_train: cannot be read .* expected an array of int"),
        ({"y_train": np.zeros((12, 1), int)}, r"y_train: .* \(N,\), found \(12, 1\); .*reshape"),
        ({"y_train": np.zeros((12, 3), int)}, r"y_train: .* \(N,\), found \(12, 3\); .*argmax"),
        ({"y_train": np.array(3)}, r"y_train: .* \(N,\), found \(\)"),
        ({"y_train": np.arange(12) - 2}, "y_train: expected labels from 0 .* found -2, 0, 1"),
        ({"y_train": np.arange(12) + 1}, "y_train: expected labels from 0 .* found 1, 2, 3"),
        ({"y_train": np.arange(12) * 2}, "y_train: expected labels from 0 .* found 0, 2, 4"),
        ({"y_test": np.arange(6)}, "y_test: expected labels from 0 to 2, found 5"),
        ({"y_test": np.arange(6) - 1}, "y_test: expected labels from 0 to 2, found -1"),
        ({"y_train": np.arange(11) % 3}, "y_train: expected 12 labels .* found 11"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_defect_of_an_archive_is_named(
    tmp_path: Path, changes: dict[str, np.ndarray | None], message: str
) -> None:
    path = saved(tmp_path, toy_arrays(**changes))
    with pytest.raises(ConfigError, match=message) as caught:
        npz.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def without_end(content: bytes) -> bytes:
    return content[: len(content) // 2]


def with_a_wrong_byte(content: bytes) -> bytes:
    return content[:200] + bytes([content[200] ^ 255]) + content[201:]


def with_a_cut_array(content: bytes) -> bytes:
    """A sound archive, one array of which ends before its data do."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data[:-100] if name == "x_train.npy" else data)
    return result.getvalue()


@pytest.mark.parametrize(
    "damage", [without_end, with_a_wrong_byte, with_a_cut_array, lambda _: b"", lambda _: b"hello"]
)
def test_damaged_archive_is_an_error(tmp_path: Path, damage: Any) -> None:
    path = saved(tmp_path, toy_arrays())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"mine\.npz: .*cannot be read .* expected a"):
        npz.load(path)


@pytest.mark.parametrize("path", ["nowhere.npz", "."])
def test_path_without_a_file_is_an_error(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=r"no such file; expected a \.npz archive with x_train"):
        npz.load(tmp_path / path)


def test_single_array_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", np.zeros(3))
    with pytest.raises(ConfigError, match=r"holds a single array; expected a \.npz archive"):
        npz.load(tmp_path / "mine.npy")


# Splits


@settings(max_examples=25)
@given(fraction=st.floats(0.05, 0.9), seed=st.integers(0, 2**63))
def test_splits_are_disjoint_and_exhaustive(fraction: float, seed: int) -> None:
    splits = toy().split(fraction, seed)
    assert splits.val is not None
    both = torch.cat([splits.train.index, splits.val.index])
    assert both.sort().values.tolist() == list(range(30))
    assert len(splits.val) == round(30 * fraction)


def test_nothing_held_out_is_no_validation_split() -> None:
    splits = toy().split()
    assert splits.val is None
    assert splits.train.index.tolist() == list(range(30))


def test_seed_decides_the_split() -> None:
    data = toy()
    first, same, other = (data.split(0.3, seed).train.index for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@settings(max_examples=25)
@given(size=st.integers(1, 24), seed=st.integers(0, 100))
def test_small_training_set_is_balanced(size: int, seed: int) -> None:
    train = toy().split(0.2, seed, train_size=size).train
    available = toy().split(0.2, seed).train.targets.bincount(minlength=3)
    counts = train.targets.bincount(minlength=3)
    assert len(train) == size
    below_the_largest = counts < counts.max() - 1
    assert torch.equal(counts[below_the_largest], available[below_the_largest])


def test_small_training_sets_are_nested_and_leave_validation_alone() -> None:
    data = toy()
    small, large = (data.split(0.2, 0, train_size=size) for size in (7, 15))
    assert set(small.train.index.tolist()) <= set(large.train.index.tolist())
    assert small.val is not None
    assert large.val is not None
    assert torch.equal(small.val.index, large.val.index)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan"), 0.001, 0.999])
def test_validation_share_without_images_on_both_sides_is_an_error(fraction: float) -> None:
    with pytest.raises(ConfigError, match=f"val_fraction: expected .* found {fraction}"):
        toy().split(fraction)


@pytest.mark.parametrize("size", [0, 25])
def test_training_size_beyond_the_images_is_an_error(size: int) -> None:
    message = rf"train_size: expected 1 to 24 \(30 images, 6 held out\), found {size}"
    with pytest.raises(ConfigError, match=message):
        toy().split(0.2, train_size=size)


# Augmentation


@settings(max_examples=20)
@given(
    channels=st.integers(1, 4),
    height=st.integers(8, 12),
    width=st.integers(8, 12),
    padding=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_crop_flip_and_normalisation_are_torchvisions(
    channels: int, height: int, width: int, padding: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = random_images(5, channels, height, width)
    mean, std = torch.rand(2, channels, generator=generator) + 0.1
    index = torch.randint(5, (7,), generator=generator)
    offsets = torch.randint(2 * padding + 1, (7, 2), generator=generator)
    flips = torch.rand(7, generator=generator) < 0.5
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    cropped, plain = (Crops(padded, (height, width), flip=flip) for flip in (True, False))
    corners = cropped.corners(index, *offsets.unbind(1))
    crops = cropped(corners, flips.long())
    assert plain(corners, torch.zeros_like(index))[~flips].equal(crops[~flips])
    normalised = normalize(crops, mean, std)
    for row, image in enumerate(images[index]):
        top, left = offsets[row].tolist()
        expected = vision.crop(vision.pad(image, [padding]), top, left, height, width)
        expected = vision.hflip(expected) if flips[row] else expected
        assert torch.equal(crops[row], expected)
        scaled = vision.convert_image_dtype(expected, torch.float32)
        expected = vision.normalize(scaled, mean.tolist(), std.tolist())
        torch.testing.assert_close(normalised[row], expected, atol=1e-6, rtol=1e-6)


def test_normalised_images_are_float32_in_units_of_the_std() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
    result = normalize(images, torch.tensor([0.5]), torch.tensor([0.25]))
    assert result.dtype == torch.float32
    assert result.flatten().tolist() == [-2.0, 2.0]


# Streams


def test_augmented_images_are_all_the_crops_of_the_padded_ones_and_their_mirrors() -> None:
    data = toy(x_train=random_images(30).clamp(min=1))
    padded = torch.nn.functional.pad(data.x_train, (2,) * 4)
    views = padded.unfold(2, 8, 1).unfold(3, 8, 1).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    views = torch.cat([views, views.flip(-1)], dim=1)
    seen = set()
    for batch in take(stream(data), 140):
        for image, index in zip(batch.inputs, batch.index, strict=True):
            candidates = normalize(views[index], data.mean, data.std)
            matches = (candidates == image).flatten(1).all(dim=1).nonzero()
            assert len(matches) == 1
            seen.add(matches.item())
    assert seen == set(range(2 * 5 * 5))


def test_augmentation_does_not_change_the_order() -> None:
    still, cropped, flipped = (
        stream(replace(toy(), crop_padding=padding, flip=flip))
        for padding, flip in ((0, False), (3, False), (0, True))
    )
    for one, two, three in zip(take(still, 20), take(cropped, 20), take(flipped, 20), strict=True):
        assert torch.equal(one.index, two.index)
        assert torch.equal(one.index, three.index)


def test_stream_does_not_change_with_the_library_or_the_code() -> None:
    data = digits.load()
    sha = hashlib.sha256()
    for batch in take(stream(data, batch_size=64, seed=5), 30):
        for tensor in (batch.inputs, batch.targets, batch.index):
            sha.update(tensor.contiguous().numpy().tobytes())
    assert sha.hexdigest() == DIGITS_STREAM


def test_state_does_not_move_on_with_its_stream() -> None:
    batches = stream()
    state = batches.state_dict()
    expected = take(batches, 20)
    batches.load_state_dict(state)
    assert_same_batches(take(batches, 20), expected)


def test_state_of_another_stream_is_refused() -> None:
    state = stream(batch_size=5).state_dict()
    message = "expected 30 images in batches of 4, found 30 in batches of 5"
    with pytest.raises(ConfigError, match=message):
        stream().load_state_dict(state)


def test_batches_share_no_memory_with_the_dataset() -> None:
    data = toy()
    before = data.digest
    batches = stream(plain(data))
    next(batches).inputs.zero_()
    assert replace(data).digest == before


@pytest.mark.gpu
def test_stream_never_waits_for_the_gpu() -> None:
    batches = stream(device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        take(batches, 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Evaluation


def test_split_that_is_on_the_device_is_not_copied() -> None:
    split = toy().split().test
    assert split.to("cpu").images is split.images
