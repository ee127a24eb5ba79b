"""Runs with objects: what their records say, and who can go on with them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from experiments.config import (
    ExperimentConfig,
    Layer,
    build_config,
    parse_arguments,
    read_flags,
)
from experiments.experiment import run_experiment
from experiments.run import main
from experiments.training import Progress
from mtkd_env import DataSpec, Distillation, EnvSpec, Recipe, StudentSpec
from mtkd_env.errors import ConfigError
from mtkd_env.networks import cut_at
from mtkd_env.options import build
from mtkd_env.teachers import PoolSpec
from tiny import SMALL_RUN
from users_networks import Plain
from users_objects import Confident, Squares, gap, pays, squares

HERE = "users_objects"


def of(**changes: Any) -> ExperimentConfig:
    values = yaml.safe_load(SMALL_RUN)
    values["teachers"] = build(PoolSpec, values["teachers"])
    values["optimizer"] = Recipe(epochs=1)
    return build(ExperimentConfig, {**values, "algo": "aver", "warmup": {"epochs": 0}, **changes})


IMPORTABLE: dict[str, Any] = {
    "algo": Confident,
    "data": DataSpec(squares, batch_size=4),
    "student": StudentSpec(Plain),
    "optimizer": Recipe(epochs=1, optimizer=torch.optim.Adam, schedule=pays),
    "distillation": Distillation(logit={"kd": 1.0, gap: 0.5}),
    "env": EnvSpec(reward=pays, observation=["gaps", gap]),
}


def test_what_can_be_imported_is_recorded_by_its_name_and_read_again() -> None:
    config = of(**IMPORTABLE)
    assert config.in_memory == []
    text = yaml.safe_load(config.to_yaml())
    assert text["algo"] == "users_objects:Confident"
    assert text["data"]["dataset"] == "users_objects:squares"
    assert text["student"]["network"] == "users_networks:Plain"
    assert text["distillation"]["logit"] == {"kd": 1.0, f"{HERE}:gap": 0.5}
    assert text["env"]["observation"] == ["gaps", f"{HERE}:gap"]
    again = build_config(text["algo"], [Layer("run", text)], read_flags(["--trust"]))
    assert (again.to_yaml(), again.digest) == (config.to_yaml(), config.digest)


def test_flags_name_what_objects_stand_for() -> None:
    flags = {
        "--algo": "users_objects:Confident",
        "--env.reward": f"{HERE}:pays",
        "--env.observation": f"[gaps, {HERE}:gap]",
        "--distillation.logit": f"{{kd: 1, {HERE}:gap: 0.5}}",
        "--optimizer.optimizer": "torch.optim:Adam",
        "--optimizer.schedule": f"{HERE}:pays",
        "--data.dataset": "users_objects:squares",
        "--student.network": "users_networks:Plain",
    }
    (config,) = parse_arguments([f"{flag}={value}" for flag, value in flags.items()])
    config.check_agent()
    assert config.distillation.logit == {"kd": 1.0, f"{HERE}:gap": 0.5}
    assert config.env.observation == ["gaps", f"{HERE}:gap"]
    with pytest.raises(
        ConfigError, match=r"env\.reward: .* no attribute 'pay'; did you mean 'pays'"
    ):
        parse_arguments([f"--env.reward={HERE}:pay"])


class Told(Progress):
    """Progress that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_run_of_objects_in_memory_says_that_others_cannot_resume_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = of(
        data=DataSpec({"train": Squares(64), "test": Squares(6)}, batch_size=16),
        student=StudentSpec(cut_at(Plain, "body")),
        env=EnvSpec(reward=partial(pays)),
        output=str(tmp_path),
    )
    keys = "data.dataset, student.network, env.reward"
    assert config.in_memory == keys.split(", ")
    told = Told()
    result = run_experiment(config, told)
    assert f"is in its memory ({keys})" in told.notes[0]
    names = ("object of users_objects:Squares", "object of users_networks:Plain@body")
    assert (result.dataset, result.student) == names
    written = json.loads((Path(result.folder) / "result.json").read_text(encoding="utf-8"))
    assert (written["dataset"], written["student"]) == names
    # Whoever has the objects can.
    again = run_experiment(config, told, Path(result.folder), resume=True)
    assert again.last == result.last
    assert main(["--resume", result.folder]) == 2
    assert "was in the memory of the program that made the run" in capsys.readouterr().err
