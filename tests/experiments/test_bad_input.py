"""A catalogue of what users get wrong: every entry gives one clear error and leaves nothing behind.

Every case goes through an entry point of the user's, with empty folders for output and cache.
"""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from torch import nn
from torchvision.datasets import CIFAR10

import tiny
from experiments import compare, run, train_teachers
from experiments.config import ExperimentConfig
from fake_datasets import write_cifar, write_fashion_mnist, write_images
from mtkd_env.errors import ConfigError
from mtkd_env.files import load_checkpoint
from mtkd_env.networks import build_network
from mtkd_env.teachers import load_pool_spec
from tiny import load_dataset

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


def assert_refused(work: Callable[[], Any], words: Words, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        work()
    assert caught.type is kind
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# Names.


NAMES: dict[str, tuple[str, Words]] = {
    "algo": ("--algo=ppoo", ("agent", "'ppoo'", "did you mean 'ppo'?")),
    "second algo": ("--algo=aver,ppoo", ("agent", "'ppoo'", "did you mean 'ppo'?")),
    "weighting": ("--algo=camkdd", ("agent", "did you mean 'camkd'?")),
    "agent": ("--agent.name=unifrm", ("agent", "did you mean 'uniform'?")),
    "class of an agent": ("--algo=nosuch:Class", ("agent", "'nosuch:Class'")),
    "class that is no agent": ("--algo=json:JSONDecoder", ("agent", "'json:JSONDecoder'")),
    "reward": ("--env.reward=papr", ("reward", "did you mean 'paper'?")),
    "reward timing": ("--env.reward_timing=befor", ("reward_timing", "did you mean 'before'?")),
    "normalisation": (
        "--env.reward_normalization=zscor",
        ("reward_normalization", "did you mean 'zscore'?"),
    ),
    "fusion": ("--env.fusion=papper", ("fusion", "did you mean 'paper'?")),
    "observation": ("--env.observation=al", ("observation", "did you mean 'all'?")),
    "observation dtype": (
        "--env.observation_dtype=float61",
        ("observation_dtype", "did you mean 'float16'?"),
    ),
    "episode": ("--env.episode=epoh", ("episode", "did you mean 'epoch'?")),
    "dataset": ("--data.dataset=digitz", ("dataset", "did you mean 'digits'?")),
    "network": ("--student.network=resnet9", ("student", "did you mean 'resnet8'?")),
    "network of torchvision": (
        "--student.network=torchvision:resnet19",
        ("network", "did you mean 'torchvision:resnet18'?"),
    ),
    "network of a missing module": ("--student.network=nosuch:Net", ("'nosuch:Net'",)),
    "network that is no class": ("--student.network=math:pi", ("'math:pi'",)),
    "argument of the student": (
        "--student.arguments={channel: 3}",
        ("student.arguments.channel", "did you mean 'channels'?"),
    ),
    "network of a teacher": (
        "--teachers.teachers=[{network: resnet9}]",
        ("network", "did you mean 'resnet8'?"),
    ),
    "kind of a teacher": (
        "--teachers.teachers=[{network: resnet8, kind: randm}]",
        ("kind", "did you mean 'random'?"),
    ),
    "optimizer": (
        "--optimizer.optimizer=sgdd",
        ("optimizer: ", "did you mean 'sgd'?", "adamw", "sgdd"),
    ),
    "schedule": (
        "--optimizer.schedule=stpe",
        ("optimizer: unknown schedule", "cosine, poly, step", "stpe"),
    ),
    "optimizer of the teachers": (
        "--teachers.recipe.optimizer=sgdd",
        ("teachers.recipe: unknown optimizer", "did you mean 'sgd'?", "sgdd"),
    ),
    "precision": ("--precision=fp61", ("precision", "did you mean 'fp16'?")),
    "recipe": (
        "--recipe=cifar100_resnet57",
        ("recipe", "did you mean 'cifar100_resnet56'?"),
    ),
    "logit loss": ("--distillation.logit=kdd", ("logit", "did you mean 'kd'?")),
    "feature loss": ("--distillation.feature=mes", ("feature", "did you mean 'mse'?")),
    "logit loss of several": ("--distillation.logit={kd: 1, dits: 1}", ("did you mean 'dist'?",)),
    "warm-up": ("--warmup.weights=one", ("warmup", "weights", "did you mean 'ones'?")),
    "device": ("--device=cudda", ("device", "'cudda'")),
    "device without numbers": ("--device=meta", ("device", "'meta'")),
    "argument of the agent": (
        "--agent.arguments={sede: 3}",
        ("agent.arguments.sede", "did you mean 'seed'?"),
    ),
    "argument that the run sets": ("--agent.arguments={seed: 3}", ("agent.arguments.seed",)),
    "argument of the dataset": ("--data.arguments={pth: x}", ("data.arguments.pth", "known: none")),
    "unknown key": ("--optimizer.lrr=1", ("optimizer.lrr", "did you mean '--optimizer.lr'?")),
    "unknown section": ("--optimzer.lr=1", ("optimzer.lr", "did you mean '--optimizer.lr'?")),
    "unknown flag": ("--sede=1", ("sede", "did you mean '--seed'?")),
    "no flag": ("pg", ("pg",)),
}


@pytest.mark.parametrize("case", NAMES)
def test_unknown_names_are_refused_with_the_nearest(
    case: str, refuse: Callable[[Flags, Words], None]
) -> None:
    flag, words = NAMES[case]
    refuse([flag], words)


# Arguments of agents.


ARGUMENTS: dict[str, tuple[str, str, Words]] = {
    "optimizer": ("pg", "{optimizer: adm}", ("optimizer", "did you mean 'adam'?")),
    "loss": ("pg", "{loss: clippd}", ("loss", "did you mean 'clipped'?")),
    "word for a rate": ("pg", "{lr: x}", ("agent.arguments.lr", "expected float, got 'x'")),
    "negative rate": ("pg", "{lr: -1}", ("agent.arguments.lr", ">= 0", "-1")),
    "no width": ("pg", "{hidden: 0}", ("hidden", "at least 1", "0")),
    "no passes": ("pg", "{passes: 0}", ("passes", "at least 1", "0")),
    "clip range": ("pg", "{loss: clipped, clip_range: 0}", ("clip_range", "> 0", "0")),
    "noise": ("dpg", "{noise_std: -1}", ("noise_std", ">= 0", "-1")),
    "cap": ("aekd", "{cap: 2.5}", ("cap", "(0, 1]", "2.5")),
    "norm of camkd": ("camkd", "{weight_norm: smplex}", ("did you mean 'simplex'?",)),
    "norm of ebkd": ("ebkd", "{weight_norm: oficial}", ("did you mean 'official'?",)),
    "no buffer": ("mmkd", "{buffer_size: 0}", ("buffer_size", "at least 1", "0")),
    "negative rate of mmkd": ("mmkd", "{lr: -1.0}", ("lr", ">= 0", "-1")),
    "decay of mmkd": ("mmkd", "{weight_decay: .nan}", ("weight_decay", ">= 0", "nan")),
    "penalty": ("amtmlkd", "{penalty: -1.0}", ("penalty", ">= 0", "-1")),
    "infinite penalty": ("amtmlkd", "{penalty: .inf}", ("penalty", ">= 0", "inf")),
    "pooling": ("amtmlkd", "{pooling: maxx}", ("pooling", "did you mean 'max'?")),
    "no start": ("amtmlkd", "{start: 0}", ("start", "> 0", "0")),
    "argument of a library": ("ppo", "{n_stepss: 3}", ("n_stepss", "did you mean 'n_steps'?")),
    "rate of a library": ("ppo", "{learning_rate: -1}", ("ppo", "learning rate", "-1")),
    "other actions": ("dqn", "{}", ("dqn cannot be built",)),
    "actions of a library": ("qrdqn", "{}", ("qrdqn", "Discrete")),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_an_agent_cannot_use_are_refused(
    case: str, refuse: Callable[[Flags, Words], None]
) -> None:
    algo, arguments, words = ARGUMENTS[case]
    if algo == "qrdqn":
        pytest.importorskip("sb3_contrib")
    refuse(["--algo", algo, "--agent.arguments", arguments], words)


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


VALUES: dict[str, tuple[str, Words]] = {
    "word for a count": ("--optimizer.epochs=ten", ("optimizer.epochs: expected int", "ten")),
    "fraction for a count": ("--data.batch_size=1.5", ("data.batch_size: expected int", "1.5")),
    "word for a number": ("--distillation.alpha=x", ("distillation.alpha: expected float", "x")),
    "word for a switch": (
        "--optimizer.nesterov=maybe",
        ("optimizer.nesterov: expected bool", "maybe"),
    ),
    "word for a number or nothing": ("--threads=all", ("threads: expected int or None",)),
    "number for keys": ("--data.arguments=3", ("data.arguments: expected dict", "3")),
    "number for arguments": ("--agent.arguments=3", ("agent.arguments", "keys and values", "3")),
    "nothing for a method": ("--algo=", ("--algo",)),
    "nothing for a file": ("--config", ("--config: expected a value",)),
    "nothing for the teachers": ("--teachers", ("--teachers: expected a value",)),
    "no epochs": ("--optimizer.epochs=0", ("optimizer.epochs", "at least 1")),
    "no epochs for short": ("--epochs=0", ("optimizer.epochs", "at least 1")),
    "no temperature": ("--distillation.temperature=0", ("distillation.temperature", "> 0")),
    "no width": ("--student.width=0", ("width", "> 0")),
    "too many threads": ("--threads=99999999999", ("threads", "1 to 4096")),
    "too large a batch": ("--data.batch_size=65", ("batch_size", "1 to 64", "65")),
    "too many images": ("--data.train_size=2000", ("train_size", "1 to 1437", "2000")),
    "no image to hold out": ("--data.val_fraction=0.0001", ("val_fraction", "0.0001")),
    "nothing but held out": ("--data.val_fraction=1", ("val_fraction", "[0, 1)", "1")),
    "share above 1": ("--checkpoint.share=1.5", ("checkpoint.share", "[0, 1]", "1.5")),
    "late milestone": ("--optimizer.milestones=[2]", ("optimizer.milestones", "(0, 1]")),
    "milestone that is none": ("--optimizer.milestones=[.nan]", ("optimizer.milestones", "nan")),
    "averages that never move": ("--optimizer.betas=[1, 1]", ("optimizer.betas", "[0, 1)")),
    "one average": ("--optimizer.betas=[0.9]", ("optimizer.betas",)),
    "warm-up beyond the end": ("--warmup.epochs=2", ("warmup.epochs", "optimizer.epochs = 1")),
    "two coefficients": ("--env.fusion=[0.5, 0.5]", ("fusion", "3 coefficients", "[0.5, 0.5]")),
    "negative coefficient": ("--env.fusion=[-1, 1, 1]", ("fusion", ">= 0", "-1")),
    "coefficient that is none": ("--env.fusion=[.nan, 1, 0]", ("fusion", "nan")),
    "negative loss": ("--distillation.logit={kd: -1}", ("logit.kd", ">= 0", "-1")),
    "infinite loss": ("--distillation.feature={mse: .inf}", ("feature.mse", ">= 0", "inf")),
    "no bound": ("--env.logit_bound=0", ("logit_bound", "> 0")),
    "output below a file": ("--output=/dev/null/runs", ("output", "/dev/null/runs")),
    "no run to resume": ("--resume=/no/such", ("--resume", "/no/such")),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_cannot_be_are_refused(
    case: str, refuse: Callable[[Flags, Words], None]
) -> None:
    flag, words = VALUES[case]
    refuse([flag], words)


# Configuration files.


YAMLS: dict[str, tuple[bytes, Words]] = {
    "list": (b"- a\n- b\n", ("expected keys and values", "['a', 'b']")),
    "number": (b"3\n", ("expected keys and values", "3")),
    "text": (b"just text\n", ("expected keys and values", "just text")),
    "open bracket": (b"a: [1\n", ("not valid YAML",)),
    "tab": (b"a:\n\tb: 1\n", ("not valid YAML",)),
    "two documents": (b"seed: 1\n---\nseed: 2\n", ("not valid YAML",)),
    "object": (b"seed: !!python/object/apply:os.getpid []\n", ("not valid YAML",)),
    "date": (b"seed: 2026-12-31\n", ("seed: expected int", "2026-12-31")),
    "aliases": (
        "\n".join(
            ["a: &a0 [1, 1]", *(f"b{i}: &a{i + 1} [*a{i}, *a{i}]" for i in range(40))]
        ).encode(),
        ("not valid YAML", "10000 values", "aliases"),
    ),
    "an alias of itself": (b"data: &x {arguments: *x}\n", ("not valid YAML", "a part of")),
    "a list as key": (b"? [a, b]\n: 1\n", ("not valid YAML", "a text as key")),
    "no number": (b"seed: !!int ''\n", ("not valid YAML",)),
    "bytes": (b"seed: !!binary aGk=\n", ("not valid YAML", "a plain value")),
    "a number as key": (b"1: 2\n", ("1",)),
    "deep": (b"seed: " + b"[" * 600, ("not valid YAML",)),
    "Latin-1": ("seed: 1 # Größe\n".encode("latin-1"), ("not valid YAML", "utf-8")),
    "UTF-16 without a mark": ("seed: 1".encode("utf-16-be"), ("not valid YAML",)),
    "compressed": (b"\x1f\x8b\x08\x00\x00", ("not valid YAML",)),
    "key twice": (b"seed: 1\nseed: 2\n", ("'seed'", "twice", "line 2")),
    "key twice in a section": (b"data: {mixup: 0.1, mixup: 0.2}\n", ("'mixup'", "twice")),
    "unknown key": (b"sede: 1\n", ("sede", "did you mean 'seed'?")),
    "unknown key in a section": (b"data: {mixp: 1}\n", ("mixp", "did you mean 'data.mixup'?")),
    "number for a key": (b"1: 2\n", ("1",)),
    "nothing in a section": (b"optimizer:\n", ("optimizer: expected keys and values", "None")),
    "list for a section": (b"agent: [1]\n", ("agent: expected AgentConfig or its fields", "[1]")),
    "list for a number": (b"seed: [1]\n", ("seed: expected int", "[1]")),
    "number that is none": (b"distillation: {beta: .nan}\n", ("distillation.beta", "nan")),
    "unknown method": (b"algo: ppoo\n", ("agent", "did you mean 'ppo'?")),
    "itself": (b"&a {seed: *a}\n", ("seed",)),
}


@pytest.mark.parametrize("case", YAMLS)
def test_configuration_files_that_cannot_be_used_are_refused(
    case: str, inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    content, words = YAMLS[case]
    path = inputs / "bad.yaml"
    path.write_bytes(content)
    named = () if case == "unknown method" else (str(path),)
    refuse(["--config", str(path)], (*words, *named))


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


# Pools.


POOLS: dict[str, tuple[bytes, Words]] = {
    "empty": (b"", ()),
    "list": (b"- network: resnet8\n", ()),
    "no teacher": (b"teachers: []\n", ("teachers", "at least one", "none")),
    "number for the teachers": (b"teachers: 3\n", ("teachers", "expected", "3")),
    "teacher without a network": (b"teachers: [{name: a}]\n", ("network",)),
    "unknown key": (b"teachers: [{network: resnet8}]\nbatchsize: 3\n", ("batchsize",)),
    "unknown key of a teacher": (
        b"teachers: [{network: resnet8}, {network: resnet14, imges: 1}]\n",
        ("teachers.1.imges: unknown key", "did you mean 'images'?"),
    ),
    "text for a number of a teacher": (
        b"teachers: [{network: resnet8, seed: x}]\n",
        ("teachers.0.seed: expected int, got 'x'",),
    ),
    "key twice": (b"batch_size: 1\nbatch_size: 2\nteachers: []\n", ("batch_size", "twice")),
    "unknown network": (b"teachers: [{network: resnet9}]\n", ("did you mean 'resnet8'?",)),
    "unknown kind": (b"teachers: [{network: vgg8, kind: rndom}]\n", ("did you mean 'random'?",)),
    "name twice": (
        b"teachers: [{network: resnet8}, {network: resnet8, width: 0.5}]\n",
        ("'resnet8'", "more than once"),
    ),
    "given name twice": (
        b"teachers: [{network: resnet8, name: a}, {network: vgg8, name: a}]\n",
        ("'a'", "more than once"),
    ),
    "no images in a batch": (
        b"teachers: [{network: resnet8}]\nbatch_size: 0\n",
        ("batch_size", "at least 1", "0"),
    ),
    "negative seed": (b"teachers: [{network: resnet8, seed: -1}]\n", ("seed", "-1")),
    "broken one with a checkpoint": (
        b"teachers: [{network: resnet8, kind: random, checkpoint: a.pt}]\n",
        ("teachers.0.checkpoint", "random"),
    ),
    "argument of its network": (
        b"teachers: [{network: resnet8, arguments: {channel: 3}}]\n",
        ("arguments.channel", "did you mean 'channels'?"),
    ),
    "no epochs": (
        b"teachers: [{network: resnet8}]\nrecipe: {epochs: 0}\n",
        ("recipe.epochs", "at least 1"),
    ),
    "infinite rate": (
        b"teachers: [{network: resnet8}]\nrecipe: {lr: .inf}\n",
        ("recipe.lr", "expected"),
    ),
    "unknown schedule": (
        b"teachers: [{network: resnet8}]\nrecipe: {schedule: stp}\n",
        ("recipe: unknown schedule", "stp"),
    ),
    "Latin-1": ("teachers: [] # Größe\n".encode("latin-1"), ("not valid YAML",)),
    "open bracket": (b"teachers: [\n", ("not valid YAML",)),
}


@pytest.mark.parametrize("case", POOLS)
def test_pools_that_cannot_be_used_are_refused(
    case: str, inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    content, words = POOLS[case]
    path = inputs / "pool.yaml"
    path.write_bytes(content)
    refuse(["--teachers", str(path)], ("teachers", str(path), *words))
    assert_refused(partial(load_pool_spec, path), (str(path), *words), ConfigError)


TEACHERS: dict[str, tuple[str, Words]] = {
    "not a list": ("3", ("teachers", "3")),
    "negative width": ("[{network: resnet8, width: -1}]", ("teachers.resnet8", "width", "-1")),
    "infinite width": ("[{network: resnet8, width: .inf}]", ("teachers.resnet8", "width", "inf")),
    "missing checkpoint": (
        "[{network: resnet8, checkpoint: no.pt}]",
        ("teachers.resnet8", "no.pt", "no such checkpoint"),
    ),
    "missing checkpoint behind one to train": (
        "[{network: vgg8, width: 0.1}, {network: resnet8, checkpoint: no.pt}]",
        ("teachers.resnet8", "no.pt"),
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


def test_training_teachers_alone_refuses_alike(
    smoke: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", str(smoke), "--teachers.batch_size", "0"]
    assert train_teachers.main(flags) == 2
    assert_one_line(capsys.readouterr().err, ("teachers.batch_size", "at least 1", "0"))


# Checkpoints.


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def state_dict(classes: int = 10, width: float = 0.125) -> dict[str, Any]:
    network = build_network("resnet8", num_classes=classes, in_channels=1, width=width)
    return dict(network.state_dict())


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in state_dict().items() if key != name}


LAST = list(state_dict())[-1]

CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], Words]] = {
    "other classes": (lambda _: state_dict(classes=7), (LAST.rpartition(".")[0], "(7", "(10")),
    "other width": (lambda _: state_dict(width=0.5), ("shape", "the network expects")),
    "missing tensor": (lambda _: without(LAST), ("lacks the tensor", LAST)),
    "no tensor at all": (lambda _: {}, ("lacks the tensor",)),
    "unexpected tensor": (
        lambda _: {**state_dict(), "more": torch.zeros(1)},
        ("unexpected tensor 'more'",),
    ),
    "text for a tensor": (lambda _: {**state_dict(), LAST: "x"}, (LAST, "not a tensor", "str")),
    "list for a state": (lambda _: {"state_dict": [1]}, ("lacks the tensor", "it has state_dict")),
    "list": (lambda _: [1], ("expected a dictionary", "list")),
    "module": (lambda _: torch.nn.Linear(1, 1), ("not a checkpoint of tensors only",)),
    "bomb": (lambda folder: Bomb(folder / "ran"), ("not a checkpoint of tensors only",)),
    "bomb beside the tensors": (
        lambda folder: {**state_dict(), "more": Bomb(folder / "ran")},
        ("not a checkpoint of tensors only",),
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_that_do_not_fit_are_refused(
    case: str, inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    make, words = CHECKPOINTS[case]
    path = inputs / "teacher.pt"
    torch.save(make(inputs), path)
    flag = f"--teachers.teachers=[{{network: resnet8, width: 0.125, checkpoint: {path}}}]"
    refuse([flag], ("teachers.resnet8", str(path), *words))
    assert not (inputs / "ran").exists()


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_nothing_runs_of_a_pickle_in_place_of_a_checkpoint(
    protocol: int, inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    path = inputs / "teacher.pt"
    path.write_bytes(pickle.dumps(Bomb(inputs / "ran"), protocol))
    refuse([f"--teachers.teachers=[{{network: resnet8, checkpoint: {path}}}]"], (str(path),))
    assert not (inputs / "ran").exists()
    # It is a bomb indeed.
    pickle.loads(path.read_bytes())
    assert (inputs / "ran").exists()


BYTES: dict[str, bytes] = {
    "nothing": b"",
    "text": b"no checkpoint\n",
    "zeros": bytes(1000),
    "zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("case", BYTES)
def test_files_that_are_no_checkpoints_are_refused(
    case: str, inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    path = inputs / "teacher.pt"
    path.write_bytes(BYTES[case])
    refuse([f"--teachers.teachers=[{{network: resnet8, checkpoint: {path}}}]"], (str(path),))


def test_folders_are_no_checkpoints(inputs: Path, refuse: Callable[[Flags, Words], None]) -> None:
    (inputs / "teacher.pt").mkdir()
    path = inputs / "teacher.pt"
    refuse([f"--teachers.teachers=[{{network: resnet8, checkpoint: {path}}}]"], (str(path),))


def cuts(length: int) -> list[int]:
    """Lengths that a file may be cut to: many, and those next to its ends."""
    return sorted({*range(0, length, max(1, length // 24)), 1, 4, length - 22, length - 1})


def test_checkpoints_are_refused_wherever_they_are_cut(inputs: Path) -> None:
    path = inputs / "teacher.pt"
    torch.save({"network": state_dict()}, path)
    whole = path.read_bytes()
    for length in cuts(len(whole)):
        path.write_bytes(whole[:length])
        assert_refused(partial(load_checkpoint, path), (str(path),), ConfigError)


# Data files.


def arrays(**changes: Any) -> dict[str, Any]:
    """60 and 20 grey images of 4 classes."""
    whole = {
        "x_train": np.zeros((60, 8, 8), dtype=np.uint8),
        "y_train": np.arange(60) % 4,
        "x_test": np.zeros((20, 8, 8), dtype=np.uint8),
        "y_test": np.arange(20) % 4,
    }
    return {key: value for key, value in (whole | changes).items() if value is not None}


def zeros(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype)


ARCHIVES: dict[str, tuple[dict[str, Any], Words]] = {
    "no test images": (arrays(x_test=None), ("no array 'x_test'", "did you mean 'y_test'?")),
    "misspelt array": (arrays(y_test=None, y_tst=zeros(2)), ("did you mean 'y_tst'?",)),
    "floats": (arrays(x_train=zeros(60, 8, 8, dtype=float)), ("x_train", "uint8", "float64")),
    "wide integers": (arrays(x_test=zeros(20, 8, 8, dtype=np.int64)), ("x_test", "int64")),
    "switches": (arrays(x_train=zeros(60, 8, 8, dtype=bool)), ("x_train", "uint8", "bool")),
    "rows of pixels": (arrays(x_train=zeros(60, 64)), ("x_train", "(N, H, W)", "(60, 64)")),
    "films": (arrays(x_train=zeros(60, 2, 8, 8, 3)), ("x_train", "(60, 2, 8, 8, 3)")),
    "channels first": (arrays(x_train=zeros(60, 3, 8, 8)), ("x_train", "transpose")),
    "small images": (arrays(x_train=zeros(60, 7, 7)), ("x_train", "8x8", "7, 7")),
    "images of two sizes": (arrays(x_test=zeros(20, 9, 9)), ("x_test", "x_train", "9, 9")),
    "images of other channels": (arrays(x_test=zeros(20, 8, 8, 3)), ("x_test", "(3, 8, 8)")),
    "no images": (arrays(x_train=zeros(0, 8, 8), y_train=zeros(0)), ("train", "none")),
    "no images to test": (
        arrays(x_test=zeros(0, 8, 8), y_test=zeros(0)),
        ("images: ", "no test images", "--data.test_fraction"),
    ),
    "a label too few": (arrays(y_train=np.arange(59) % 4), ("y_train", "60 labels", "59")),
    "a label too many": (arrays(y_test=np.arange(21) % 4), ("y_test", "20 labels", "21")),
    "label out of range": (arrays(y_test=np.arange(20) % 5), ("y_test", "0 to 3", "4")),
    "negative label": (arrays(y_test=np.arange(20) % 4 - 1), ("y_test", "0 to 3", "-1")),
    "label left out": (arrays(y_train=np.arange(60) % 4 * 2), ("y_train", "0, 2, 4, 6")),
    "labels from 1": (arrays(y_train=np.arange(60) % 4 + 1), ("y_train", "1, 2, 3, 4")),
    "one class": (arrays(y_train=zeros(60), y_test=zeros(20)), ("num_classes", "2", "1")),
    "fractions for labels": (arrays(y_train=zeros(60, dtype=float)), ("y_train", "float64")),
    "words for labels": (arrays(y_train=np.array(["cat"] * 60)), ("y_train", "integer", "<U3")),
    "one-hot labels": (arrays(y_train=zeros(60, 4)), ("y_train", "array.argmax(1)")),
    "column of labels": (arrays(y_test=zeros(20, 1)), ("y_test", "array.reshape(-1)")),
    "objects for images": (
        arrays(x_train=np.array([None] * 60, dtype=object)),
        ("x_train", "allow_pickle"),
    ),
    "objects for labels": (
        arrays(y_test=np.array([0] * 20, dtype=object)),
        ("y_test", "allow_pickle"),
    ),
    "fewer images than a batch": (
        arrays(x_train=zeros(15, 8, 8), y_train=np.arange(15) % 4),
        ("batch_size", "1 to 15", "16"),
    ),
}
NPZ = "--data.dataset=npz"


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_that_cannot_be_used_are_refused(
    case: str, inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    content, words = ARCHIVES[case]
    path = inputs / "images.npz"
    np.savez(path, **content)
    # What is wrong with the images of a readable file names the data set, which is called after it.
    by_name = case in ("fewer images than a batch", "no images to test")
    named = () if by_name else (str(path),)
    refuse([NPZ, f"--data.arguments.path={path}", "--data.train_size=null"], (*words, *named))


FILES: dict[str, Callable[[Path], Any]] = {
    "nothing": Path.touch,
    "text": lambda path: path.write_text("no archive", encoding="utf-8"),
    "folder": Path.mkdir,
    "single array": lambda path: path.write_bytes(_single_array(path)),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb(path.with_name("ran")))),
    "missing": lambda _: None,
}


def _single_array(path: Path) -> bytes:
    with path.open("wb") as file:
        np.save(file, zeros(60, 8, 8))
    return path.read_bytes()


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_archives_are_refused(
    case: str, inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    path = inputs / "images.npz"
    FILES[case](path)
    refuse([NPZ, f"--data.arguments.path={path}"], (str(path), "x_train, y_train"))
    assert not (inputs / "ran").exists()


@pytest.mark.parametrize("key", ["x_train", "y_train", "x_test", "y_test"])
def test_objects_in_archives_are_never_unpickled(
    key: str, inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    bombs = np.empty(1, dtype=object)
    bombs[0] = Bomb(inputs / "ran")
    np.savez(inputs / "images.npz", **arrays(**{key: bombs}))
    refuse([NPZ, f"--data.arguments.path={inputs / 'images.npz'}"], (key, "images.npz"))
    assert not (inputs / "ran").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_are_refused_wherever_they_are_cut(
    save: Callable[..., None], inputs: Path
) -> None:
    path = inputs / "images.npz"
    save(path, **arrays())
    whole = path.read_bytes()
    for length in cuts(len(whole)):
        path.write_bytes(whole[:length])
        assert_refused(partial(load_dataset, "npz", path=path), (str(path),), ConfigError)


DATASETS: dict[str, tuple[Flags, Words]] = {
    "no path": ([NPZ], ("npz", "'path'")),
    "number for a path": (
        [NPZ, "--data.arguments={path: 3}"],
        ("data.arguments.path", "expected str", "3"),
    ),
    "number for a root": (
        ["--data.dataset=folder", "--data.arguments={root: 3}"],
        ("data.arguments.root", "expected str", "3"),
    ),
    "word for a size": (
        ["--data.dataset=folder", "--data.arguments={root: x, image_size: big}"],
        ("data.arguments.image_size", "int", "'big'"),
    ),
    "misspelt root": (
        ["--data.dataset=fashion_mnist", "--data.arguments={rot: x}"],
        ("data.arguments.rot", "did you mean 'root'?"),
    ),
    "no images of cifar10": (["--data.dataset=cifar10"], ("cifar10", "data_batch_1", "download")),
    "no images of cifar100": (["--data.dataset=cifar100"], ("cifar100", "train", "download")),
    "no fashion": (["--data.dataset=fashion_mnist"], ("fashion_mnist", "train-images", "download")),
    "no ImageNet": (["--data.dataset=imagenet"], ("train", "no such folder")),
    "no folder": (
        ["--data.dataset=folder", "--data.arguments.root=nowhere"],
        ("nowhere/train", "no such folder"),
    ),
}


@pytest.mark.parametrize("case", DATASETS)
def test_datasets_that_are_not_there_are_refused(
    case: str, refuse: Callable[[Flags, Words], None]
) -> None:
    refuse(*DATASETS[case])


def _remove(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


IMAGE_FOLDERS: dict[str, tuple[Callable[[Path], Any], Words]] = {
    "empty class": (lambda root: _remove(root / "train" / "dog"), ("train/dog", "no images")),
    "class of texts": (
        lambda root: [
            file.rename(file.with_suffix(".txt")) for file in (root / "train" / "fox").iterdir()
        ],
        ("train/fox", "no images"),
    ),
    "unknown class": (lambda root: (root / "val" / "cow").mkdir(), ("val/cow", "no such class")),
    "no images to test": (
        lambda root: (root / "val").rename(root / "elsewhere"),
        ("inputs: ", "no test images", "--data.test_fraction"),
    ),
    "file for a folder": (
        lambda root: (root / "train").rename(root / "away") and (root / "train").touch(),
        ("train", "no such folder"),
    ),
    "damaged image": (
        lambda root: (root / "val" / "cat" / "3.png").write_bytes(b"\xff\xd8\xff\xe0 no JPEG"),
        ("val/cat/3.png", "cannot be read"),
    ),
    "empty image": (
        lambda root: (root / "val" / "fox" / "0.png").write_bytes(b""),
        ("val/fox/0.png", "cannot be read"),
    ),
    "cut image": (
        lambda root: (root / "val" / "dog" / "1.png").write_bytes(
            (root / "val" / "dog" / "1.png").read_bytes()[:200]
        ),
        ("val/dog/1.png", "cannot be read"),
    ),
}


@pytest.mark.parametrize("case", IMAGE_FOLDERS)
def test_folders_of_images_that_cannot_be_used_are_refused(
    case: str, inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    spoil, words = IMAGE_FOLDERS[case]
    write_images(inputs, count=6)
    spoil(inputs)
    arguments = f"{{root: {inputs}, image_size: 24, resize: 28, workers: 0}}"
    flags = ["--data.dataset=folder", "--data.train_size=null", f"--data.arguments={arguments}"]
    named = () if case == "no images to test" else (str(inputs),)
    refuse(flags, (*words, *named))


FASHION = [
    f"{part}-{kind}"
    for part in ("train", "t10k")
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
]


@pytest.mark.parametrize("file", FASHION)
@pytest.mark.parametrize("length", [3, -1])
def test_files_of_fashion_mnist_are_refused_when_cut(
    file: str, length: int, inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    write_fashion_mnist(inputs)
    path = inputs / "FashionMNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[:length])
    refuse(
        ["--data.dataset=fashion_mnist", f"--data.arguments.root={inputs}"],
        ("fashion_mnist", str(path), "damaged"),
    )


def test_labels_of_fashion_mnist_out_of_range_are_refused(
    inputs: Path, refuse: Callable[[Flags, Words], None]
) -> None:
    write_fashion_mnist(inputs)
    path = inputs / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + bytes([10]))
    refuse(
        ["--data.dataset=fashion_mnist", f"--data.arguments.root={inputs}"],
        ("FashionMNIST", "y_train", "0 to 9", "10"),
    )


@pytest.mark.parametrize("content", ["cut", "bomb"])
def test_pickles_of_cifar_are_refused_unread_if_they_are_not_the_published_ones(
    content: str,
    inputs: Path,
    refuse: Callable[[Flags, Words], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_cifar(inputs, CIFAR10, monkeypatch)
    path = inputs / CIFAR10.base_folder / "data_batch_2"
    bomb = pickle.dumps(Bomb(inputs / "ran"))
    path.write_bytes(bomb if content == "bomb" else path.read_bytes()[:-1])
    refuse(
        ["--data.dataset=cifar10", f"--data.arguments.root={inputs}"],
        ("cifar10", str(path), "damaged", "checksum"),
    )
    assert not (inputs / "ran").exists()


# Comparisons.

COMPARISON = """
base:
  teachers: {teachers: [{network: resnet8, width: 0.125, kind: random}]}
  data: {train_size: 64, batch_size: 16}
  student: {network: resnet8, width: 0.125}
  optimizer: {epochs: 1}
  device: cpu
methods: {aver: , uniform: }
"""

COMPARISONS: dict[str, tuple[str, Words]] = {
    "unknown key": ("method: {}\n", ("method", "did you mean 'methods'?")),
    "key twice": ("methods: {pg: }\n", ("'methods'", "twice")),
    "unknown baseline": ("baseline: avr\n", ("baseline", "did you mean 'aver'?")),
    "seeds that are none": ("seeds: [0, -1]\n", ("seeds", "[0, -1]")),
    "a seed twice": ("seeds: [0, 0]\n", ("seeds", "different", "[0, 0]")),
    "one seed": ("seeds: 3\n", ("seeds", "3")),
    "list of settings": ("settings: [a]\n", ("settings", "keys and values", "['a']")),
    "unknown recipe": ("recipe: cifar100_resnet57\n", ("recipe", "'cifar100_resnet56'")),
    "key of a setting": ("settings: {a: {sede: 1}}\n", ("settings.a", "sede")),
    "seed of a setting": ("settings: {a: {seed: 1}}\n", ("settings.a.seed", "see seeds")),
    "number of a setting": (
        "settings: {a: {distillation: {alpha: -1}}}\n",
        ("settings.a", "distillation.alpha", "-1"),
    ),
    "name of a setting": (
        "settings: {a: {env: {reward: papr}}}\n",
        ("reward", "did you mean 'paper'?"),
    ),
    "network of a setting": (
        "settings: {a: {student: {network: resnet9}}}\n",
        ("did you mean 'resnet8'?",),
    ),
    "pool of a setting": ("settings: {a: {teachers: no.yaml}}\n", ("settings.a", "no.yaml")),
    "figure of nothing": ("paper: {avr: 1}\n", ("method of the paper", "did you mean 'aver'?")),
    "figure that is none": ("paper: {aver: high}\n", ("paper.aver", "'high'")),
    "dataset": ("settings: {a: {data: {dataset: digitz}}}\n", ("did you mean 'digits'?",)),
    "too many images": ("settings: {a: {data: {train_size: 2000}}}\n", ("train_size", "2000")),
}


def refused_comparison(path: Path, flags: Flags, capsys: Any, words: Words) -> None:
    assert compare.main([str(path), *flags]) == 2
    assert_one_line(capsys.readouterr().err, words)


@pytest.mark.parametrize("case", COMPARISONS)
def test_comparisons_that_cannot_be_done_are_refused(
    case: str, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = COMPARISONS[case]
    path = inputs / "mine.yaml"
    path.write_text(COMPARISON + content, encoding="utf-8")
    refused_comparison(path, [], capsys, words)


COMPARISON_FLAGS: dict[str, tuple[str, Words]] = {
    "executor": ("--executor=locl", ("--executor", "did you mean 'local'?")),
    "methods": ("--methods=avr", ("method", "did you mean 'aver'?")),
    "settings": ("--settings=a", ("setting", "'a'")),
    "seeds": ("--seeds=0,x", ("--seeds", "0,x")),
    "negative seed": ("--seeds=-1", ("seeds", "-1")),
    "no jobs": ("--jobs=0", ("--jobs", ">= 1", "0")),
    "word for jobs": ("--jobs=all", ("--jobs", "'all'")),
    "negative retries": ("--retries=-1", ("--retries", ">= 0", "-1")),
    "address without ray": ("--address=auto", ("--address", "--executor ray")),
    "seed": ("--seed=1", ("--seed", "--seeds")),
    "algo": ("--algo=pg", ("--algo", "--methods")),
    "unknown flag": ("--optimizer.lrr=1", ("optimizer.lrr", "did you mean '--optimizer.lr'?")),
    "number": ("--distillation.beta=-1", ("distillation.beta", "-1")),
}


@pytest.mark.parametrize("case", COMPARISON_FLAGS)
def test_flags_of_comparisons_that_cannot_be_are_refused(
    case: str, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, words = COMPARISON_FLAGS[case]
    path = inputs / "mine.yaml"
    path.write_text(COMPARISON, encoding="utf-8")
    refused_comparison(path, [flag], capsys, words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tabel1", ("comparison", "did you mean 'table1'?")),
        ("no/such.yaml", ("no/such.yaml",)),
        (".", ("comparison", "'.'")),
        ("--jobs", ("file first", "--jobs")),
    ],
)
def test_comparisons_that_are_not_there_are_refused(
    name: str, words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    refused_comparison(Path(name), [], capsys, words)


# Python.


KEYWORDS: dict[str, tuple[dict[str, Any], Words]] = {
    "unknown keyword": ({"rewrd": "paper"}, ("rewrd", "did you mean 'reward'?")),
    "reward": ({"reward": "papr"}, ("reward", "did you mean 'paper'?")),
    "output": ({"output": "nmpy"}, ("output", "did you mean 'numpy'?")),
    "fusion": ({"fusion": [1.0, 1.0, 1.0]}, ("fusion", "sum 1")),
    "bound": ({"logit_bound": float("nan")}, ("logit_bound", "nan")),
    "student": ({"student": "resnet9"}, ("student", "did you mean 'resnet8'?")),
    "width of the student": ({"width": -1.0}, ("width", "-1")),
    "argument of the student": (
        {"student": {"arguments": {"channel": 1}}},
        ("channel", "channels"),
    ),
    "argument of the dataset": ({"data": {"arguments": {"pth": "x"}}}, ("data.arguments.pth",)),
    "no samples": ({"num_envs": 0}, ("batch_size", "0")),
    "too many samples": ({"num_envs": 10**6}, ("batch_size", "1000000")),
    "images": ({"train_size": 0}, ("train_size", "0")),
    "share": ({"val_fraction": float("nan")}, ("val_fraction", "nan")),
    "mixup": ({"mixup": float("inf")}, ("mixup", "inf")),
    "alpha": ({"alpha": -0.5}, ("alpha", ">= 0", "-0.5")),
    "alpha that is none": ({"alpha": float("nan")}, ("alpha", "nan")),
    "beta": ({"beta": float("inf")}, ("beta", "inf")),
    "temperature": ({"temperature": float("inf")}, ("temperature", "inf")),
    "loss": ({"logit": "kdd"}, ("logit", "did you mean 'kd'?")),
    "coefficient": ({"feature": {"mse": -1.0}}, ("feature.mse", ">= 0", "-1")),
    "precision": ({"precision": "fp61"}, ("precision", "did you mean 'fp16'?")),
    "device": ({"device": "cudda"}, ("device", "'cudda'")),
    "device without numbers": ({"device": "meta"}, ("device", "'meta'")),
    "optimizer": ({"optimizer": {"lrr": 1}}, ("optimizer.lrr", "did you mean 'lr'?")),
    "rate": ({"lr": float("nan")}, ("optimizer.lr", "nan")),
    "no teachers": ({"teachers": []}, ("teachers", "at least one")),
    "teacher": ({"teachers": ["resnet9"]}, ("did you mean 'resnet8'?",)),
    "teacher twice": ({"teachers": ["resnet8", "resnet8"]}, ("'resnet8'", "more than once")),
    "key of a teacher": (
        {"teachers": [{"network": "resnet8", "sede": 1}]},
        ("teachers.0.sede", "did you mean 'seed'?"),
    ),
    "teacher without a network": ({"teachers": [{"seed": 1}]}, ("teachers.0", "'network'")),
    "pool": ({"teachers": "no.yaml"}, ("no.yaml", "no such file")),
    "steps": ({"max_episode_steps": 3}, ("max_episode_steps", "episode='epoch'")),
}


@pytest.mark.parametrize("case", KEYWORDS)
def test_environments_that_cannot_be_made_are_refused(case: str) -> None:
    keywords, words = KEYWORDS[case]
    small = {"train_size": 64, "num_envs": 16, "width": 0.125}
    teachers = {"teachers": [{"network": "resnet8", "width": 0.125, "kind": "random"}]}
    given = {**small, **teachers, **keywords}
    assert_refused(lambda: gymnasium.make_vec("MTKD/Digits-v0", **given), words, ConfigError)


@pytest.mark.parametrize("name", ["MTKD/Digitz-v0", "MTKD/Digits-v7"])
def test_unknown_environments_are_gymnasiums_errors(name: str) -> None:
    with pytest.raises((gymnasium.error.NameNotFound, gymnasium.error.VersionNotFound)):
        gymnasium.make_vec(name)


NETWORKS: dict[str, tuple[str, dict[str, Any], Words]] = {
    "name": ("resnet9", {}, ("network", "did you mean 'resnet8'?")),
    "name of a library": ("resnet18", {}, ("did you mean 'torchvision:resnet18'?",)),
    "argument": ("resnet8", {"channel": 1}, ("resnet8.channel", "did you mean 'channels'?")),
    "no width": ("resnet8", {"width": 0.0}, ("width", "> 0", "0")),
    "width that is none": ("vgg8", {"width": float("nan")}, ("width", "> 0", "nan")),
    "infinite width": ("wrn_16_1", {"width": float("inf")}, ("width", "> 0", "inf")),
    "fixed width": ("torchvision:resnet18", {"width": 0.5}, ("width", "resnet18", "0.5")),
    "no network": ("collections:OrderedDict", {}, ("OrderedDict",)),
    "network without a layer": ("torch.nn:Flatten", {}, ("torch.nn:Flatten", "@")),
    "network that needs more": ("torch.nn:Linear", {}, ("torch.nn:Linear", "in_features")),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_networks_that_cannot_be_built_are_refused(case: str) -> None:
    name, arguments, words = NETWORKS[case]
    work = partial(build_network, name, num_classes=10, in_channels=1, **arguments)
    assert_refused(work, words, ConfigError)


# Actions.

ROWS, COLUMNS = tiny.NUM_ENVS, 2 * len(tiny.TEACHERS)


def action(row: int, value: float) -> np.ndarray:
    """Zeros with one bad entry."""
    actions = zeros(ROWS, COLUMNS, dtype=np.float32)
    actions[row, 1] = value
    return actions


ACTIONS: dict[str, tuple[Any, Words]] = {
    "no rows": (zeros(0, COLUMNS), ("actions", f"({ROWS}, {COLUMNS})", f"(0, {COLUMNS})")),
    "a row too many": (zeros(ROWS + 1, COLUMNS), ("actions", f"({ROWS + 1}, {COLUMNS})")),
    "a column too few": (zeros(ROWS, COLUMNS - 1), ("actions", f"({ROWS}, {COLUMNS - 1})")),
    "a single row": (zeros(COLUMNS), ("actions", f"({COLUMNS},)")),
    "a single number": (0.0, ("actions", "()")),
    "transposed": (zeros(COLUMNS, ROWS), ("actions", f"({COLUMNS}, {ROWS})")),
    "a batch of batches": (zeros(1, ROWS, COLUMNS), ("actions", f"(1, {ROWS}, {COLUMNS})")),
    "NaN": (action(2, np.nan), ("actions", "row 2", "NaN")),
    "infinity": (action(0, np.inf), ("actions", "row 0", "infinity", "inf")),
    "minus infinity": (action(3, -np.inf), ("actions", "row 3", "-inf")),
    "NaN in a tensor": (torch.from_numpy(action(1, np.nan)), ("actions", "row 1")),
    "NaN everywhere": (np.full((ROWS, COLUMNS), np.nan), ("actions", "row 0", f"{ROWS} of {ROWS}")),
    "text": ("left", ("actions", "real numbers", "<U4")),
    "nothing": (None, ("actions", "real numbers", "object")),
    "complex numbers": (zeros(ROWS, COLUMNS, dtype=complex), ("actions", "complex128")),
    "a complex tensor": (torch.zeros(ROWS, COLUMNS, dtype=torch.cfloat), ("actions", "complex64")),
    "rows of two lengths": ([[0.0], [0.0, 1.0]], ("actions", "one length")),
    "too large for float32": (np.full((ROWS, COLUMNS), 1e300), ("actions", "infinity")),
}


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("case", ACTIONS)
def test_actions_that_cannot_be_taken_are_refused_and_the_student_stays(case: str) -> None:
    actions, words = ACTIONS[case]
    env = tiny.make_tiny_env()
    env.reset(seed=0)
    before = tiny.snapshot(env.distiller.module)
    assert_refused(lambda: env.step(actions), words, ValueError)
    tiny.assert_same(env.distiller.module, before)
    assert env.steps == 0
    env.step(zeros(ROWS, COLUMNS))


CALLS: dict[str, tuple[Callable[[Any], Any], Words, type[Exception]]] = {
    "a step before the reset": (
        lambda env: env.step(zeros(ROWS, COLUMNS)),
        ("env.reset()",),
        ResetNeeded,
    ),
    "a seed for each sample": (
        lambda env: env.reset(seed=[1] * ROWS),
        ("seed", "[1, "),
        ValueError,
    ),
    "an option": (
        lambda env: env.reset(options={"reint": True}),
        ("reset option", "did you mean 'reinit'?"),
        ConfigError,
    ),
    "a split": (lambda env: env.evaluate("tst"), ("split", "did you mean 'test'?"), ConfigError),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_an_environment_cannot_answer_are_refused(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, words, kind = CALLS[case]
    # The shape checks of the tests would see a wrong seed first.
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    assert_refused(lambda: call(tiny.make_tiny_env()), words, kind)
