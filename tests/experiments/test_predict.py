import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import predict
from mtkd_env import ConfigError, load_student
from mtkd_env.networks import build_network
from mtkd_env.student import save_student
from students import describe

NAMES = ("cat", "dog", "fox")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a student of grey images."""
    folder = tmp_path_factory.mktemp("run")
    network = build_network("resnet8", num_classes=3, in_channels=1, width=0.25, seed=0)
    about = describe("resnet8", network, shape=(1, 8, 8), width=0.25, class_names=NAMES)
    save_student(folder, network, about)
    return folder


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images, as users have them: in colours, of any size, with other files between them."""
    monkeypatch.chdir(tmp_path)
    folder = Path("images")
    draw = np.random.default_rng(0)
    for name in ("b.png", "a.png", "more/c.JPG", ".hidden.png", ".cache/d.png", "__MACOSX/e.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def table(path: str | Path = "predictions.csv") -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_visible_image_has_its_class_and_all_probabilities(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main([str(run), str(images), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "predictions.csv: 3 images by resnet8 after epoch 2\n"
    rows = table()
    assert [row["file"] for row in rows] == [
        f"images/{n}" for n in ("a.png", "b.png", "more/c.JPG")
    ]
    expected = load_student(run).predict(*(row["file"] for row in rows))
    for row, shares in zip(rows, expected, strict=True):
        assert list(row) == ["file", "class", *NAMES]
        assert row["class"] == NAMES[int(shares.argmax())]
        found = torch.tensor([float(row[name]) for name in NAMES])
        torch.testing.assert_close(found, shares, atol=1e-6, rtol=0)


def test_an_image_that_cannot_be_read_is_left_out_and_named(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "broken.png").write_bytes(b"no image")
    assert predict.main([str(run), str(images), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: 1 of 4 images are left out: images/broken.png: cannot be read as an image ("
    )
    assert len(table()) == 3


def test_files_can_be_named_and_several_processes_say_the_same(run: Path, images: Path) -> None:
    flags = [str(run), str(images / "b.png"), str(images / "more"), "--device", "cpu"]
    for workers in ("0", "1"):
        output = f"out/{workers}.csv"
        assert predict.main([*flags, "--workers", workers, "--output", output]) == 0
    assert [row["file"] for row in table(output)] == ["images/b.png", "images/more/c.JPG"]
    assert table("out/0.csv") == table("out/1.csv")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("empty", "empty: holds no images"),
        ("--workers=-1", "workers: expected a finite number >= 0"),
        ("--which=best", "student_best.json: no such file"),
    ],
)
def test_what_cannot_be_done_is_told_and_nothing_is_written(
    run: Path,
    images: Path,
    argument: str,
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("empty").mkdir()
    assert predict.main([str(run), str(images), argument, "--device", "cpu"]) == 2
    assert expected in capsys.readouterr().err
    assert not Path("predictions.csv").exists()


def test_students_of_other_than_pictures_say_so_once(images: Path, tmp_path: Path) -> None:
    network = build_network("resnet8", num_classes=3, in_channels=4, width=0.25, seed=0)
    save_student(tmp_path, network, describe("resnet8", network, shape=(4, 8, 8), width=0.25))
    student = load_student(tmp_path)
    with pytest.raises(ConfigError, match=r"^images with 4 channels are not read from pictures$"):
        predict.write_predictions(student, [images / "a.png"], tmp_path / "a.csv", workers=0)
    assert not (tmp_path / "a.csv").exists()
