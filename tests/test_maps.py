"""A package's docstring is a map of its rooms; CONTRIBUTING.md says who imports whom."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(
    ".".join(path.parent.relative_to(ROOT).parts)
    for package in ("mtkd_env", "agents", "experiments")
    for path in (ROOT / package).rglob("__init__.py")
)

# What is added to these is a file and a line in their table, and nothing else.
TABLES = ("mtkd_env.data", "mtkd_env.networks", "mtkd_env.weighting")


@pytest.mark.parametrize("name", PACKAGES)
def test_every_room_is_on_the_map_and_no_other(name: str) -> None:
    package = import_module(name)
    folder = Path(package.__path__[0])
    rooms = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    shown = set(re.findall(r"`([a-z_\d]+\.py)`", str(package.__doc__)))
    assert shown <= rooms if name in TABLES else shown == rooms


def test_contributing_shows_the_layers_that_are_checked() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```\n(experiments → .*?)^```$", text, re.MULTILINE | re.DOTALL)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages, modules = (each["layers"] for each in settings["tool"]["importlinter"]["contracts"])
    layers = [" ".join(layer.split()).strip("()") for layer in shown.split("→")]
    assert [layer.replace("│", "|") for layer in layers] == [
        *packages[:-1],
        *modules,
    ]
