"""An agent learns over many tasks; the run is kept, and goes on as if it had never stopped."""

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from experiments.agent_run import AgentRun, AgentRunConfig
from experiments.running.log import read_rows
from experiments.train_agent import chart, main, parse
from mtkd_env.agent_file import load_agent
from mtkd_env.errors import ConfigError
from mtkd_env.keeping import Stopped
from tiny import seldom


def untrained(count: int) -> dict[str, Any]:
    """Teachers that need no training."""
    return {
        "teachers": [
            {"network": "cnn3", "name": f"t{n}", "seed": n, "width": 0.25, "kind": "random"}
            for n in range(count)
        ]
    }


TASKS: dict[str, Any] = {
    "base": {
        "env": {"reward": "heldout"},
        "data": {"train_size": 96, "labelled": 80, "batch_size": 48},
        "student": {"network": "cnn3", "width": 0.25},
        "optimizer": {"epochs": 2},
        "distillation": {"beta": 0, "feature": "none"},
    },
    "draw": {"distillation.temperature": {"uniform": [1, 4]}},
    "tasks": {"two": {"teachers": untrained(2)}, "three": {"teachers": untrained(3)}},
    "held_out": {"one": {"teachers": untrained(1)}},
}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "pg": {"policy": "shared", "agent_every": 1, "hidden": 8, "likelihood": 1.0},
    "ppo": {"policy": "shared", "n_steps": 1, "n_epochs": 1, "batch_size": 48},
}


class Told:
    """Progress that does something after so many students."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after

    def teacher(self, name: str, epoch: int, epochs: int, loss: float) -> None:
        raise AssertionError(f"{name} is trained: {epoch}/{epochs}, {loss}")

    def note(self, text: str) -> None:
        pass

    def student(self, rows: Sequence[Mapping[str, Any]], students: int) -> None:
        assert students == 2
        if len(rows) == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)


def config(folder: Path, algo: str = "pg") -> AgentRunConfig:
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump(TASKS))
    return AgentRunConfig(
        tasks=str(path), algo=algo, arguments=ARGUMENTS[algo], passes=1, device="cpu"
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(folder)]


def test_an_agent_learns_from_every_task_and_is_looked_at(tmp_path: Path) -> None:
    result = AgentRun(config(tmp_path), Told()).complete(tmp_path / "run")
    written = rows(tmp_path / "run")
    assert sorted(row["task"] for row in written) == ["three", "two"]
    assert [row["steps"] for row in written] == [4, 8]
    assert result.updates == written[-1]["agent/updates"] == 8
    # With a single teacher there is nothing to weight.
    assert result.gains == {"one": 0.0}
    assert "gain" not in written[0]
    assert written[1]["gain"] == result.last == 0.0


@pytest.mark.parametrize("algo", seldom(["pg", "ppo"], {"pg"}))
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path, algo: str) -> None:
    settings = config(tmp_path, algo)
    expected = AgentRun(settings, Told()).complete(tmp_path / "whole")
    with pytest.raises(Stopped) as stopped:
        AgentRun(settings, Told(stop_after=1)).complete(tmp_path / "run")
    assert "mtkd train-agent --resume" in str(stopped.value)
    found = AgentRun(settings, Told()).complete(tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert found.updates == expected.updates
    first, second = (load_agent(tmp_path / name) for name in ("run", "whole"))
    assert second.notes["students"] == 2
    for name, tensor in second.tensors.items():
        assert torch.equal(first.tensors[name], tensor)


def test_the_program_shows_how_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(tmp_path)
    flags = ["--tasks", str(tmp_path / "tasks.yaml"), "--passes", "1", "--device", "cpu"]
    assert main([*flags, "--output", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    assert "student   2/2" in shown
    assert "held out, mean        +0.00 points over equal weights" in shown


def test_the_shipped_arguments_are_those_of_the_agent(tmp_path: Path) -> None:
    config(tmp_path)
    settings, folder = parse(["--tasks", str(tmp_path / "tasks.yaml"), "--algo", "pg"])
    assert settings.arguments["policy"] == "shared"
    assert folder is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "tasks: expected a YAML file of tasks"),
        (["--tasks", "t.yaml", "--algo", "pgg"], "unknown name 'pgg'"),
        (["--tasks", "t.yaml", "--passes", "0"], "passes: expected"),
        (["--tasks", "t.yaml", "--pases", "1"], "pases"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(flags)


def test_a_chart_has_a_bar_for_every_look() -> None:
    assert chart([0.0, 1.0, 7.0]) == "▁▂█"
    assert chart([-7.0, 0.0]) == "▁█"
    assert chart([0.0]) == "▁"
