"""The main program in two processes that `torchrun` starts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments import run
from mtkd_env.files import load_checkpoint
from run_folders import comparable

PROGRAM = Path(run.__file__)
EPOCHS = 3

SMALL = """
teachers:
  teachers:
    - {network: resnet8, width: 0.125}
    - {network: wrn_16_1, width: 0.125}
  recipe: {epochs: 1}
data: {train_size: 128, batch_size: 16}
student: {network: resnet8, width: 0.125}
optimizer: {epochs: 3, lr: 0.01}
device: cpu
checkpoint: {share: 1.0}
"""

# Time that a group of two processes has to notice that one of them is no more.
NOTICE = 60


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return str(path)


def command(processes: int, *flags: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(launcher if processes > 1 else []), str(PROGRAM), *flags]


def launch(processes: int, *flags: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(processes, *flags),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def finish() -> Iterator[list[subprocess.Popen[str]]]:
    """Ends what a test that fails has left running."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def output_of(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def run_of(folder: Path, algo: str) -> Path:
    (found,) = folder.glob(f"digits_{algo}_*")
    return found


def same_students(ours: Path, theirs: Path) -> None:
    students = [load_checkpoint(folder / "student.safetensors") for folder in (ours, theirs)]
    torch.testing.assert_close(*students, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_two_processes_do_the_runs_of_one(
    small: str, tmp_path: Path, finish: list[subprocess.Popen[str]]
) -> None:
    algos = ("aver", "pg", "ppo")
    flags = ["--config", small, "--algo", ",".join(algos), "--cache", str(tmp_path / "cache")]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run.main([*flags, "--output", str(one)]) == 0
    finish.append(process := launch(2, *flags, "--output", str(two)))
    output = output_of(process)
    assert output.count("Students") == 1
    assert len(list(two.iterdir())) == len(algos)
    for algo in algos:
        ours, theirs = run_of(two, algo), run_of(one, algo)
        same_students(ours, theirs)
        assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
        for row, expected in zip(comparable(ours), comparable(theirs), strict=True):
            assert row == pytest.approx(expected, rel=0.02, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["aver", "pg", "ppo"])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    small: str, tmp_path: Path, finish: list[subprocess.Popen[str]], algo: str
) -> None:
    flags = ["--config", small, "--algo", algo, "--cache", str(tmp_path / "cache")]
    flags += ["--epochs", "12"]
    through = tmp_path / "through"
    finish.append(process := launch(2, *flags, "--output", str(through)))
    output_of(process)
    killed = tmp_path / "killed"
    finish.append(process := launch(2, *flags, "--output", str(killed)))
    checkpoint = wait_for(killed, "*/checkpoints/step-*.pt")
    os.kill(follower(process.pid), signal.SIGKILL)
    began = time.monotonic()
    output, _ = process.communicate(timeout=2 * NOTICE)
    assert time.monotonic() - began < NOTICE
    assert process.returncode != 0, output
    folder = checkpoint.parent.parent
    assert not (folder / "result.json").exists()
    finish.append(process := launch(2, "--resume", str(folder)))
    output_of(process)
    theirs = run_of(through, algo)
    same_students(folder, theirs)
    for row, expected in zip(comparable(folder), comparable(theirs), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)


def wait_for(folder: Path, pattern: str) -> Path:
    """The first file of a pattern, once it is there."""
    for _ in range(6000):
        if found := list(folder.glob(pattern)):
            return found[0]
        time.sleep(0.02)
    raise AssertionError(f"no {pattern} in {folder}")


def follower(launcher: int) -> int:
    """The second process that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="utf-8")
    for child in children.split():
        if b"RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"{launcher} has no second process: {children}")
