"""Teachers whose images are not like the student's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import ResNet18_Weights, WeightsEnum
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from mtkd_env.computing import Computing
from mtkd_env.data import ImageData
from mtkd_env.errors import ConfigError
from mtkd_env.files import save_checkpoint
from mtkd_env.networks import Network, build_network
from mtkd_env.networks.libraries import published_input
from mtkd_env.optimization import Recipe
from mtkd_env.options import build
from mtkd_env.teachers import (
    PoolSpec,
    StoreSpec,
    TeacherEnsemble,
    TeacherSpec,
    TrainingSet,
)
from mtkd_env.teachers.inputs import InputSpec, TeacherView, teacher_view
from mtkd_env.teachers.pool import build_pool
from mtkd_env.teachers.preparation import prepare_teachers
from tiny import CLASSES, Told, batch, perturb, training_set


def colours(side: int = 8) -> ImageData:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (24, 3, side, side), generator=draw).to(torch.uint8)
    targets = torch.arange(24) % CLASSES
    return ImageData(
        "colours", images, targets, images, targets, CLASSES, flip=True, crop_padding=1
    )


def normalised(data: ImageData, images: Tensor) -> Tensor:
    return (images / 255 - data.mean[:, None, None]) / data.std[:, None, None]


def view_of(spec: InputSpec, data: ImageData) -> TeacherView:
    view = teacher_view(spec, {}, data)
    assert view is not None
    return view


def said(**fields: Any) -> InputSpec:
    """An input as a file says it."""
    return build(InputSpec, fields)


MEAN, STD = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
CAFFE = (103.939, 116.779, 123.68)


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers)[:, None, None]


SAME_SIZE: dict[str, tuple[dict[str, Any], Any]] = {
    "mean and std": (
        {"mean": MEAN, "std": STD},
        lambda x: (x / 255 - column(*MEAN)) / column(*STD),
    ),
    "one number": ({"mean": 0.5, "std": 0.5}, lambda x: x / 127.5 - 1),
    "unit range": ({"range": (0, 1)}, lambda x: x / 255),
    "symmetric range": ({"range": (-1, 1)}, lambda x: x / 127.5 - 1),
    "bgr": (
        {"channels": "bgr", "range": (0, 255), "mean": CAFFE},
        lambda x: x.flip(1).float() - column(*CAFFE),
    ),
    "gray": (
        {"channels": "gray", "range": (0, 255)},
        lambda x: (x * column(0.299, 0.587, 0.114)).sum(1, keepdim=True),
    ),
}


@pytest.mark.parametrize("case", SAME_SIZE)
def test_a_view_is_what_the_teachers_own_transform_makes_of_the_image(case: str) -> None:
    fields, expected = SAME_SIZE[case]
    data = colours()
    found = view_of(said(**fields), data)(normalised(data, data.x_test))
    torch.testing.assert_close(found, expected(data.x_test), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [5, 20, (12, 9)])
def test_a_view_of_another_size_is_resized_as_by_torchvision(
    interpolation: str, size: int | tuple[int, int]
) -> None:
    data = colours()
    view = view_of(said(size=size, interpolation=interpolation, range=(0, 1)), data)
    sides = [size, size] if isinstance(size, int) else list(size)
    mode = InterpolationMode("nearest-exact" if interpolation == "nearest" else interpolation)
    expected = resize(data.x_test / 255, sides, mode)
    found = view(normalised(data, data.x_test))
    assert view.image_shape == (3, *sides)
    torch.testing.assert_close(found, expected.clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_only_the_size_changes_if_only_a_size_is_said() -> None:
    data = colours()
    inputs = normalised(data, data.x_test)
    found = view_of(InputSpec(size=16), data)(inputs)
    expected = functional.interpolate(inputs, (16, 16), mode="bilinear")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gray_images_are_repeated_for_a_teacher_of_colours() -> None:
    data = training_set().data
    view = teacher_view(InputSpec(channels="rgb"), {}, data)
    assert view is not None
    inputs = batch().inputs
    torch.testing.assert_close(view(inputs), inputs.expand(-1, 3, -1, -1))


def test_a_teacher_with_the_students_images_has_no_view() -> None:
    data = colours()
    assert teacher_view(InputSpec(), {}, data) is None
    mean, std = (tuple(one.tolist()) for one in (data.mean, data.std))
    same = InputSpec(mean=mean, std=std, size=8, interpolation="bicubic", channels="rgb")
    assert teacher_view(same, {}, data) is None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "std": ({"std": (0.1, 0.0, 0.1)}, "std: expected a finite number > 0, got 0.0"),
    "size": ({"size": 0}, "size: expected at least 1, got 0"),
    "interpolation": ({"interpolation": "cubic"}, "interpolation: .*did you mean 'bicubic'"),
    "channels": ({"channels": "rbg"}, "channels: .*did you mean 'rgb'"),
    "range": ({"range": (255, 0)}, "range: expected the value of black and a larger one of white"),
    "mean": ({"mean": (0.5, 0.5)}, "mean: expected 1 or 3 numbers, got 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_inputs_that_cannot_be_are_refused(case: str) -> None:
    fields, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        teacher_view(said(**fields), {}, colours())


class Counted(TeacherView):
    calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        Counted.calls += 1
        return super().forward(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", ["gray", "bgr"])
def test_a_view_is_made_without_waiting_for_the_gpu(channels: str) -> None:
    data = colours()
    view = view_of(said(range=(0, 255), size=16, channels=channels), data)
    inputs = normalised(data, data.x_test)
    expected = view(inputs)
    view, inputs = view.to("cuda"), inputs.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = view(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-2)


def test_teachers_of_one_input_share_their_images() -> None:
    data = colours()
    spec = view_of(said(range=(0, 1)), data).spec
    networks = [perturb(small(), seed) for seed in range(3)]
    views = {name: Counted(spec, data.mean, data.std) for name in "ab"}
    ensemble = TeacherEnsemble(networks, "abc", views=views)
    inputs = normalised(data, data.x_test)
    found = ensemble(inputs).logits
    assert Counted.calls == 1
    for m, images in enumerate((data.x_test / 255, data.x_test / 255, inputs)):
        expected = networks[m](images).logits
        torch.testing.assert_close(found[m], expected, rtol=1e-4, atol=1e-4)


def small() -> Network:
    return build_network("resnet8", num_classes=CLASSES, width=0.125, seed=0)


def pool_of(folder: Path, network: nn.Module, **about: Any) -> TeacherSpec:
    save_checkpoint(folder / "north.pt", {"model": network.state_dict(), **about})
    return TeacherSpec("resnet8", "north", width=0.125, checkpoint=str(folder / "north.pt"))


def test_a_teacher_is_measured_and_asked_on_its_own_input(tmp_path: Path) -> None:
    network, data = perturb(small(), 3), colours()
    spec = replace(pool_of(tmp_path, network), input=said(range=(0, 255), size=12))
    pool = build_pool(PoolSpec((spec,)), TrainingSet(data, data.split()), cache=tmp_path)
    own = functional.interpolate(data.x_test.float(), (12, 12), mode="bilinear")
    expected = network(own).logits
    accuracy = (expected.argmax(1) == data.y_test).float().mean().item()
    assert pool.evaluations["north"].accuracy == pytest.approx(accuracy)
    found = pool.ensemble(normalised(data, data.x_test)).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


def test_a_teacher_is_trained_on_its_own_input(tmp_path: Path) -> None:
    data = colours()
    spec = PoolSpec(
        (TeacherSpec("resnet8", width=0.125, input=InputSpec(channels="gray", size=16)),),
        recipe=Recipe(epochs=1),
        batch_size=8,
    )
    pool = build_pool(spec, TrainingSet(data, data.split()), cache=tmp_path)
    found = pool.ensemble(normalised(data, data.x_test)).feature_maps[0]
    assert found.shape[2:] == (4, 4)


def prepared(spec: TeacherSpec, data: ImageData, cache: Path, **store: Any) -> list[str]:
    images, told = TrainingSet(data, data.split()), Told()
    prepare_teachers(
        PoolSpec((spec,), store=StoreSpec(**store)),
        images,
        images.stream(8, torch.device("cpu"), 0),
        val_fraction=0.0,
        computing=Computing(cache=str(cache)),
        device=torch.device("cpu"),
        progress=told,
    )
    return told.notes


def test_stores_know_of_the_input(tmp_path: Path) -> None:
    spec, data = pool_of(tmp_path, small()), colours()
    for used in (spec, spec, replace(spec, input=said(range=(0, 1)))):
        prepared(used, data, tmp_path, place="disk")
    assert len(list((tmp_path / "teacher_outputs").iterdir())) == 2


def test_a_teacher_from_a_file_that_seems_wrong_is_warned_of(tmp_path: Path) -> None:
    network, data = perturb(small(), 3), colours()
    (line,) = prepared(pool_of(tmp_path, network), data, tmp_path)
    accuracy = float(line.removeprefix("teacher north: ").partition("%")[0]) / 100
    assert ("near chance, 25.00%" in line) == (accuracy < 0.25 + 0.1 * 0.75)
    said = network(normalised(data, data.x_test)).logits.argmax(1)
    learned = replace(data, y_test=said, y_train=said)
    (line,) = prepared(pool_of(tmp_path, network), learned, tmp_path)
    assert line == "teacher north: 100.00% of the test images"
    half = torch.where(torch.arange(24) < 12, said, (said + 1) % CLASSES)
    (line,) = prepared(
        pool_of(tmp_path, network, best_acc=79.4), replace(data, y_test=half), tmp_path
    )
    assert line.startswith(
        "teacher north: 50.00% of the test images; WARNING: 79.40% is stated of its weights"
    )


def test_a_teacher_of_some_classes_is_told_of_on_these_and_on_all(tmp_path: Path) -> None:
    data = colours()
    two = build_network("resnet8", num_classes=2, width=0.125, seed=0)
    known = two(normalised(data, data.x_test)).logits.argmax(1)
    # Of every second image the class is one that it does not know.
    labels = torch.where(torch.arange(24) % 2 == 0, known, 3)
    spec = replace(pool_of(tmp_path, two), classes=(0, 1))
    (line,) = prepared(spec, replace(data, y_test=labels), tmp_path)
    assert line == "teacher north: 100.00% of the test images of its 2 classes, 50.00% of all"


def test_a_published_accuracy_is_compared_on_the_classes_that_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = ResNet18_Weights.IMAGENET1K_V1
    model = torchvision.models.resnet18(num_classes=CLASSES)
    meta = {"categories": ["a", "b", "c", "d"], "_metrics": {"ImageNet-1K": {"acc@1": 99.5}}}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: model.state_dict())
    monkeypatch.setattr(WeightsEnum, "meta", meta)
    teacher = TeacherSpec("torchvision:resnet18", "north", checkpoint=weights.name)
    spec, data = PoolSpec(teachers=(replace(teacher, input=InputSpec(size=32)),)), colours(32)
    stated = {}
    for names in (("a", "b", "c", "d"), ("b", "a", "c", "d"), ()):
        named = replace(data, class_names=names)
        stated[names] = build_pool(spec, TrainingSet(named, named.split()), cache=tmp_path).stated
    assert list(stated.values()) == [{"north": 0.995}, {}, {}]


def test_modules_in_memory_are_told_of_too(tmp_path: Path) -> None:
    (line,) = prepared(TeacherSpec(small(), "mine"), colours(), tmp_path)
    assert line.startswith("teacher mine: ")


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        (
            "torchvision:vit_b_16",
            "IMAGENET1K_SWAG_E2E_V1",
            {"size": 384, "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406)},
        ),
        ("torchvision:resnet18", "mine.pt", {}),
        ("resnet8", "IMAGENET1K_V1", {}),
    ],
)
def test_the_input_of_published_weights_is_known(
    name: str, weights: str, expected: dict[str, Any]
) -> None:
    found = published_input(name, weights)
    assert {key: found[key] for key in expected} == expected
    assert bool(found) == bool(expected)


def test_what_a_user_says_comes_before_what_is_published() -> None:
    data = colours()
    published = published_input("torchvision:resnet18", "IMAGENET1K_V1")
    view = teacher_view(InputSpec(size=32), published, data)
    assert view is not None
    assert view.spec.size == (32, 32)
    assert view.spec.mean == pytest.approx((0.485, 0.456, 0.406))
