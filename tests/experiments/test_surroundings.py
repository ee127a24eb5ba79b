"""What programs inherit from whoever starts them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import experiments
from experiments.console import console
from experiments.running.failures import run_program
from mtkd_env.keeping import StopRequest
from tiny import seldom

FOLDER = Path(experiments.__file__).parent
PROGRAMS = sorted(
    path.relative_to(FOLDER).as_posix()
    for path in (*FOLDER.glob("*.py"), *FOLDER.glob("transfer/*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
)


def test_the_programs_are_found() -> None:
    assert {"run.py", "compare.py", "report.py", "transfer/detection.py"} <= set(PROGRAMS)


@pytest.mark.parametrize(
    "program",
    seldom(PROGRAMS, {"run.py"}),
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


# Signals, and output that nobody reads.


@pytest.fixture(autouse=True)
def _sigterm_as_at_the_start() -> Iterator[None]:
    """Ray, which other tests of the process may have started, has a handler of its own."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def ask_to_end(_: Sequence[str]) -> int:
    signal.raise_signal(signal.SIGTERM)
    return 0


def test_sigterm_says_how_to_go_on_as_an_interrupt_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_program(ask_to_end, [], "the same command goes on") == 143
    assert capsys.readouterr().err == "interrupted: the same command goes on\n"
    assert signal.getsignal(signal.SIGTERM) is before


class Unread(StringIO):
    """Output whose reader has left."""

    def write(self, text: str) -> int:
        del text
        raise BrokenPipeError


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A console whose reader has left; pytest's own output is left alone."""
    monkeypatch.setattr("experiments.running.signals.forget_output", lambda: None)
    return console(file=Unread())


def test_output_that_nobody_reads_ends_a_program_as_sigterm_does(
    unread: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak(_: Sequence[str]) -> int:
        unread.print("a line")
        return 0

    assert run_program(speak, [], "the same command goes on") == 143
    assert capsys.readouterr().err == "interrupted: the same command goes on\n"


def test_output_that_nobody_reads_asks_a_training_to_stop(unread: Console) -> None:
    with StopRequest() as stop:
        unread.print("a line")
        unread.print("another")
        assert stop.number == signal.SIGTERM


@pytest.mark.slow
def test_a_run_into_a_closed_pipe_leaves_a_checkpoint(tmp_path: Path) -> None:
    flags = "--algo aver --data.train_size 64 --data.batch_size 16 --teachers.recipe.epochs 1"
    command = [sys.executable, str(FOLDER / "run.py"), *flags.split(), "--output", str(tmp_path)]
    pipe = subprocess.PIPE
    surroundings = os.environ | {"MTKD_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, env=surroundings, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while b"epoch   1" not in process.stdout.readline():
            pass
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 143
    (folder,) = tmp_path.glob("digits_aver*")
    assert said.endswith(f"to go on: mtkd run --resume {folder}\n")
    assert list(folder.glob("checkpoints/step-*"))
