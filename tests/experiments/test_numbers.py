"""Numbers of numpy and torch, as sweeps and notebooks give them, are numbers in every option."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import jaxtyping
import numpy as np
import pytest
import torch

from agents import check_agent
from agents.sb3 import split
from experiments.agent_run import AgentRunConfig
from experiments.config import ExperimentConfig
from experiments.config.experiment import AgentConfig
from experiments.transfer.detection import DetectionConfig
from experiments.transfer.segmentation import SegmentationConfig
from mtkd_env.data import DataSpec
from mtkd_env.data.preprocessing import Preprocessing
from mtkd_env.env import EnvSpec
from mtkd_env.errors import ConfigError
from mtkd_env.networks import build_network
from mtkd_env.optimization import Recipe
from mtkd_env.options import Options, build, default_values
from mtkd_env.teachers import TeacherSpec
from tiny import load_dataset


@pytest.fixture(autouse=True)
def _as_users_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tests' own check of all arguments against their annotations."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


PICTURES: dict[str, Any] = {"image_shape": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
# What classes cannot be made without.
NEEDED: dict[str, dict[str, Any]] = {
    "TeacherSpec": {"network": "resnet8"},
    "Preprocessing": PICTURES,
    "StudentDescription": {
        "network": "resnet8",
        "width": 1.0,
        "arguments": {},
        "num_classes": 3,
        "preprocessing": Preprocessing(**PICTURES),
    },
    "Schedule": {"epochs": 1},
    "TransferConfig": {"data": "images", "output": "runs"},
    AgentRunConfig.__name__: {"tasks": "tasks.yaml"},
    DetectionConfig.__name__: {"data": "images", "output": "runs"},
    SegmentationConfig.__name__: {"data": "images", "output": "runs"},
}
# What fields cannot be set without.
TOGETHER: dict[str, dict[str, Any]] = {"skew": {"images": 5}, "iterations": {"epochs": None}}

KINDS: dict[type, dict[str, Callable[[Any], Any]]] = {
    int: {
        "np.int64": np.int64,
        "np.uint64": np.uint64,
        "array": np.array,
        "tensor": torch.tensor,
        "float": float,
        "np.float64": np.float64,
    },
    float: {
        "np.float64": np.float64,
        "np.float32": np.float32,
        "np.longdouble": np.longdouble,
        "array": np.array,
        "tensor": lambda value: torch.tensor(value, dtype=torch.float64),
        "int": round,
        "np.int64": lambda value: np.int64(round(value)),
    },
    bool: {"np.bool": np.bool_, "array": np.array, "tensor": torch.tensor},
}


def classes(kind: type[Options] = Options) -> Iterator[type[Options]]:
    for one in kind.__subclasses__():
        yield one
        yield from classes(one)


def numbers() -> Iterator[tuple[type[Options], str, type]]:
    """Every field of every class of options that is a number or a switch, and which of them."""
    for kind in classes():
        for entry in fields(kind):
            members = get_args(entry.type) if isinstance(entry.type, UnionType) else (entry.type,)
            for number in KINDS.keys() & {*members}:
                yield kind, entry.name, number


def valid(kind: type[Options], name: str, number: type) -> Any:
    default = default_values(kind).get(name)
    return default if isinstance(default, number) else number(1)


def made(kind: type[Options], name: str, value: Any) -> Any:
    given = {**NEEDED.get(kind.__name__, {}), **TOGETHER.get(name, {}), name: value}
    return getattr(kind(**given), name)


NUMBERS = sorted(numbers(), key=str)


def test_all_classes_of_options_are_found() -> None:
    expected = {"ExperimentConfig", "Recipe", "StoreSpec", "TeacherSpec", "PolicyGradientSettings"}
    assert {kind.__name__ for kind in classes()} >= expected
    assert len(NUMBERS) > 100


FIELDS = pytest.mark.parametrize(
    ("kind", "name", "number"),
    NUMBERS,
    ids=[f"{kind.__name__}.{name}" for kind, name, _ in NUMBERS],
)


@FIELDS
def test_numbers_of_any_kind_become_pythons_own(
    kind: type[Options], name: str, number: type
) -> None:
    default = valid(kind, name, number)
    for form, convert in KINDS[number].items():
        # Others would be rounded, and out of their range.
        if form not in {"int", "np.int64"} or default == round(default):
            given = convert(default)
            value = made(kind, name, given)
            assert value == number(given), form
            assert type(value) is number, form


@FIELDS
def test_texts_are_no_numbers(kind: type[Options], name: str, number: type) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: expected .*{number.__name__}.*, got '1'"):
        made(kind, name, "1")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a text in a list": ({"milestones": ["a"]}, r"recipe\.milestones\.0: expected float, got 'a'"),
    "a number for a list": ({"milestones": 0.5}, r"recipe\.milestones: expected list, got 0\.5"),
    "an array for a number": (
        {"lr": np.ones(2)},
        r"recipe\.lr: expected float, got \[1\.0, 1\.0\]",
    ),
    "one of two": ({"betas": np.ones(1)}, r"recipe\.betas: expected 2 values, got \[1\.0\]"),
    "half an epoch": ({"epochs": np.float32(0.5)}, r"recipe\.epochs: expected int, got 0\.5"),
    "no number": ({"epochs": np.nan}, r"recipe\.epochs: expected int, got nan"),
    "a switch": ({"epochs": np.bool_(True)}, r"recipe\.epochs: expected int, got True"),
    "a number for a switch": ({"nesterov": np.int64(1)}, r"recipe\.nesterov: expected bool, got 1"),
    "more than a float holds": ({"lr": 10**400}, r"recipe\.lr: expected float, got 1000"),
    "a complex number": ({"lr": torch.tensor(1j)}, r"recipe\.lr: expected float, got 1j"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_values_are_refused_by_their_keys(case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises(ConfigError, match=rf"^{message}"):
        build(Recipe, given, "recipe")


def test_a_run_given_arrays_is_the_run_given_numbers() -> None:
    arrays = ExperimentConfig(
        algo="pg",
        seed=np.int64(8),  # type: ignore[arg-type] # What the test is about.
        output=Path("runs"),  # type: ignore[arg-type]
        data={"batch_size": np.int64(8), "mixup": torch.tensor(0.5)},  # type: ignore[arg-type]
        optimizer={"epochs": 8.0, "milestones": np.array([0.5, 0.75])},  # type: ignore[arg-type]
        env={"fusion": np.array([1, 0, 0])},  # type: ignore[arg-type]
        agent={"arguments": {"passes": np.int64(2), "lr": torch.tensor(0.5)}},  # type: ignore[arg-type]
    )
    numbers = ExperimentConfig(
        algo="pg",
        seed=8,
        output="runs",
        data=DataSpec(batch_size=8, mixup=0.5),
        optimizer=Recipe(epochs=8, milestones=(0.5, 0.75)),
        env=EnvSpec(fusion=[1.0, 0.0, 0.0]),
        agent=AgentConfig(arguments={"passes": 2, "lr": 0.5}),
    )
    assert arrays == numbers
    assert arrays.digest == numbers.digest
    assert arrays.to_yaml() == numbers.to_yaml()
    arrays.check_agent()


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("aekd", {"cap": np.float32(0.5)}, None),
        ("aekd", {"cap": "0.5"}, r"^agent\.arguments\.cap: expected float"),
        ("fixed", {"weights": np.ones(2)}, None),
        ("fixed", {"weights": 3}, r"^agent\.arguments\.weights: expected dict or list or None"),
        ("pg", {"passes": np.float64(2)}, None),
        ("pg", {"passes": "2"}, r"^agent\.arguments\.passes: expected int"),
        ("ppo", {"noise_std": "1"}, r"^agent\.arguments\.noise_std: expected float or None"),
    ],
)
def test_arguments_of_agents_are_numbers_too(
    name: str, arguments: dict[str, Any], expected: str | None
) -> None:
    with nullcontext() if expected is None else pytest.raises(ConfigError, match=expected):
        check_agent(name, arguments)


def test_libraries_are_given_pythons_numbers() -> None:
    _, theirs = split({"n_steps": np.int64(4), "policy_class": dict, "gamma": torch.tensor(0.5)})
    assert theirs == {"n_steps": 4, "policy_class": dict, "gamma": 0.5}
    assert [type(value) for value in theirs.values()] == [int, type, float]


def test_networks_and_datasets_are_given_pythons_numbers() -> None:
    channels = np.array([4, 4, 8, 16])
    network = build_network("resnet8", num_classes=10, channels=channels, width=torch.tensor(1.0))
    assert network.feature_dim == 16
    with pytest.raises(ConfigError, match=r"^arguments\.channels: expected 4 values"):
        TeacherSpec("resnet8", arguments={"channels": channels[:3]})
    with pytest.raises(ConfigError, match=r"^arguments\.path: expected str, got 3"):
        load_dataset("npz", path=np.int64(3))
