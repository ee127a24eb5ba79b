"""Whatever breaks a run: one line, an exit code, no half-written file, and nothing is lost."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import (
    STEPS,
    Interrupting,
    assert_same,
    configuration,
    crashed,
    interrupted,
    midway,
    whole,
)

from experiments import benchmark, compare, report, run, train_teachers
from experiments.experiment import Result, build, make_folder, run_config, run_experiment
from experiments.running import failures
from experiments.running.lock import LOCK
from experiments.running.result import read_result
from faults import Faults, failing
from mtkd_env.errors import ConfigError
from mtkd_env.files import load_checkpoint, save_checkpoint, write_atomically
from mtkd_env.keeping import Checkpoints
from tiny import SB3_ARGUMENTS

__all__ = ["crashed", "midway", "whole"]


Shown = pytest.CaptureFixture[str]

ROOT = Path(run.__file__).parent.parent

PROGRAMS = [run, compare, train_teachers, benchmark, report]


def test_every_program_takes_the_same_way_out() -> None:
    assert all(program.main.func is failures.run_program for program in PROGRAMS)


# What is said.


def raising(error: BaseException) -> Callable[[Sequence[str]], int]:
    def program(argv: Sequence[str]) -> int:
        assert "--debug" not in argv
        raise error

    return program


WORKER = RuntimeError("DataLoader worker (pid 17) exited unexpectedly\nwith exit code 1")
ERRORS: dict[str, tuple[Exception, int, str]] = {
    "a value that cannot be used": (ConfigError("seed: no"), 2, "seed: no"),
    "a training that diverged": (FloatingPointError("loss/kd is NaN"), 2, "loss/kd is NaN"),
    "a full disk": (
        OSError(errno.ENOSPC, "No space left on device", "runs/x/student.pt"),
        1,
        "runs/x/student.pt: No space left on device; the disk is full",
    ),
    "a folder that is read-only": (
        OSError(errno.EROFS, "Read-only file system", "runs"),
        1,
        "runs: Read-only file system",
    ),
    "a file that must not be read": (
        PermissionError(errno.EACCES, "Permission denied", "images.npz"),
        1,
        "images.npz: Permission denied",
    ),
    "an error of the system that says little": (OSError("cannot\nread"), 1, "cannot read"),
    "an optional package that is missing": (
        ModuleNotFoundError("No module named 'timm'", name="timm.models"),
        1,
        "needs timm; install it with pip install 'mtkd-env[timm]'",
    ),
    "any other package that is missing": (
        ModuleNotFoundError("No module named 'users'", name="users"),
        1,
        "No module named 'users'",
    ),
    "a GPU that is too small": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ..."),
        1,
        "the memory of the GPU is not enough (CUDA out of memory); a smaller data.batch_size, or "
        "--precision bf16, may help",
    ),
    "a machine that is too small": (
        MemoryError(),
        1,
        "the memory of the machine is not enough (no more to be had); a smaller data.batch_size, "
        "or --precision bf16, may help",
    ),
    "a worker that died": (
        WORKER,
        1,
        "RuntimeError: DataLoader worker (pid 17) exited unexpectedly with exit code 1 (--debug "
        "shows where)",
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
def test_an_error_is_one_line_and_a_code(
    kind: str, debug: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    error, code, expected = ERRORS[kind]
    flags = ["--debug"] if debug else []
    assert failures.run_program(raising(error), flags, "nothing") == code
    shown = capsys.readouterr().err
    assert shown.endswith(f"error: {expected}\n")
    assert shown.startswith("Traceback") == debug
    assert debug or shown.count("\n") == 1


def test_what_is_known_of_the_way_back_is_part_of_the_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    error.add_note("to go on: mtkd run --resume runs/x")
    failures.run_program(raising(error), [], "nothing")
    shown = capsys.readouterr().err
    assert shown.endswith("the disk is full; to go on: mtkd run --resume runs/x\n")


def test_an_interruption_says_what_it_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    assert failures.run_program(raising(KeyboardInterrupt()), [], "half a table") == 130
    assert capsys.readouterr().err == "interrupted: half a table\n"


# Files.


def test_a_file_that_cannot_be_written_is_named_and_not_left(tmp_path: Path) -> None:
    path = tmp_path / "student.pt"
    content = {"network": torch.zeros(10_000)}
    with failing(Faults(tmp_path)) as faults:
        save_checkpoint(path, content)
    path.unlink()
    for number in range(1, len(faults.seen) + 1):
        with (
            pytest.raises(OSError, match="No space left") as raised,
            failing(Faults(tmp_path, number)),
        ):
            save_checkpoint(path, content)
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(path))
        # The last thing is the folder's turn, when the file has its name.
        left = [path.name] if number == len(faults.seen) else []
        assert [found.name for found in tmp_path.iterdir()] == left
    assert load_checkpoint(path)["network"].equal(content["network"])


def test_other_errors_while_writing_stay_as_they_are(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        raise RuntimeError(f"no tensor for {path.suffix}")

    with pytest.raises(RuntimeError, match=r"^no tensor for \.pt$"):
        write_atomically(tmp_path / "x.pt", write)
    assert list(tmp_path.iterdir()) == []


def test_a_method_of_any_name_stays_in_the_folder(small: str, tmp_path: Path) -> None:
    config = configuration(
        small, "../../../pg", "--agent.name", "pg", "--output", str(tmp_path / "runs")
    )
    assert make_folder(config).parent == tmp_path / "runs"


def test_a_checkpoint_cannot_cut_files_elsewhere(small: str, crashed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("somebody's")

    def load(self: Any) -> Any:
        state = original(self)
        state["log"]["../other.txt"] = 0
        return state

    with pytest.MonkeyPatch.context() as during:
        original = Checkpoints.load
        during.setattr(Checkpoints, "load", load)
        run_experiment(configuration(small, "uniform"), Interrupting(), crashed, resume=True)
    assert other.read_text() == "somebody's"


def test_a_result_that_names_another_folder_is_not_followed(tmp_path: Path, whole: Path) -> None:
    folder, other = shutil.copytree(whole, tmp_path / "run"), tmp_path / "other"
    other.mkdir()
    path = folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "folder": str(other)}))
    assert run.main(["--resume", str(folder)]) == 0
    assert list(other.iterdir()) == []
    assert (folder / "curves.png").exists()


# Every write of a run.


def flags_of(small: str, output: Path, algo: str) -> list[str]:
    flags = ["--config", small, "--algo", algo, "--output", str(output)]
    return [*flags, "--agent.arguments", json.dumps(SB3_ARGUMENTS.get(algo, {}))]


def assert_nothing_half_written(output: Path) -> None:
    """No temporary file, no lock, and whatever can be read is whole; logs are cut at resuming."""
    for path in output.rglob("*"):
        assert not path.name.startswith(".")
        assert path.name != LOCK
        if path.suffix == ".pt":
            load_checkpoint(path)
        if path.name == "result.json":
            assert read_result(Result, path.parent)
        if path.name == "config.yaml":
            run_config(path.parent)


class Undisturbed:
    """A run that nothing disturbs.

    Args:
        algo: Its method.
        small: Its configuration.
        parent: Where it goes.

    Attributes:
        folder: Its folder.
        writes: The operations that write, each with its file.
    """

    def __init__(self, algo: str, small: str, parent: Path) -> None:
        self.algo = algo
        self.small = small
        # Trains the teachers, which is not part of what is disturbed.
        build(configuration(small, algo), Interrupting())
        with failing(Faults(parent / "whole")) as faults:
            assert run.main(flags_of(small, parent / "whole", algo)) == 0
        (self.folder,) = (parent / "whole").iterdir()
        self.writes = faults.seen

    def disturbed(self, at: int, lasting: bool, output: Path, shown: Shown) -> str:
        """Lets a write fail; gives what became of the run after it was gone on with."""
        flags = flags_of(self.small, output, self.algo)
        with failing(Faults(output, at, lasting=lasting)):
            code = run.main(flags)
        said = shown.readouterr().err
        folders = [path for path in output.glob("*") if (path / "config.yaml").exists()]
        assert_nothing_half_written(output)
        if code == 0:
            # TensorBoard's last events were given to it again, and it wrote them.
            assert not lasting
        else:
            assert code == (2 if "error: output: cannot make" in said else 1)
            assert re.fullmatch(r"error: .*No space left on device.*\n", said), said
        if not folders:
            assert run.main(flags) == 0
            kept = "no folder yet"
        else:
            finished = (folders[0] / "result.json").exists()
            some = any((folders[0] / "checkpoints").glob("step-*"))
            kept = "finished" if finished else "checkpoint" if some else "from its beginning"
            assert finished or code == 0 or f"mtkd run --resume {folders[0]}" in said
            assert run.main(["--resume", str(folders[0])]) == 0
        (folder,) = [path for path in output.glob("*") if (path / "result.json").exists()]
        assert_same(self.folder, folder)
        assert (folder / "curves.png").exists()
        shown.readouterr()
        return kept


@pytest.fixture(scope="module")
def undisturbed(small: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed("pg", small, tmp_path_factory.mktemp("undisturbed"))


def assert_survives(run_of: Undisturbed, numbers: Sequence[int], tmp_path: Path, out: Any) -> None:
    """Lets each of some writes fail: once all later ones as well, once none of them."""
    ends: Counter[str] = Counter()
    for at in numbers:
        for lasting in (True, False):
            ends[run_of.disturbed(at, lasting, tmp_path / f"{at}{lasting}", out)] += 1
            shutil.rmtree(tmp_path / f"{at}{lasting}")
    with out.disabled():
        total = 2 * len(run_of.writes)
        print(f"{run_of.algo}: {sum(ends.values())} of {total} cases: {dict(ends)}")  # noqa: T201 - asked for


def test_a_run_survives_a_write_that_fails(
    undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writes = undisturbed.writes
    kinds = {"mkdir", "create", "write", "sync", "replace", "open"}
    assert kinds == {operation for operation, _ in writes}
    checkpoints = [number for number, (_, path) in enumerate(writes, 1) if "step-" in path]
    undisturbed.disturbed(checkpoints[-2], True, tmp_path / "checkpoint", capsys)
    results = [number for number, (_, path) in enumerate(writes, 1) if "result" in path]
    undisturbed.disturbed(results[0], True, tmp_path / "result", capsys)


# Of all writes, every so many: `FAULTS=1 pytest -m "" tests/test_faults.py -k every -s` lets each
# of them fail.
STRIDE = int(os.environ.get("FAULTS", "7"))


# Stable-Baselines3 leaves a file open that it could not write.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("algo", ["pg", "ppo"])
def test_a_run_survives_every_write_that_fails(
    algo: str, small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Undisturbed(algo, small, tmp_path)
    assert_survives(whole, range(1, len(whole.writes) + 1, STRIDE), tmp_path, capsys)


# Every checkpoint.


def damaged(content: bytes, number: int) -> bytes:
    """A file with a flipped bit, or a shorter one."""
    draw = random.Random(number)
    place = draw.randrange(len(content))
    if number % 3 == 0:
        return content[:place]
    flipped = content[place] ^ (1 << draw.randrange(8))
    return content[:place] + bytes([flipped]) + content[place + 1 :]


@pytest.mark.parametrize(
    "cases", [range(1), pytest.param(range(1, 150), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    cases: range, small: str, tmp_path: Path
) -> None:
    config = configuration(small, "pg")
    run_experiment(config, Interrupting(), tmp_path / "whole")
    interrupted(config, tmp_path / "run", at=2 * STEPS + 2)
    for number in cases:
        folder = tmp_path / f"run{number}"
        shutil.copytree(tmp_path / "run", folder)
        first, last = sorted((folder / "checkpoints").iterdir())
        last.write_bytes(damaged(last.read_bytes(), number))
        # Every seventh time both are.
        both = number % 7 == 2
        if both:
            first.write_bytes(damaged(first.read_bytes(), number + 1))
        with pytest.warns(UserWarning, match="damaged checkpoint") as told:
            run_experiment(config, again := Interrupting(), folder, resume=True)
        assert [str(one.message).partition(": ")[0] for one in told] == [
            str(path) for path in ([last, first] if both else [last])
        ]
        assert again.steps == (3 if both else 2) * STEPS
        assert_same(tmp_path / "whole", folder)
        shutil.rmtree(folder)


# Folders and files that are not what they should be.


def test_a_file_in_place_of_the_folder_is_told(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file")
    assert run.main(flags_of(small, tmp_path / "runs", "uniform")) == 2
    expected = f"error: output: {tmp_path / 'runs'} is no folder, or in none\n"
    assert capsys.readouterr().err == expected
    assert (tmp_path / "runs").read_text() == "a file"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EDQUOT], ids=os.strerror)
def test_a_folder_that_cannot_be_written_into_is_told(
    code: int, small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs"
    with failing(Faults(output, 1, code=code)):
        assert run.main(flags_of(small, output, "uniform")) == 2
    shown = capsys.readouterr().err
    assert re.fullmatch(f"error: output: cannot make {output}/.*: {os.strerror(code)}\n", shown)
    assert not output.exists()


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_told(small: str, tmp_path: Path) -> None:
    config = configuration(small, "pg", "--cache", str(tmp_path / "cache"))
    interrupted(config, tmp_path / "run")
    # Enough for texts and not for a checkpoint, by the kernel's own hand.
    limited = 'ulimit -f 16; exec "$@"'
    program = [sys.executable, str(ROOT / "experiments" / "run.py"), "--resume", tmp_path / "run"]
    done = subprocess.run(["bash", "-c", limited, "-", *program], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: .*/checkpoints/step-\d+.pt: File too large; .* ulimit -f; to go", line)
    assert_nothing_half_written(tmp_path / "run")
    run_experiment(config, Interrupting(), tmp_path / "run", resume=True)
    run_experiment(config, Interrupting(), tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "run")
