import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision import models

import mtkd_env
from fake_datasets import write_images
from mtkd_env import ConfigError, load_student
from mtkd_env.data import ImageSet
from mtkd_env.data.preprocessing import Preprocessing
from mtkd_env.files import DESCRIPTION, TENSORS
from mtkd_env.networks import build_network
from mtkd_env.networks.base import Network
from mtkd_env.student import FILES, STEMS, save_student
from students import describe
from tiny import data, generator, load_dataset

# What they are made of; of every kind of names one.
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet8": {"width": 0.25},
    "torchvision:shufflenet_v2_x0_5": {},
    "timm:resnet10t": {"arguments": {"drop_path_rate": 0.1}},
    "users_networks:Plain@body": {"width": 4.0},
}


def make(name: str, folder: Path, *, channels: int = 3, which: str = "last") -> Network:
    """A network whose running statistics are not those of a new one, saved."""
    about = describe(name, shape=(channels, 32, 32), **NETWORKS[name])
    network = about.build(seed=1)
    with torch.no_grad():
        network(torch.randn(4, channels, 32, 32, generator=generator(0)))
    save_student(folder, network, about, which=which)
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_student_is_what_was_saved(name: str, tmp_path: Path) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    network = make(name, tmp_path)
    student = load_student(tmp_path, trust=True)
    images = torch.randn(2, 3, 32, 32, generator=generator(1))
    assert not student.training
    with torch.no_grad():
        assert torch.equal(student(images), network(images).logits)
    assert {path.name for path in tmp_path.iterdir()} == {"student.json", "student.safetensors"}


@pytest.mark.parametrize("channels", [3, 1])
def test_torchvision_loads_its_students_whole(channels: int, tmp_path: Path) -> None:
    network = make("torchvision:shufflenet_v2_x0_5", tmp_path, channels=channels)
    model = models.shufflenet_v2_x0_5(num_classes=7)
    if channels == 1:
        model.conv1[0] = torch.nn.Conv2d(1, 24, 3, 2, 1, bias=False)
    model.load_state_dict(load_file(tmp_path / "student.safetensors"))
    images = torch.randn(2, channels, 32, 32, generator=generator(1))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), network(images).logits)


def test_timm_loads_its_students_whole(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = make("timm:resnet10t", tmp_path)
    model = timm.create_model("resnet10t", num_classes=7)
    model.load_state_dict(load_file(tmp_path / "student.safetensors"))
    images = torch.randn(2, 3, 32, 32, generator=generator(1))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), network(images).logits)


# Which one.


def test_the_best_student_comes_first_and_each_can_be_asked_for(tmp_path: Path) -> None:
    network = build_network("resnet8", num_classes=7, width=0.25, seed=0)
    for which, epoch in (("last", 3), ("best", 2)):
        about = describe("resnet8", network, width=0.25, metrics={"epoch": epoch})
        save_student(tmp_path, network, about, which=which)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    found = [load_student(tmp_path, which).about.metrics["epoch"] for which in (None, *STEMS)]
    assert found == [2, 3, 2]


# Images.


@pytest.fixture(scope="module")
def folder_data(tmp_path_factory: pytest.TempPathFactory) -> ImageSet[Any]:
    root = tmp_path_factory.mktemp("folder")
    write_images(root)
    return load_dataset("folder", root=root, image_size=16, resize=20, workers=0)


@pytest.mark.parametrize("kind", ["in memory", "in files"])
def test_images_are_prepared_as_they_were_evaluated(
    kind: str, folder_data: ImageSet[Any], tmp_path: Path
) -> None:
    images: ImageSet[Any] = data() if kind == "in memory" else folder_data
    split = images.split().test
    batch = next(images.evaluation_batches(split, 3, device="cpu"))
    if kind == "in files":
        paths = split.paths(range(3))
    else:
        paths = [str(tmp_path / f"{number}.png") for number in range(3)]
        for path, pixels in zip(paths, split.images, strict=False):
            Image.fromarray(pixels[0].numpy()).save(path)
    found = torch.stack([images.preprocessing(path) for path in paths])
    assert torch.equal(found, batch.inputs)


@pytest.mark.parametrize("size", [(8, 8), (20, 31), (5, 6)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_pictures_of_any_size_and_colours_fit(size: tuple[int, int], mode: str) -> None:
    image = Image.new(mode, size)
    for channels in (1, 3):
        shape = (channels, 8, 8)
        prepared = Preprocessing(shape, (0.5,) * channels, (0.25,) * channels)
        assert torch.equal(prepared(image), torch.full(shape, -2.0))


def test_other_numbers_of_channels_are_no_pictures() -> None:
    prepared = Preprocessing((4, 8, 8), (0.5,) * 4, (0.25,) * 4)
    with pytest.raises(ConfigError, match="images with 4 channels are not read from pictures"):
        prepared(Image.new("RGB", (8, 8)))


def test_probabilities_are_those_of_the_logits(tmp_path: Path) -> None:
    make("resnet8", tmp_path)
    student = load_student(tmp_path)
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    image.save(tmp_path / "a.png")
    found = student.predict(image, tmp_path / "a.png")
    with torch.no_grad():
        expected = student(student.transform(image).unsqueeze(0)).softmax(1)
    torch.testing.assert_close(found, expected.repeat(2, 1))


def test_equal_names_of_classes_get_their_numbers() -> None:
    assert describe("resnet8", num_classes=2).classes == ("0", "1")
    names = describe("resnet8", num_classes=3, class_names=("crane", "cat", "crane"))
    assert names.classes == ("crane (0)", "cat", "crane (2)")


# What cannot be loaded.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make("resnet8", tmp_path)
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    path = folder / "student.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def complaint(folder: Path, which: str | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_student(folder, which)
    return str(error.value)


def test_what_is_not_there_is_named(saved: Path) -> None:
    assert complaint(saved / "other").startswith(f"{saved / 'other' / 'student.json'}: no such")
    assert "validation images (data.val_fraction)" in complaint(saved, "best")
    assert complaint(saved, "bset").startswith("unknown student 'bset'; did you mean 'best'")
    (saved / "student.safetensors").unlink()
    assert complaint(saved).startswith(f"{saved / 'student.safetensors'}: no such file")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"network": "resnet9"}, "student.json: unknown network 'resnet9'; did you mean 'resnet8'"),
        ({"num_classes": 9}, "'classifier.weight' of shape (7, 16), the network expects (9, 16)"),
        ({"class_name": []}, "student.json: class_name: unknown key; did you mean 'class_names'"),
        ({"num_classes": "many"}, "student.json: num_classes: expected int, got 'many'"),
        ({"preprocessing": {"mean": [0.5]}}, "preprocessing: lacks the key 'image_shape'"),
        ({"sha256": "0" * 64}, "holds other tensors than student.json was written for"),
    ],
)
def test_a_description_of_something_else_is_refused(
    saved: Path, values: dict[str, Any], expected: str
) -> None:
    change(saved, **values)
    assert re.search(re.escape(expected), complaint(saved))


def test_a_damaged_description_is_refused(saved: Path) -> None:
    (saved / "student.json").write_text("{")
    assert complaint(saved).startswith(f"{saved / 'student.json'}: not valid JSON (")


def test_the_package_names_what_loads_students() -> None:
    assert {"Student", "load_student"} <= set(mtkd_env.__all__)
    assert (TENSORS, DESCRIPTION) == (".safetensors", ".json")
