"""What users get wrong is told by the program in one clear line, and leaves nothing behind.

One case of every kind; what else is refused stands in the tests of what refuses it.
"""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.datasets import CIFAR10

from experiments import run
from experiments.config import ExperimentConfig
from fake_datasets import write_cifar, write_images

# A run that would end well in seconds if the case were none.
SMOKE = """
algo: aver
teachers: {teachers: [{network: resnet8, width: 0.125, kind: random}], recipe: {epochs: 1}}
data: {train_size: 64, batch_size: 16}
student: {network: resnet8, width: 0.125}
optimizer: {epochs: 1}
device: cpu
"""

Flags = list[str]
Words = tuple[str, ...]


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smoke") / "smoke.yaml"
    path.write_text(SMOKE, encoding="utf-8")
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Where a case writes what is wrong."""
    (tmp_path / "inputs").mkdir()
    return tmp_path / "inputs"


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sends everything that is written by default into an empty folder, which must stay empty."""
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    monkeypatch.chdir(outputs)
    monkeypatch.setenv("MTKD_CACHE", str(outputs / "cache"))
    monkeypatch.delenv("MTKD_DATA", raising=False)
    yield
    assert names_in(outputs) == []


@pytest.fixture
def refuse(
    smoke: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[Flags, Words], None]:
    """Asserts that run.py refuses flags with one line that has all the words."""

    def refused(flags: Flags, words: Words) -> None:
        before = names_in(inputs)
        assert run.main(["--config", str(smoke), *flags]) == 2
        assert_one_line(capsys.readouterr().err, words)
        assert names_in(inputs) == before

    return refused


def assert_one_line(shown: str, words: Words) -> None:
    assert shown.startswith("error: ")
    assert shown.endswith("\n")
    assert shown.count("\n") == 1
    for word in words:
        assert word in shown, shown


# Flags.


FLAGS: dict[str, tuple[Flags, Words]] = {
    "algo": (["--algo=ppoo"], ("agent", "'ppoo'", "did you mean 'ppo'?")),
    "second algo": (["--algo=aver,ppoo"], ("agent", "'ppoo'", "did you mean 'ppo'?")),
    "shipped method": (["--algo=consensus_pq"], ("agent", "did you mean 'consensus_pg'?")),
    "no agent's name": (["--agent.name=consensus_pq"], ("agent", "did you mean 'consensus'?")),
    "agent": (["--agent.name=unifrm"], ("agent", "did you mean 'uniform'?")),
    "reward": (["--env.reward=papr"], ("reward", "did you mean 'paper'?")),
    "dataset": (["--data.dataset=digitz"], ("dataset", "did you mean 'digits'?")),
    "network": (["--student.network=resnet9"], ("student", "did you mean 'resnet8'?")),
    "warm-up": (["--warmup.weights=one"], ("warmup", "weights", "did you mean 'ones'?")),
    "device": (["--device=cudda"], ("device", "'cudda'")),
    "device without numbers": (["--device=meta"], ("device", "'meta'")),
    "argument of the dataset": (
        ["--data.arguments={pth: x}"],
        ("data.arguments.pth", "known: none"),
    ),
    "number for keys": (["--data.arguments=3"], ("data.arguments: expected dict", "3")),
    "word for a number or nothing": (["--threads=all"], ("threads: expected int or None",)),
    "too many threads": (["--threads=99999999999"], ("threads", "1 to 4096")),
    "no temperature": (["--distillation.temperature=0"], ("distillation.temperature", "> 0")),
    "output below a file": (["--output=/dev/null/runs"], ("output", "/dev/null/runs")),
    "rate of a library": (
        ["--algo=ppo", "--agent.arguments={learning_rate: -1}"],
        ("ppo", "learning rate", "-1"),
    ),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_that_cannot_be_used_are_refused(
    case: str, refuse: Callable[[Flags, Words], None]
) -> None:
    refuse(*FLAGS[case])


# Numbers.


def numeric_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """All keys of a configuration that are numbers."""
    for entry in fields(kind):
        if is_dataclass(entry.type):
            yield from numeric_keys(entry.type, f"{prefix}{entry.name}.")
        elif entry.type in (int, float, int | None, float | None):
            yield prefix + entry.name


NUMERIC = list(numeric_keys(ExperimentConfig))


def test_the_numeric_keys_are_all_found() -> None:
    assert {"seed", "data.batch_size", "optimizer.clip_norm", "teachers.recipe.lr"} <= set(NUMERIC)
    assert len(NUMERIC) >= 37


@pytest.mark.parametrize("number", ["-1", ".nan", pytest.param(".inf", marks=pytest.mark.slow)])
@pytest.mark.parametrize("key", NUMERIC)
def test_numbers_out_of_range_are_refused(
    key: str, number: str, refuse: Callable[[Flags, Words], None]
) -> None:
    refuse([f"--{key}={number}"], (key.rpartition(".")[2], "expected", number.removeprefix(".")))


# Configuration files.


@pytest.mark.parametrize("flag", ["--config", "--recipe", "--teachers", "--resume"])
@pytest.mark.parametrize("what", ["folder.yaml", "missing.yaml"])
def test_folders_and_missing_files_in_place_of_files_are_refused(
    flag: str, what: str, inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    (inputs / "folder.yaml").mkdir()
    refuse([flag, str(inputs / what)], (flag.strip("-"), str(inputs / what)))


@pytest.mark.parametrize("flag", ["--output", "--cache"])
def test_files_in_place_of_folders_are_refused(
    flag: str, inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    (inputs / "file").write_text("here", encoding="utf-8")
    train = ["--teachers.teachers", "[{network: resnet8, width: 0.125}]"]
    more = train if flag == "--cache" else []
    refuse([flag, str(inputs / "file"), *more], (flag.strip("-"), str(inputs / "file")))
    assert (inputs / "file").read_text(encoding="utf-8") == "here"


# Teachers.


TEACHERS: dict[str, tuple[str, Words]] = {
    "not a list": ("3", ("teachers", "3")),
    "negative width": ("[{network: resnet8, width: -1}]", ("teachers.teachers", "width", "-1")),
    "missing checkpoint behind one to train": (
        "[{network: vgg8, width: 0.1}, {network: resnet8, checkpoint: no.pt}]",
        ("teachers.resnet8", "no.pt", "no such checkpoint"),
    ),
    "other image size behind one to train": (
        "[{network: vgg8, width: 0.1}, {network: 'test_bad_input:for_large_images@body', name: a}]",
        ("teachers.a", "1x8x8"),
    ),
    "other classes behind one to train": (
        "[{network: vgg8, width: 0.1}, {network: 'test_bad_input:of_seven_classes@body', name: a}]",
        ("teachers.a", "7 classes", "10"),
    ),
}


class Fixed(nn.Module):
    """A user's network for one number of classes and one size of images."""

    def __init__(self, classes: int, side: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3, padding=1)
        self.classifier = nn.Linear(4 * side * side, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(inputs).flatten(1))


def for_large_images(num_classes: int) -> nn.Module:
    return Fixed(num_classes, 16)


def of_seven_classes(num_classes: int) -> nn.Module:
    del num_classes
    return Fixed(7, 8)


@pytest.mark.parametrize("case", TEACHERS)
def test_teachers_that_do_not_fit_are_refused_before_any_is_trained(
    case: str, refuse: Callable[[Flags, Words], None]
) -> None:
    teachers, words = TEACHERS[case]
    refuse([f"--teachers.teachers={teachers}"], words)


def test_teachers_batches_that_the_images_do_not_fill_are_refused(
    refuse: Callable[[Flags, Words], None],
) -> None:
    flags = ["--teachers.teachers=[{network: resnet8, width: 0.125}]", "--teachers.batch_size=65"]
    refuse(flags, ("teachers.batch_size", "1 to 64", "65"))


# Checkpoints.


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_runs_of_a_checkpoint(inputs: Path, refuse: Callable[[Flags, Words], None]) -> None:
    path = inputs / "teacher.pt"
    torch.save({"more": Bomb(inputs / "ran")}, path)
    words = ("teachers.resnet8", str(path), "not a checkpoint of tensors only")
    refuse([f"--teachers.teachers=[{{network: resnet8, checkpoint: {path}}}]"], words)
    assert not (inputs / "ran").exists()


# Data files.


def test_objects_in_archives_are_never_unpickled(
    inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    bombs = np.empty(1, dtype=object)
    bombs[0] = Bomb(inputs / "ran")
    np.savez(inputs / "images.npz", x_train=bombs, y_train=bombs, x_test=bombs, y_test=bombs)
    flags = ["--data.dataset=npz", f"--data.arguments.path={inputs / 'images.npz'}"]
    refuse(flags, ("x_train", "images.npz", "allow_pickle"))
    assert not (inputs / "ran").exists()


def test_a_damaged_image_is_named_in_the_midst_of_a_run(
    inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    write_images(inputs, count=6)
    path = inputs / "val" / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    arguments = f"{{root: {inputs}, image_size: 24, resize: 28, workers: 0}}"
    flags = ["--data.dataset=folder", "--data.train_size=null", f"--data.arguments={arguments}"]
    refuse(flags, (str(path), "cannot be read"))


def test_pickles_of_cifar_are_refused_unread_if_they_are_not_the_published_ones(
    inputs: Path, refuse: Callable[[Flags, Words], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(inputs, CIFAR10, monkeypatch)
    path = inputs / CIFAR10.base_folder / "data_batch_2"
    path.write_bytes(pickle.dumps(Bomb(inputs / "ran")))
    refuse(
        ["--data.dataset=cifar10", f"--data.arguments.root={inputs}"],
        ("cifar10", str(path), "damaged", "checksum"),
    )
    assert not (inputs / "ran").exists()
