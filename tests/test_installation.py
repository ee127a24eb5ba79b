"""What an import costs, and what is said where a package is missing or somebody else's."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mtkd

CURE = "install mtkd-env in an environment of its own"


def test_the_environment_is_imported_without_what_only_some_need() -> None:
    heavy = {"torchvision", "stable_baselines3", "matplotlib", "sklearn", "tensorboard"}
    code = f"import sys, mtkd_env; print(*{heavy} & sys.modules.keys())"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []


def installed(folder: Path) -> None:
    """As the project lies in an environment, as far as it is looked at."""
    shutil.copy(mtkd.__file__, folder)
    for name in mtkd.OWN:
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()


def said(folder: Path, *paths: Path) -> str:
    """What the program of a user is told who imports what an environment and paths hold."""
    places = [*map(str, paths), str(folder)]
    code = f"import sys; sys.path[:0] = {places}; import mtkd; mtkd.require(mtkd.OWN)"
    command = [sys.executable, "-I", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_the_packages_of_an_environment_are_its_own(tmp_path: Path) -> None:
    installed(tmp_path)
    assert said(tmp_path) == ""


@pytest.mark.parametrize("name", mtkd.OWN)
def test_a_foreign_package_is_named_with_the_cure(name: str, tmp_path: Path) -> None:
    environment, other = tmp_path / "environment", tmp_path / "other"
    environment.mkdir()
    installed(environment)
    foreign = other / name / "__init__.py"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    assert said(environment, other).splitlines()[-1] == (
        f"ImportError: the package '{name}' is not mtkd-env's but {foreign}; {CURE}"
    )


def test_another_project_in_the_same_folder_is_named(tmp_path: Path) -> None:
    installed(tmp_path)
    for project, file in (("foreign", "agents"), ("harmless", "parts/agents")):
        about = tmp_path / f"{project}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Name: {project}\nVersion: 1.0\n", encoding="utf-8")
        (about / "RECORD").write_text(f"{file}/__init__.py,,\n", encoding="utf-8")
    assert said(tmp_path).splitlines()[-1] == (
        f"ImportError: the package 'agents' is of mtkd-env and of foreign, in {tmp_path}; {CURE}"
    )


@pytest.mark.parametrize("program", ["bin/mtkd", Path(mtkd.__file__).parent / "experiments/run.py"])
def test_what_is_missing_ends_a_program_with_the_line_that_helps(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(program)])
    with pytest.raises(SystemExit) as ended:
        mtkd.require(others=("rich", "not_there", "nor_this"))
    assert ended.value.code == (
        "error: needs not_there, nor_this; install it with pip install 'mtkd-env[commands]'"
    )


def test_what_is_missing_is_an_import_error_in_a_users_program() -> None:
    with pytest.raises(ImportError, match=r"^needs not_there; .*mtkd-env\[commands\]"):
        mtkd.require(others=("not_there",))
