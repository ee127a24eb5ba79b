"""What programs inherit from whoever starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import experiments

FOLDER = Path(experiments.__file__).parent
PROGRAMS = sorted(
    path.relative_to(FOLDER).as_posix()
    for path in (*FOLDER.glob("*.py"), *FOLDER.glob("transfer/*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
)


def test_the_programs_are_found() -> None:
    assert {"run.py", "compare.py", "report.py", "transfer/compare.py"} <= set(PROGRAMS)


@pytest.mark.parametrize(
    "program",
    [name if name == "run.py" else pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS],
)
def test_a_notebooks_backend_that_is_not_installed_ends_no_program(program: str) -> None:
    surroundings = os.environ | {"MPLBACKEND": "not_installed"}
    command = [sys.executable, str(FOLDER / program), "--help"]
    ended = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(("named", "kept"), [("svg", "svg"), ("not_installed", None)])
def test_a_backend_that_is_there_is_kept(named: str, kept: str | None) -> None:
    code = "import os, mtkd_env, matplotlib; print(os.environ.get('MPLBACKEND'))"
    surroundings = os.environ | {"MPLBACKEND": named}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [str(kept)]
