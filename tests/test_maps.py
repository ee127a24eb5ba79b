"""A package's docstring is a map of its rooms."""

import re
from importlib import import_module
from pathlib import Path

import pytest

PACKAGES = [
    "mtkd_env",
    "agents",
    "experiments",
    "experiments.benchmarks",
    "experiments.comparison",
    "experiments.executors",
    "experiments.html_report",
    "experiments.running",
    "experiments.transfer",
]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_room_is_on_the_map_and_no_other(name: str) -> None:
    package = import_module(name)
    folder = Path(package.__path__[0])
    rooms = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`([a-z_\d]+\.py)`", str(package.__doc__))) == rooms
