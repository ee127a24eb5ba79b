"""Starts the command `mtkd`, if what it needs is there; imports nothing of the project before.

The names `agents` and `experiments` are short, and others have packages of the same names.
"""

import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

# Packages of this project by names that others have as well.
OWN = ("agents", "experiments")

# What the programs need beside what every user needs.
COMMANDS = ("jinja2", "jsonargparse", "matplotlib", "rich")


def main() -> int:
    """The command; gives its exit code."""
    require(OWN, COMMANDS)
    from experiments.command import main as command

    return command()


def require(own: tuple[str, ...] = (), others: tuple[str, ...] = ()) -> None:
    """Looks whether packages are there, without importing them.

    Args:
        own: Packages of this project, which may be somebody else's.
        others: Packages of the extra `commands`.

    Raises:
        ImportError: They are not, in a program of somebody else's.
        SystemExit: They are not, in one of ours, which ends with a line.
    """
    obstacle = next(_obstacles(own, others), None)
    if obstacle is None:
        return
    program = Path(sys.argv[0]).resolve()
    if program.stem == "mtkd" or FOLDER / "experiments" in program.parents:
        raise SystemExit(f"error: {obstacle}")
    raise ImportError(obstacle)


def _obstacles(own: tuple[str, ...], others: tuple[str, ...]) -> Iterator[str]:
    cure = "install mtkd-env in an environment of its own"
    for name in own:
        spec = find_spec(name)
        # A namespace, which has no origin, is somebody's folder without an `__init__.py`.
        place = Path(spec.origin or "").resolve() if spec else FOLDER
        if place != FOLDER / name / "__init__.py":
            yield f"the package '{name}' is not mtkd-env's but {place}; {cure}"
        for project in _projects_with(name):
            yield f"the package '{name}' is of mtkd-env and of {project}, in {FOLDER}; {cure}"
    missing = [name for name in others if find_spec(name) is None]
    if missing:
        yield f"needs {', '.join(missing)}; install it with pip install 'mtkd-env[commands]'"


def _projects_with(package: str) -> Iterator[str]:
    """Installed projects other than this one that keep a package of that name beside it."""
    file = f"{package}/__init__.py"
    for project in distributions():
        # The list of its files is searched as a text: that takes a tenth of the time.
        files = f"\n{project.read_text('RECORD') or ''}"
        place = Path(str(project.locate_file(file))).resolve()
        if f"\n{file}," in files and place == FOLDER / file and project.name != "mtkd-env":
            yield project.name
