import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

import mtkd_env
import users_networks
from experiments.export import main
from experiments.transfer.backbones import (
    ABOUT,
    SAFETENSORS,
    TORCH,
    export_backbone,
    fill,
    load_backbone,
    takers,
)
from mtkd_env import ConfigError
from mtkd_env.files import file_digest, save_checkpoint
from mtkd_env.networks import build_network
from mtkd_env.networks.base import Network
from mtkd_env.student import save_student
from students import describe

CLASSES = 7
TOLERANCE = 1e-5


def make_student(name: str, channels: int = 3, size: int = 32, **arguments: Any) -> Network:
    """A network whose running statistics are those of some images, not those of a new one."""
    network = build_network(
        name,
        num_classes=CLASSES,
        in_channels=channels,
        image_size=(size, size),
        seed=0,
        **arguments,
    )
    with torch.no_grad():
        network(images(4, channels, size, seed=1))
    return network.eval()


def images(count: int = 2, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, generator=generator)


def make_run(folder: Path, network: str, student: Network, **changes: Any) -> Path:
    save_student(folder, student, describe(network, student, **changes))
    return folder


@pytest.fixture(scope="module")
def student() -> Network:
    return make_student("torchvision:resnet18")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, student: Network) -> Path:
    """An export of a ResNet-18."""
    root = tmp_path_factory.mktemp("export")
    export_backbone(make_run(root / "run", "torchvision:resnet18", student), root / "out")
    return root / "out"


@torch.no_grad()
def assert_same_map(
    student: Network, features: Callable[[Tensor], Tensor], channels: int = 3, size: int = 32
) -> None:
    inputs = images(2, channels, size)
    expected = student(inputs).feature_map
    torch.testing.assert_close(features(inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)


# What takes it.


def test_torchvision_takes_it_and_lacks_the_classifier_alone(
    folder: Path, student: Network
) -> None:
    model = models.resnet18(weights=None)
    found = model.load_state_dict(torch.load(folder / TORCH), strict=False)
    assert found.missing_keys == ["fc.weight", "fc.bias"]
    assert found.unexpected_keys == []
    model.fc = nn.Identity()
    with torch.no_grad():
        expected = student(images()).feature
        torch.testing.assert_close(model.eval()(images()), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_timm_takes_all_of_it(folder: Path, student: Network) -> None:
    model = timm.create_model("resnet18", num_classes=0)
    model.load_state_dict(load_file(folder / SAFETENSORS))
    assert_same_map(student, model.eval().forward_features)


def test_segmentation_models_take_all_of_it(folder: Path, student: Network) -> None:
    encoder = segmentation_models_pytorch.encoders.get_encoder("resnet18", weights=None)
    fill(encoder, load_backbone(folder / SAFETENSORS))
    assert_same_map(student, lambda inputs: encoder.eval()(inputs)[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    ["timm:resnet18", "torchvision:resnet34", "torchvision:resnet50", "timm:resnet50"],
)
def test_resnets_have_the_names_of_torchvision(tmp_path: Path, network: str) -> None:
    student = make_student(network)
    exported = export_backbone(make_run(tmp_path / "run", network, student), tmp_path)
    name = network.partition(":")[2]
    model = models.get_model(name)
    fill(model_without_classifier(model), load_backbone(tmp_path / TORCH))
    assert exported.parameters == sum(p.numel() for p in model.parameters())
    assert_same_map(student, map_of(model.eval()))
    encoder = segmentation_models_pytorch.encoders.get_encoder(name, weights=None)
    fill(encoder, load_backbone(tmp_path / SAFETENSORS))
    assert_same_map(student, lambda inputs: encoder.eval()(inputs)[-1])


def model_without_classifier(model: nn.Module) -> nn.Module:
    model.fc = nn.Identity()
    return model


def map_of(resnet: nn.Module) -> nn.Module:
    """A ResNet of torchvision's without its pooling."""
    return nn.Sequential(*list(resnet.children())[:-2])


# One network for each kind of name: channels and size of its images, and arguments of the student.
OTHERS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "of the table": ("resnet8", 1, 32, {}),
    "a wide one": ("resnet8", 3, 32, {"width": 2.0}),
    "timm's": ("timm:resnet10t", 3, 32, {"drop_path_rate": 0.1}),
    "a transformer": ("timm:deit_tiny_distilled_patch16_224", 3, 32, {"img_size": 32, "depth": 1}),
    "for grey images": ("timm:resnet18", 1, 32, {}),
    "the user's": ("users_networks:Plain@body", 3, 32, {}),
    "the user's Network": ("users_networks:Own", 1, 32, {}),
}


SLOW: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "torchvision's": ("torchvision:mobilenet_v3_small", 3, 32, {}),
}
CASES = [*OTHERS, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_to_take_it_lacks_the_classifier_alone(tmp_path: Path, case: str) -> None:
    name, channels, size, arguments = (OTHERS | SLOW)[case]
    student = make_student(name, channels, size, **arguments)
    own = {key: value for key, value in arguments.items() if key != "width"}
    width = arguments.get("width", 1.0)
    shape = (channels, size, size)
    run = make_run(tmp_path / "run", name, student, shape=shape, width=width, arguments=own)
    exported = export_backbone(run, tmp_path / "out", trust=True)
    state = load_backbone(tmp_path / "out")
    for taker in exported.loads_into:
        if " with " in taker:
            continue
        model = evaluated(taker)
        model.load_state_dict(dict(state), strict=False)
        assert state.keys() <= model.state_dict().keys()
        missing = model.state_dict().keys() - state.keys()
        assert all("classifier" in key or "head" in key or "fc" in key for key in missing)
        if isinstance(model, Network):
            assert_same_map(student, model.eval().features, channels, size)


def evaluated(taker: str) -> nn.Module:
    names = {"torchvision": torchvision, "timm": timm, "mtkd_env": mtkd_env, "C": CLASSES}
    names |= {"segmentation_models_pytorch": segmentation_models_pytorch}
    names |= {"users_networks": users_networks}
    found = eval(taker, names)
    return found if isinstance(found, nn.Module) else found(num_classes=CLASSES)


def test_torchvision_has_no_resnet_for_grey_images() -> None:
    grey = takers(describe("torchvision:resnet18", None, shape=(1, 32, 32)))
    assert grey[0].endswith(" with a first convolution of 1 channels")
    assert "in_chans=1" in grey[1]
    assert "in_channels=1" in grey[2]


# What is written.


def test_both_files_hold_the_same_floats_of_the_cpu(folder: Path, student: Network) -> None:
    first, second = load_backbone(folder / TORCH), load_backbone(folder / SAFETENSORS)
    own = {name.partition(".")[2]: tensor for name, tensor in student.state_dict().items()}
    assert first.keys() == second.keys() == own.keys() - {"fc.weight", "fc.bias"}
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert torch.equal(tensor, own[name])
        expected = torch.float32 if tensor.is_floating_point() else torch.int64
        assert (tensor.dtype, tensor.device.type) == (expected, "cpu")


def test_half_precision_is_widened(tmp_path: Path) -> None:
    student = make_student("resnet8").half()
    export_backbone(make_run(tmp_path / "run", "resnet8", student), tmp_path)
    state = load_backbone(tmp_path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}


def test_the_description_names_student_run_and_digests(folder: Path) -> None:
    about = json.loads((folder / ABOUT).read_text())
    assert about["student"] == json.loads((folder.parent / "run" / "student.json").read_text())
    assert about["run"] == str(folder.parent / "run")
    assert about["parameters"] == 11_689_512 - 512 * 1000 - 1000
    assert about["digests"] == {name: file_digest(folder / name) for name in (TORCH, SAFETENSORS)}


def test_the_program_writes_into_the_run_and_says_what_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", "resnet8", make_student("resnet8"))
    assert main([str(run)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{run / 'backbone'}: 54 tensors of resnet8, 77,392 parameters"
    assert out[1].startswith("loads into mtkd_env.networks.build_network('resnet8'")
    assert sorted(path.name for path in (run / "backbone").iterdir()) == [ABOUT, TORCH, SAFETENSORS]


def test_a_second_export_replaces_the_first(tmp_path: Path) -> None:
    for seed in (0, 1):
        student = build_network("resnet8", num_classes=CLASSES, seed=seed)
        run = make_run(tmp_path / f"run{seed}", "resnet8", student)
        export_backbone(run, tmp_path / "out")
    stem = load_backbone(tmp_path / "out")["stem.0.weight"]
    assert torch.equal(stem, student.state_dict()["stem.0.weight"])


# What cannot be exported.


def complaint(run: Path) -> str:
    with pytest.raises(ConfigError) as error:
        export_backbone(run, run / "backbone", trust=True)
    assert not (run / "backbone").exists()
    return str(error.value)


def test_a_folder_without_a_student_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'nowhere' / 'student.json'}: no such file; a run writes it when it is "
        "finished\n"
    )


def test_the_student_of_another_network_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "resnet14", make_student("resnet8"))
    assert complaint(run) == (
        f"{run / 'student.safetensors'}: not the 'resnet14' that it says: "
        "stages.0.1.conv1.weight: expected [16, 16, 3, 3], found none"
    )


def test_a_network_for_one_number_of_classes_is_refused(tmp_path: Path) -> None:
    student = build_network("users_networks:TenClasses@body", num_classes=10, in_channels=1)
    found = complaint(make_run(tmp_path / "run", "users_networks:TenClasses@body", student))
    assert found.startswith("cannot tell the classifier of 'users_networks:TenClasses@body'")


# Reading it.


@pytest.mark.parametrize("name", [TORCH, SAFETENSORS])
def test_another_file_than_was_exported_is_refused(tmp_path: Path, folder: Path, name: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    content = bytearray((other / name).read_bytes())
    content[-1] ^= 1
    (other / name).write_bytes(content)
    with pytest.raises(ConfigError, match="not the file that was exported: expected SHA-256 "):
        load_backbone(other / name)


@pytest.mark.parametrize("name", [TORCH, SAFETENSORS])
def test_files_without_a_description_are_read(tmp_path: Path, folder: Path, name: str) -> None:
    shutil.copy(folder / name, tmp_path)
    assert load_backbone(tmp_path / name).keys() == load_backbone(folder).keys()


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.pt: no such file"):
        load_backbone(tmp_path / "none.pt")
    save_checkpoint(tmp_path / "student.pt", {"network": {"weight": torch.ones(1)}})
    with pytest.raises(ConfigError, match="expected tensors only, found dict 'network'"):
        load_backbone(tmp_path / "student.pt")


# Filling a network.


def layers() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0.bias": None}, "0.bias: expected [4], found none"),
        ({"fc.weight": torch.zeros(2)}, "fc.weight: expected none, found [2]"),
        (
            {"2.weight": torch.zeros(2, 5, 1, 1)},
            "2.weight: expected [2, 4, 1, 1], found [2, 5, 1, 1]",
        ),
    ],
    ids=["missing", "unexpected", "of another shape"],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_filled(
    changes: dict[str, Tensor | None], message: str
) -> None:
    module = layers()
    changed = {**layers().state_dict(), **changes}
    state = {name: tensor for name, tensor in changed.items() if tensor is not None}
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ConfigError) as error:
        fill(module, state)
    assert str(error.value) == (f"weights: not the backbone of this network: {message}")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_counters_of_batch_norms_may_be_missing_on_either_side() -> None:
    module, state = layers(), layers().state_dict()
    del state["1.num_batches_tracked"]
    fill(module, state)
    del module[1].num_batches_tracked
    fill(module, layers().state_dict())


def test_every_other_tensor_is_filled() -> None:
    module = layers()
    state = {name: tensor + 1 for name, tensor in layers().state_dict().items()}
    fill(module, state)
    for name, tensor in module.state_dict().items():
        assert name.endswith("tracked") or torch.equal(tensor, state[name])
