"""Segmenters on a distilled backbone: networks, label maps, views, metrics, training."""

import json
import shutil
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.models import resnet18
from torchvision.transforms import InterpolationMode

from experiments.transfer import segmentation
from experiments.transfer.backbones import BACKBONES, fill
from experiments.transfer.label_maps import (
    COCO_STUFF_UNUSED,
    LabelMaps,
    distinct_colors,
    load_label_maps,
)
from experiments.transfer.label_views import FILL, Labelled, fitted, padded, random_view
from experiments.transfer.program import RECIPES, TransferConfig, parse
from experiments.transfer.schedule import Schedule
from experiments.transfer.segmentation import (
    SEGMENTERS,
    STRIDE,
    SegmentationConfig,
    SegmentationRun,
    SegmentationTask,
    build_segmenter,
    confusion,
    scores,
)
from mtkd_env import distributed
from mtkd_env.data.decoding import MEAN, STD, made
from mtkd_env.errors import ConfigError
from processes import two_processes
from shapes_segmentation import CLASSES, IGNORED, LAYOUTS, draw, write_shapes

# Of the networks with 19 classes; methods.md and a count of the layers agree.
PARAMETERS = {
    ("deeplabv3", "resnet18"): 15_903_571,
    ("deeplabv3", "resnet34"): 26_011_731,
    ("deeplabv3", "resnet50"): 39_638_355,
    ("pspnet", "resnet18"): 12_052_435,
    ("pspnet", "resnet34"): 22_160_595,
    ("pspnet", "resnet50"): 29_891_667,
}

# Grey levels between two classes in images that say themselves what is to be seen.
STEP = 60


@cache
def drawn(name: str, backbone: str, classes: int) -> nn.Module:
    return build_segmenter(name, backbone, classes, seed=0)


def segmenter(name: str, backbone: str) -> nn.Module:
    return drawn(name, backbone, 19)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few images of shapes."""
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root, train=6, val=3)
    return root


def shapes_data(root: Path) -> LabelMaps:
    return load_label_maps("folder", root, CLASSES)


def small_config(root: Path, **changes: Any) -> SegmentationConfig:
    values: dict[str, Any] = {
        "data": str(root),
        "output": "unused",
        "model": "pspnet",
        "backbone": "resnet18",
        "classes": CLASSES,
        "crop": (32, 32),
        "batch_size": 2,
        "schedule": Schedule(kind="poly", lr=0.01, iterations=2),
        "workers": 0,
        "device": "cpu",
    }
    return SegmentationConfig(**{**values, **changes})


def small_task(root: Path, **changes: Any) -> SegmentationTask:
    config = small_config(root, **changes)
    with pytest.MonkeyPatch.context() as patch:
        # To draw its tensors anew would take most of the time.
        patch.setattr(segmentation, "build_segmenter", lambda *which: deepcopy(drawn(*which[:3])))
        return SegmentationTask(config, torch.device("cpu"))


# Networks.


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters_have_the_published_number_of_parameters(name: str, backbone: str) -> None:
    found = sum(parameter.numel() for parameter in segmenter(name, backbone).parameters())
    assert found == PARAMETERS[name, backbone]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", SEGMENTERS)
def test_every_tensor_of_the_backbone_is_trained(name: str, backbone: str) -> None:
    model = segmenter(name, backbone).train()
    model.zero_grad(set_to_none=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model(images).square().mean().backward()
    untrained = [
        name
        for name, parameter in model.get_submodule("encoder").named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert untrained == []


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_segmenter_scores_every_class_in_every_pixel(name: str) -> None:
    model = segmenter(name, "resnet18").eval()
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 40, 2 * STRIDE))
    assert logits.shape == (1, 19, 40, 2 * STRIDE)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_classifier_fills_the_whole_backbone(name: str) -> None:
    torch.manual_seed(1)
    classifier = resnet18(num_classes=2).eval()
    backbone = {k: v for k, v in classifier.state_dict().items() if not k.startswith("fc.")}
    encoder: Any = build_segmenter(name, "resnet18", CLASSES, seed=0).get_submodule("encoder")
    fill(encoder.eval(), backbone)
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, backbone[key]), key
    images = torch.randn(2, 3, 32, 32)
    stem = nn.Sequential(classifier.conv1, classifier.bn1, classifier.relu, classifier.maxpool)
    with torch.no_grad():
        expected = classifier.layer2(classifier.layer1(stem(images)))
        # The stages after it are dilated.
        torch.testing.assert_close(encoder(images)[3], expected)


def test_a_segmenter_depends_on_the_seed_alone() -> None:
    one, same, other = (build_segmenter("pspnet", "resnet18", 2, seed) for seed in (0, 0, 1))
    weight = "encoder.layer4.1.conv2.weight"
    assert torch.equal(one.get_parameter(weight), same.get_parameter(weight))
    assert not torch.equal(one.get_parameter(weight), other.get_parameter(weight))


@pytest.mark.parametrize(
    ("name", "backbone", "message"),
    [
        ("pspnets", "resnet18", "unknown segmenter 'pspnets'; did you mean 'pspnet'"),
        ("pspnet", "resnet19", "unknown backbone 'resnet19'; did you mean 'resnet18'"),
    ],
)
def test_unknown_networks_are_named(name: str, backbone: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_segmenter(name, backbone, 2, seed=0)


def test_without_the_library_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "segmentation_models_pytorch", None)
    with pytest.raises(ConfigError, match=r"pip install 'mtkd-env\[segmentation\]'"):
        build_segmenter("pspnet", "resnet18", 2, seed=0)


# Datasets.


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_images_and_labels_are_read_from_the_layout_of_a_dataset(
    dataset: str, tmp_path: Path
) -> None:
    layout = LAYOUTS[dataset]
    write_shapes(tmp_path, dataset, train=3, val=2)
    data = load_label_maps(dataset, tmp_path, CLASSES if dataset == "folder" else None)
    assert (len(data.train), len(data.val)) == (3, 2)
    assert data.num_classes == layout.classes
    pixels, labels = draw(10_000)
    read = data.whole(0)
    expected = np.full(256, layout.read[CLASSES])
    expected[:CLASSES] = layout.read[:CLASSES]
    assert np.array_equal(read.labels.numpy(), expected[labels])
    # JPEG is not exact.
    difference = read.images.permute(1, 2, 0).numpy().astype(int) - pixels
    assert np.abs(difference).mean() < (20 if "jpg" in layout.image else 1e-9)


def test_cityscapes_has_the_19_classes_that_are_evaluated(tmp_path: Path) -> None:
    write_shapes(tmp_path, "cityscapes", train=1, val=1)
    data = load_label_maps("cityscapes", tmp_path)
    kept = {label: kind for label, kind in enumerate(data.classes) if 0 <= kind < IGNORED}
    assert sorted(kept.values()) == list(range(19))
    assert (kept[7], kept[26], kept[33]) == (0, 13, 18)
    assert data.colors[:2].tolist() == [[128, 64, 128], [244, 35, 232]]


def test_coco_stuff_is_numbered_as_mmsegmentation_does(tmp_path: Path) -> None:
    write_shapes(tmp_path, "coco_stuff", train=1, val=1)
    classes = load_label_maps("coco_stuff", tmp_path).classes
    kept = [kind for kind in classes if 0 <= kind < IGNORED]
    assert kept == list(range(171))
    known = {0: 0, 10: 10, 12: 11, 27: 25, 30: 26, 45: 40, 89: 79, 91: 80, 181: 170, 255: 255}
    assert {label: classes[label] for label in known} == known
    assert all(classes[label] == -1 for label in COCO_STUFF_UNUSED)


def test_coco_stuff_is_found_in_the_folders_of_its_own_instructions_too(tmp_path: Path) -> None:
    write_shapes(tmp_path / "coco", "coco_stuff", train=2, val=1)
    shutil.move(tmp_path / "coco" / "stuffthingmaps", tmp_path / "annotations")
    shutil.move(tmp_path / "coco", tmp_path / "images")
    assert len(load_label_maps("coco_stuff", tmp_path).train) == 2


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_a_missing_dataset_says_where_it_was_looked_for_and_what_must_lie_there(
    dataset: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_label_maps(dataset, tmp_path, CLASSES if dataset == "folder" else None)
    first = LAYOUTS[dataset].image.partition("/")[0].format(part=LAYOUTS[dataset].parts[0])
    assert str(tmp_path / first) in str(caught.value)
    assert "no such folder" in str(caught.value)
    assert "expected" in str(caught.value)
    assert ".png" in str(caught.value)


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_hidden_entries_are_no_images(dataset: str, tmp_path: Path) -> None:
    write_shapes(tmp_path, dataset, train=2, val=1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for path in files:
        (path.parent / f"._{path.name}").write_bytes(b"not an image")
        (path.parent / ".DS_Store").touch()
        (path.parent.parent / ".DS_Store").touch()
        (path.parent / ".ipynb_checkpoints").mkdir(exist_ok=True)
        (path.parent / ".ipynb_checkpoints" / path.name).touch()
    shown = [str(path) for path in files if "stuffthing" not in str(path)]
    data = load_label_maps(
        dataset, tmp_path, LAYOUTS[dataset].classes if dataset == "folder" else None
    )
    assert (len(data.train), len(data.val)) == (2, 1)
    assert all(pair.image in shown for pair in (*data.train, *data.val))


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_an_image_without_its_label_map_is_named(dataset: str, tmp_path: Path) -> None:
    layout = LAYOUTS[dataset]
    write_shapes(tmp_path, dataset, train=2, val=1)
    missing = tmp_path / layout.labels.format(part=layout.parts[0], name="000001")
    missing.unlink()
    with pytest.raises(ConfigError, match=f"{missing.name}: no such label map"):
        load_label_maps(dataset, tmp_path, CLASSES if dataset == "folder" else None)


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    write_shapes(tmp_path, train=1, val=1)
    next((tmp_path / "images" / "val").iterdir()).unlink()
    with pytest.raises(ConfigError, match=r"images/val: holds no images; expected images/\{train"):
        shapes_data(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((9, 8), 4, np.uint8), "holds the label 4, which is none of the 4 classes"),
        (np.zeros((8, 9), np.uint8), "expected 8 x 9 pixels as in .*, found 9 x 8"),
        (np.zeros((9, 8, 3), np.uint8), "expected one byte a pixel, found mode RGB"),
        (np.zeros((9, 8), np.uint16), "expected one byte a pixel, found mode I;16"),
    ],
)
def test_label_maps_that_cannot_be_used_are_named(
    labels: np.ndarray, message: str, tmp_path: Path
) -> None:
    write_shapes(tmp_path, train=1, val=1)
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "images/val/000000.png")
    Image.fromarray(labels).save(tmp_path / "labels/val/000000.png")
    with pytest.raises(ConfigError, match=f"labels/val/000000.png: {message}"):
        shapes_data(tmp_path).whole(0)


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_damaged_files_are_named(kind: str, tmp_path: Path) -> None:
    write_shapes(tmp_path, train=1, val=1)
    (tmp_path / kind / "val" / "000000.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=f"{kind}/val/000000.png: cannot be read as an image"):
        shapes_data(tmp_path).whole(0)


def test_palette_positions_are_labels(tmp_path: Path) -> None:
    write_shapes(tmp_path, train=1, val=1)
    path = tmp_path / "labels/val/000000.png"
    grey = shapes_data(tmp_path).whole(0).labels
    colored = Image.fromarray(grey.numpy())
    colored.putpalette([9, 8, 7] * 256)
    assert colored.mode == "P"
    colored.save(path)
    assert torch.equal(shapes_data(tmp_path).whole(0).labels, grey)


@pytest.mark.parametrize(
    ("dataset", "classes", "message"),
    [
        ("folder", None, "classes: expected 2 to 255 for a folder, got None"),
        ("folder", 256, "classes: expected 2 to 255 for a folder, got 256"),
        ("ade20k", 150, "classes: expected none for ade20k, which has its own, got 150"),
        ("ade", None, "unknown dataset 'ade'; did you mean 'ade20k'"),
    ],
)
def test_senseless_datasets_are_refused(
    dataset: str, classes: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_label_maps(dataset, tmp_path, classes)


def test_colours_of_classes_differ_and_are_not_black() -> None:
    colors = distinct_colors(171)
    assert len(colors.unique(dim=0)) == 171
    assert int(colors.max(1).values.min()) > 100


# Views.


def speaking_pair(height: int, width: int) -> tuple[Image.Image, Image.Image]:
    """An image whose red says the class of each pixel, and the classes."""
    rows, columns = np.mgrid[:height, :width]
    labels = ((rows // 16 + 2 * (columns // 24)) % CLASSES).astype(np.uint8)
    pixels = np.repeat(labels[..., None] * np.uint8(STEP), 3, axis=2)
    return Image.fromarray(pixels), Image.fromarray(labels)


@pytest.mark.parametrize("seed", range(8))
def test_image_and_labels_are_cut_scaled_and_mirrored_alike(seed: int) -> None:
    view = random_view(*speaking_pair(120, 150), (48, 64), seed)
    assert view.images.shape == (3, 48, 64)
    assert view.labels.shape == (48, 64)
    told = (view.images[0].float() / STEP).round()
    # Between two classes the image is blurred.
    assert (told == view.labels).float().mean() > 0.9


def test_views_depend_on_their_seed_alone() -> None:
    one, same, other = (random_view(*speaking_pair(120, 150), (48, 64), seed) for seed in (3, 3, 4))
    assert torch.equal(one.images, same.images)
    assert torch.equal(one.labels, same.labels)
    assert not torch.equal(one.labels, other.labels)


def test_what_lies_beyond_an_image_is_ignored() -> None:
    white = Image.new("RGB", (40, 40), "white"), Image.new("L", (40, 40), 1)
    sides = []
    for seed in range(40):
        view = random_view(*white, (80, 80), seed)
        inside = view.labels == 1
        rows, columns = int(inside.any(1).sum()), int(inside.any(0).sum())
        assert inside[:rows, :columns].all()
        assert (view.labels[~inside] == IGNORED).all()
        outside = view.images[:, ~inside]
        assert (outside == torch.tensor(FILL)[:, None]).all()
        assert rows == columns
        sides.append(rows)
    # From half the size to twice the size, to which the image just fills the view.
    assert 20 <= min(sides) < 28
    assert 72 < max(sides) <= 80


def test_a_view_within_a_large_image_has_no_margin() -> None:
    large = Image.new("RGB", (300, 300)), Image.new("L", (300, 300), 1)
    for seed in range(20):
        assert (random_view(*large, (64, 96), seed).labels == 1).all()


def test_half_of_the_views_are_mirrored() -> None:
    dark_left = Image.new("L", (64, 64), 0)
    dark_left.paste(1, (32, 0, 64, 64))
    image = Image.new("RGB", (64, 64))
    # Large enough a frame that the whole image is always seen.
    views = [random_view(image, dark_left, (128, 128), seed).labels for seed in range(60)]
    mirrored = sum(int(view[0, 0]) for view in views)
    assert 18 < mirrored < 42


@pytest.mark.parametrize("sides", [(1, 1), (1, 200), (200, 1)])
def test_the_thinnest_images_have_views(sides: tuple[int, int]) -> None:
    thin = Image.new("RGB", sides), Image.new("L", sides, 1)
    for seed in range(5):
        view = random_view(*thin, (32, 32), seed)
        assert view.labels.shape == (32, 32)
        assert (view.labels == 1).any()


def test_a_padded_image_lies_in_the_upper_left_corner() -> None:
    pixels = torch.arange(6, dtype=torch.uint8).view(1, 2, 3)
    assert padded(pixels, (3, 4), [9]).tolist() == [[[0, 1, 2, 9], [3, 4, 5, 9], [9, 9, 9, 9]]]


def test_a_fitted_image_keeps_its_proportions() -> None:
    frame = fitted(torch.zeros(3, 20, 10, dtype=torch.uint8), (40, 40), InterpolationMode.NEAREST)
    assert (frame[:, :, :20] == 0).all()
    assert (frame[:, :, 20:] == 255).all()


def test_the_number_of_processes_that_read_changes_nothing(shapes: Path) -> None:
    views = partial(shapes_data(shapes).views, size=(32, 32))
    requests = [[(0, 1), (1, 2)], [(2, 3), (3, 4)], [(4, 5), (5, 6)]]
    alone, others = (list(made(views, requests, workers=workers, pin=False)) for workers in (0, 2))
    for one, other in zip(alone, others, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_used_is_named_by_any_process(workers: int, tmp_path: Path) -> None:
    write_shapes(tmp_path, train=1, val=1)
    data = shapes_data(tmp_path)
    (tmp_path / "images/val/000000.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"images/val/000000\.png: cannot be read"):
        list(made(data.whole, [0], workers=workers, pin=False))


# Batches and loss.


def epoch_of(task: SegmentationTask, epoch: int) -> Tensor:
    return torch.stack([batch.images for batch in task.batches(epoch)])


def test_batches_depend_on_seed_and_epoch_alone(shapes: Path) -> None:
    task, same, other = (small_task(shapes, seed=seed) for seed in (0, 0, 1))
    first = epoch_of(task, 0)
    assert len(first) == task.steps_per_epoch == 3
    assert not torch.equal(first, epoch_of(task, 1))
    assert torch.equal(first, epoch_of(same, 0))
    assert not torch.equal(first, epoch_of(other, 0))


def test_an_epoch_shows_every_image_once(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small_task(shapes)
    seen: list[int] = []

    def note(_data: LabelMaps, requests: list[tuple[int, int]], **_: Any) -> Labelled:
        seen.extend(position for position, _ in requests)
        return Labelled(torch.zeros(1), torch.zeros(1))

    monkeypatch.setattr(LabelMaps, "views", note)
    list(task.batches(0))
    assert sorted(seen) == list(range(6))


def test_an_epoch_may_begin_with_a_later_batch(
    shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = small_task(shapes)
    whole = list(task.batches(3))
    made_of: list[int] = []
    views = LabelMaps.views

    def note(data: LabelMaps, requests: list[tuple[int, int]], **sizes: Any) -> Labelled:
        made_of.append(len(requests))
        return views(data, requests, **sizes)

    monkeypatch.setattr(LabelMaps, "views", note)
    rest = list(task.batches(3, begin=1))
    assert made_of == [2, 2]
    for batch, expected in zip(rest, whole[1:], strict=True):
        assert batch.images.equal(expected.images)
        assert batch.labels.equal(expected.labels)


def test_processes_share_every_batch(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small_task(shapes)
    whole = epoch_of(task, 0)
    parts = []
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(epoch_of(task, 0))
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_the_loss_is_the_mean_over_the_pixels_that_count(shapes: Path) -> None:
    task = small_task(shapes)
    task.model.eval()
    batch = next(task.batches(0))
    with torch.no_grad():
        found = task.losses(batch)
        logits = task.model(
            (batch.images / 255 - torch.tensor(MEAN)[:, None, None])
            / torch.tensor(STD)[:, None, None]
        )
    chosen = batch.labels != IGNORED
    assert 0 < int(chosen.sum()) < chosen.numel()
    probabilities = logits.softmax(1).permute(0, 2, 3, 1)[chosen]
    expected = -probabilities[torch.arange(len(probabilities)), batch.labels[chosen].long()].log()
    assert list(found) == ["cross_entropy"]
    torch.testing.assert_close(found["cross_entropy"], expected.mean())


def test_a_batch_of_which_nothing_counts_trains_nothing(shapes: Path) -> None:
    task = small_task(shapes)
    images, labels = next(task.batches(0))
    loss = task.losses(Labelled(images, torch.full_like(labels, IGNORED)))["cross_entropy"]
    loss.backward()
    assert not loss.detach().any()
    gradients = [p.grad for p in task.model.parameters() if p.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


# Metrics.


def test_scores_equal_a_computation_by_hand() -> None:
    labels = torch.tensor([[0, 0, 0, 1], [1, 1, 2, IGNORED]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 3]])
    matrix = confusion(predicted, labels, 5)
    assert matrix[:3, :3].tolist() == [[2, 1, 0], [1, 2, 0], [0, 1, 0]]
    assert int(matrix.sum()) == 7
    # Classes 3 and 4 do not occur; the prediction of 3 does not count.
    found = scores(matrix)
    assert found["miou"] == pytest.approx((2 / 4 + 2 / 5 + 0) / 3)
    assert found["mean_accuracy"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert found["pixel_accuracy"] == pytest.approx(4 / 7)
    assert next(iter(found)) == "miou"


def test_scores_agree_with_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (3, 20, 30), generator=generator)
    predicted = torch.where(
        torch.rand(labels.shape, generator=generator) < 0.6,
        labels,
        torch.randint(5, labels.shape, generator=generator),
    )
    labels[:, :2] = IGNORED
    metric = MulticlassJaccardIndex(5, ignore_index=IGNORED)
    pairs = zip(predicted, labels.to(torch.uint8), strict=True)
    matrix = sum(confusion(*pair, 5) for pair in pairs)
    assert isinstance(matrix, Tensor)
    assert scores(matrix)["miou"] == pytest.approx(float(metric(predicted, labels)), abs=1e-6)


def test_a_result_of_no_pixels_is_refused() -> None:
    with pytest.raises(ConfigError, match="no pixel of the images to evaluate on"):
        scores(torch.zeros(3, 3, dtype=torch.int64))


class Listener(nn.Module):
    """Knows the classes of images that say them."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[2] % STRIDE == images.shape[3] % STRIDE == 0
        red = (images[:, 0] * STD[0] + MEAN[0]) * 255 / STEP
        return functional.one_hot(red.round().long(), 256).permute(0, 3, 1, 2).float()


@pytest.fixture
def told(tmp_path: Path) -> SegmentationTask:
    """A task with images that say their classes, of sizes that no network takes as they are."""
    write_shapes(tmp_path, train=2, val=2)
    for position, size in enumerate([(13, 50), (70, 33)]):
        for kind, picture in zip(("images", "labels"), speaking_pair(*size), strict=True):
            picture.save(tmp_path / kind / "val" / f"{position:06}.png")
    task = small_task(tmp_path)
    task.model = Listener()
    return task


def test_who_knows_all_classes_has_a_perfect_score(told: SegmentationTask) -> None:
    assert told.evaluate() == {"miou": 1.0, "mean_accuracy": 1.0, "pixel_accuracy": 1.0}


def test_processes_evaluate_all_images_together(
    told: SegmentationTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums: list[Tensor] = []

    def total(matrix: Tensor) -> Tensor:
        sums.append(matrix.clone())
        return matrix

    monkeypatch.setattr(distributed, "total", total)
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        told.evaluate()
    assert [int(matrix.sum()) for matrix in sums] == [13 * 50, 70 * 33]


def test_pictures_show_image_truth_and_prediction_side_by_side(told: SegmentationTask) -> None:
    pictures = told.pictures(5)
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (2, 3, 320, 3 * 320)
    _, truth, prediction = pictures.split(320, dim=3)
    assert torch.equal(truth, prediction)
    shown = {
        tuple(color) for color in truth.permute(0, 2, 3, 1).flatten(0, 2).unique(dim=0).tolist()
    }
    assert shown == {tuple(color) for color in distinct_colors(CLASSES).tolist()} | {(255,) * 3}


def test_pixels_that_do_not_count_are_black_in_pictures(shapes: Path) -> None:
    task = small_task(shapes)
    truth = task.pictures(1)[0, :, :, 320:640]
    assert (truth == 0).all(0).any()


# Configuration.


@pytest.mark.parametrize(
    ("recipe", "lr", "batch", "crop"),
    [
        ("cityscapes", 0.01, 8, (512, 1024)),
        ("ade20k", 0.02, 16, (512, 512)),
        ("coco_stuff", 0.02, 16, (512, 512)),
    ],
)
def test_recipes_are_those_of_the_paper(
    recipe: str, lr: float, batch: int, crop: tuple[int, int]
) -> None:
    flags = ["--recipe", recipe, "--data", "images", "--output", "here"]
    config, resume = parse(SegmentationConfig, flags, "mtkd transfer segmentation")
    assert not resume
    assert (config.dataset, config.batch_size, config.crop) == (recipe, batch, crop)
    assert config.schedule == Schedule(kind="poly", lr=lr, power=0.9, iterations=80_000)
    assert (config.model, config.backbone, config.recipe) == ("deeplabv3", "resnet34", recipe)


def test_a_recipe_of_another_program_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("modell: pspnet\n")
    flags = ["--recipe", str(recipe), "--data", "images", "--output", "here"]
    with pytest.raises(ConfigError, match=r"mine\.yaml: modell: unknown key; did you mean"):
        parse(SegmentationConfig, flags, "mtkd transfer segmentation")


def test_a_kept_configuration_gives_an_equal_one(tmp_path: Path) -> None:
    config = small_config(tmp_path, output=str(tmp_path / "run"))
    kept = tmp_path / "config.yaml"
    kept.write_text(config.to_yaml())
    assert parse(SegmentationConfig, ["--config", str(kept)], "mtkd transfer segmentation") == (
        config,
        False,
    )


def test_a_length_in_a_flag_takes_the_place_of_the_other() -> None:
    flags = ["--data", "images", "--output", "here", "--schedule.epochs", "3"]
    config, _ = parse(SegmentationConfig, flags, "mtkd transfer segmentation")
    assert (config.schedule.epochs, config.schedule.iterations) == (3, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crops", "64"], "--crops: unknown flag; did you mean '--crop'"),
        (["--recipe", "cityscape"], "unknown recipe 'cityscape'; did you mean 'cityscapes'"),
        (["--recipe", "mine.yaml"], "--recipe: mine.yaml: No such file"),
        (["--model", "psp"], "unknown segmenter 'psp'; did you mean 'pspnet'"),
        (["--backbone", "resnet101"], "unknown backbone 'resnet101'"),
        (["--dataset", "coco"], "unknown dataset 'coco'; did you mean 'coco_stuff'"),
        (["--crop", "[60, 64]"], r"crop: expected multiples of 8, got \[60, 64\]"),
        (["--crop", "[0, 64]"], r"crop: expected multiples of 8, got \[0, 64\]"),
        (["--batch_size", "1"], "batch_size: expected at least 2"),
        (["--batch_size", "0"], "batch_size: expected at least 1, got 0"),
        (["--workers", "-1"], "workers: expected a finite number >= 0, got -1"),
        (["--threads", "0"], "threads: expected 1 to 4096, got 0"),
        (["--seed", "-1"], "seed: expected a finite number >= 0, got -1"),
        (["--evaluate_every", "-1"], "evaluate_every: expected a finite number >= 0, got -1"),
        (["--precision", "fp8"], "unknown precision 'fp8'"),
        (["--resume", "nowhere"], "--resume: nowhere/config.yaml: No such file"),
        (["--resume", "x", "--recipe", "ade20k"], "--recipe: cannot be given with --resume"),
    ],
)
def test_values_that_cannot_be_used_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(
            SegmentationConfig,
            ["--data", "d", "--output", "o", *flags],
            "mtkd transfer segmentation",
        )


def test_a_batch_larger_than_the_dataset_is_refused(shapes: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size: expected at most 6, the number of images"):
        small_task(shapes, batch_size=7)


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "processes", lambda: 4)
    config = TransferConfig(data="d", output="o", batch_size=6)
    with pytest.raises(ConfigError, match="batch_size: expected a multiple of 4, the number of"):
        config.steps_per_epoch(100)


def test_every_shipped_recipe_says_what_it_is() -> None:
    for path in RECIPES.glob("*.yaml"):
        assert path.read_text().startswith("# "), path


# The whole program.


def flags_of(root: Path, output: Path) -> list[str]:
    words = (
        f"--data {root} --output {output} --model pspnet --backbone resnet18 --classes 4 "
        "--batch_size 2 --schedule.lr 0.01 --schedule.iterations 2 --evaluate_every 0 "
        "--workers 0 --device cpu"
    )
    return [*words.split(), "--crop", "[32, 32]"]


def test_a_run_leaves_its_result_and_can_be_gone_on_with(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    flags = flags_of(shapes, folder)
    assert segmentation.main(flags) == 0
    shown = capsys.readouterr().out
    assert "begins with a random resnet18 (--weights would say which" in shown
    assert "miou" in shown
    result = json.loads((folder / "result.json").read_text())
    assert set(result["metrics"]) == {"miou", "mean_accuracy", "pixel_accuracy"}
    with Image.open(folder / "predictions.png") as pictures:
        assert pictures.width > 2 * 960

    assert segmentation.main(flags) == 2
    assert "holds a run already; --resume goes on with it" in capsys.readouterr().err
    assert segmentation.main(["--resume", str(folder)]) == 0
    assert f"miou {result['metrics']['miou']:.4f}" in capsys.readouterr().out
    assert segmentation.main(["--resume", str(folder), "--model", "deeplabv3"]) == 2
    assert "another configuration: model deeplabv3 instead of pspnet" in capsys.readouterr().err


def test_weights_are_what_the_backbone_begins_with(shapes: Path, tmp_path: Path) -> None:
    state = {k: v for k, v in resnet18().state_dict().items() if not k.startswith("fc.")}
    path = tmp_path / "backbone.pt"
    torch.save(state, path)
    task = small_task(shapes, weights=str(path))
    for key, value in task.model.get_submodule("encoder").state_dict().items():
        assert torch.equal(value, state[key]), key
    with pytest.raises(ConfigError, match="weights: not the backbone of this network"):
        small_task(shapes, weights=str(path), backbone="resnet34")


@pytest.mark.gpu
def test_a_gpu_trains_and_evaluates_in_half_precision(shapes: Path, tmp_path: Path) -> None:
    flags = [*flags_of(shapes, tmp_path / "run"), "--device", "cuda", "--precision", "bf16"]
    assert segmentation.main(flags) == 0


def gradients_of_a_batch(root: Path) -> list[Tensor]:
    """The loss of this process's part of a batch, and gradients of the whole batch."""
    task = small_task(root, batch_size=4)
    distributed.synchronize_norms(task.model)
    for module in task.model.modules():
        if isinstance(module, nn.Dropout2d):
            # Its pattern would depend on the number of processes.
            module.p = 0.0
    # In float32 a ReLU that rounding lets through in one of them alone hides what is compared.
    task.model.double().register_forward_pre_hook(lambda _, images: images[0].double())
    loss = task.losses(next(task.batches(0)))["cross_entropy"]
    loss.backward()
    distributed.average_gradients(task.model.parameters())
    gradients = [p.grad for p in task.model.parameters() if p.grad is not None]
    return [loss.detach(), *gradients]


@pytest.mark.slow
def test_two_processes_have_the_loss_and_the_gradients_of_one(shapes: Path, tmp_path: Path) -> None:
    loss, *alone = gradients_of_a_batch(shapes)
    with two_processes(tmp_path) as pair:
        (first, *shared), (second, *same) = pair(gradients_of_a_batch, shapes)
    torch.testing.assert_close((first + second) / 2, loss)
    for one, two, three in zip(alone, shared, same, strict=True):
        assert torch.equal(two, three)
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-9 * float(one.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("deeplabv3", 0.5), ("pspnet", 0.5)])
def test_a_segmenter_learns_shapes(name: str, least: float, tmp_path: Path) -> None:
    write_shapes(tmp_path)
    config = small_config(
        tmp_path,
        model=name,
        crop=(64, 64),
        batch_size=16,
        schedule=Schedule(kind="poly", lr=0.02, iterations=150),
        evaluate_every=0,
    )
    task = SegmentationTask(config, torch.device("cpu"))
    task.model.eval()
    untrained = task.evaluate()["miou"]
    trained = SegmentationRun(config).complete(tmp_path / "run").metrics["miou"]
    assert untrained < 0.2
    assert trained > least
