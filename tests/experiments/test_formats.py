import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from experiments import export, formats
from experiments.formats import FORMATS
from experiments.gallery import write_gallery
from mtkd_env import load_student
from mtkd_env.networks import build_network
from mtkd_env.student import save_student
from run_folders import gallery
from students import describe
from tiny import seldom

ONNX = ("onnx", "onnxscript", "onnxruntime")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with images of it."""
    network = build_network("resnet8", num_classes=3, in_channels=1, width=0.25, seed=0)
    save_student(tmp_path, network, describe("resnet8", network, shape=(1, 8, 8), width=0.25))
    write_gallery(gallery(2), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "form",
    seldom(FORMATS, {*FORMATS} - {"onnx"}),
)
def test_every_form_gives_the_logits_of_the_student(
    form: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ONNX if form == "onnx" else ():
        pytest.importorskip(package)
    assert export.main([str(run), "--to", form]) == 0
    path = run / "export" / FORMATS[form].file
    assert capsys.readouterr().out.startswith(f"{path}: resnet8 after epoch 2; on 4 images")
    student = load_student(run)
    for count in (1, 5):
        images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            found = FORMATS[form].read(student, path)(images)
            torch.testing.assert_close(found, student(images), atol=1e-5, rtol=1e-5)
    about = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert about["student"] == json.loads((run / "student.json").read_text())
    assert about["takes"] == "images: float32 (N, 1, 8, 8), normalised: (value / 255 - mean) / std"
    assert about["difference"] < 1e-5


def test_libraries_own_networks_are_what_the_tensors_are_compared_in(tmp_path: Path) -> None:
    name = "torchvision:shufflenet_v2_x0_5"
    network = build_network(name, num_classes=7, seed=0)
    save_student(tmp_path, network, describe(name, network))
    Image.fromarray(np.zeros((40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert export.main([str(tmp_path), "--to", "torch", "--images", str(tmp_path)]) == 0
    state = torch.load(tmp_path / "export" / "student.pt")
    own = formats.LIBRARIES["torchvision"].classifier("shufflenet_v2_x0_5", 7, 3, {})
    assert state.keys() == own.state_dict().keys()


def test_another_student_is_not_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(student: nn.Module, path: Path) -> formats.Logits:
        del path
        return lambda images: other(student(images))

    def other(logits: Tensor) -> Tensor:
        return logits + 1

    monkeypatch.setitem(FORMATS, "torch", replace(FORMATS["torch"], read=off))
    assert export.main([str(run), "--to", "torch"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: student.pt: not the student any more: on 4 images its logits differ by up to 1.0e"
    )
    assert list((run / "export").iterdir()) == []


def test_a_student_without_images_asks_for_some(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "gallery.npz").unlink()
    assert export.main([str(run), "--to", "torch"]) == 2
    assert "holds no images to compare on; --images names a folder of some" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("package", ONNX)
def test_a_package_that_is_missing_is_named_with_what_installs_it(
    package: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ONNX:
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    assert export.main([str(run), "--to", "onnx"]) == 1
    assert capsys.readouterr().err == (
        f"error: needs {package}; install it with pip install 'mtkd-env[onnx]'\n"
    )
