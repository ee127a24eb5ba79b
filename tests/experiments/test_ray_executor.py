import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from comparisons import BASE
from experiments import compare
from experiments.executors import Failure, Task, work_off
from experiments.executors.cluster import RayExecutor, RunResources
from experiments.executors.place import attempt_in
from mtkd_env.errors import ConfigError
from mtkd_env.files import load_checkpoint
from run_folders import comparable
from tasks import Notes, die_unless, linger, make_task, wait_for, write_gpus, write_node

NONE = RunResources(gpus=0.0)


# Resources.


@pytest.mark.parametrize(
    ("cpus", "gpus", "node", "runs"),
    [
        (1.0, 0.0, {"CPU": 8.0}, 8),
        (3.0, None, {"CPU": 8.0, "GPU": 1.0}, 2),
        (0.5, 0.0, {"CPU": 1.0}, 2),
        (1.0, 1.0, {"CPU": 8.0, "GPU": 4.0}, 4),
        (1.0, 0.5, {"CPU": 8.0, "GPU": 2.0}, 4),
        # A share of 0.6 leaves 0.4 of every GPU unused.
        (1.0, 0.6, {"CPU": 8.0, "GPU": 2.0}, 2),
        (1.0, 2.0, {"CPU": 8.0, "GPU": 5.0}, 2),
        (4.0, 0.25, {"CPU": 8.0, "GPU": 8.0}, 2),
        (1.0, 1.0, {"CPU": 8.0}, 0),
        (1.0, 0.0, {}, 0),
    ],
)
def test_a_node_has_room_for_what_fits_on_it(
    cpus: float, gpus: float | None, node: dict[str, float], runs: int
) -> None:
    assert RunResources(cpus, gpus).fits(node) == runs


def test_a_run_has_a_thread_for_every_core() -> None:
    assert [RunResources(cpus).threads for cpus in (0.5, 1.0, 2.5, 4.0)] == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("cpus", "gpus", "message"),
    [
        (0.0, None, "--cpus-per-run: expected a number > 0, got 0"),
        (float("inf"), None, "--cpus-per-run: expected a number > 0, got inf"),
        (1.0, -1.0, "--gpus-per-run: expected a share up to 1 or a whole number, got -1"),
        (1.0, 1.5, "--gpus-per-run: expected a share up to 1 or a whole number, got 1.5"),
        (1.0, float("nan"), "--gpus-per-run: expected"),
    ],
)
def test_resources_that_cannot_be_had_are_refused(
    cpus: float, gpus: float | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        RunResources(cpus, gpus)


# Places.


def test_work_is_done_in_the_folder_of_whoever_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert attempt_in(tmp_path / "there", [], partial(Path("made").touch)) is None
    assert (tmp_path / "there" / "made").exists()


@pytest.mark.parametrize("missing", ["folder", "token"])
def test_a_node_that_does_not_see_a_folder_says_which(missing: str, tmp_path: Path) -> None:
    token = tmp_path / "shared" / "token"
    token.parent.mkdir()
    folder = tmp_path
    if missing == "folder":
        token.touch()
        folder = tmp_path / "elsewhere"
    failure = attempt_in(folder, [token], partial(Path(tmp_path / "made").touch))
    assert isinstance(failure, Failure)
    assert not failure.died
    unseen = folder if missing == "folder" else token.parent
    assert f"does not see {unseen}; the working folder, --output and" in failure.message
    assert not (tmp_path / "made").exists()


# Ray.


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'mtkd-env[ray]'")):
        RayExecutor(None, RunResources())


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes on this machine, each with a core and a GPU as far as Ray knows."""
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    with pytest.MonkeyPatch.context() as during:
        # No token in the home folder, no reports to anyone.
        during.setenv("RAY_AUTH_MODE", "disabled")
        during.setenv("RAY_USAGE_STATS_ENABLED", "0")
        during.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # For `tasks`.
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        for _ in range(2):
            cluster.add_node(num_cpus=1, num_gpus=1, include_dashboard=False)
        yield cluster.address
        cluster.shutdown()


@pytest.fixture
def executor(address: str, tmp_path: Path) -> Iterator[RayExecutor]:
    made = RayExecutor(address, RunResources(), shared=[tmp_path / "shared"])
    yield made
    made.close()
    assert not list((tmp_path / "shared").iterdir())


@pytest.mark.slow
def test_a_worker_that_dies_costs_only_its_own_task_which_is_tried_again(
    executor: RayExecutor, tmp_path: Path
) -> None:
    works = {
        "first": partial(write_node, tmp_path / "first"),
        "second": partial(write_node, tmp_path / "second"),
        "dies once": partial(die_unless, tmp_path / "died"),
        "failing": partial(int, "word"),
        "dies": partial(os._exit, 3),
    }
    notes = Notes()
    tasks = [make_task(name, work, tmp_path) for name, work in works.items()]
    failures = {
        task.name: failure for task, failure in work_off(tasks, executor, notes, retries=1).items()
    }
    assert failures.keys() == {"failing", "dies"}
    assert failures["failing"].message == "invalid literal for int() with base 10: 'word'"
    assert not failures["failing"].died
    assert failures["dies"].died
    assert sorted(notes.lost) == ["dies", "dies once"]
    assert notes.ends.keys() == works.keys()
    # Both nodes did something.
    assert (tmp_path / "first").read_text() != (tmp_path / "second").read_text()
    assert executor.room() == 2


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "room", "seen"), [(0.5, 4, "0"), (None, 2, "0"), (0.0, 4, "")])
def test_a_run_sees_the_gpu_that_it_has_a_share_of_and_no_other(
    gpus: float | None, room: int, seen: str, address: str, tmp_path: Path
) -> None:
    executor = RayExecutor(address, RunResources(0.5, gpus))
    work = partial(write_gpus, tmp_path / "seen")
    assert work_off([make_task("looks", work, tmp_path)], executor, Notes()) == {}
    assert executor.room() == room
    executor.close()
    assert (tmp_path / "seen").read_text() == seen


@pytest.mark.slow
def test_a_run_that_is_interrupted_may_keep_what_it_has(address: str, tmp_path: Path) -> None:
    executor = RayExecutor(address, NONE, most=1)
    assert executor.room() == 1
    executor.start(Task("long", partial(linger, tmp_path / "kept"), tmp_path / "log", 1))
    wait_for(tmp_path / "kept")
    executor.close()
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.slow
def test_resources_that_no_node_has_are_told_at_once(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no node has 0\.5 CPUs and 2 GPUs; see --cpus-per-run"):
        RayExecutor(address, RunResources(0.5, 2.0), shared=[tmp_path])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--executor ray: cannot write"):
        RayExecutor(None, NONE, shared=[tmp_path / "file"])


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_told_at_once(address: str) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    with pytest.raises(ConfigError, match=f"--address: cannot connect to {address}: "):
        RayExecutor(address, NONE)


# A whole comparison.

SIX = """
methods: {aver: {}, pg: {}, camkd: {}}
seeds: [0, 1]
"""


def kill_once(run: Path, killed: list[int]) -> None:
    """Kills the process that does a run, after its third epoch."""
    while not killed:
        log, lock = run / "metrics.jsonl", run / "run.lock"
        if log.exists() and lock.exists() and len(log.read_text().splitlines()) >= 3:
            killed.append(int(lock.read_text().split()[1]))
            os.kill(killed[0], signal.SIGKILL)
        time.sleep(0.01)


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_comes_to_what_this_machine_comes_to(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "six.yaml"
    path.write_text(BASE + SIX, encoding="utf-8")
    flags = ["--optimizer.epochs", "12", "--checkpoint.share", "1"]
    outputs = {name: tmp_path / name for name in ("local", "ray")}
    more = {"local": ["--jobs", "2"], "ray": ["--executor", "ray", "--address", address]}
    killed: list[int] = []
    for name, output in outputs.items():
        monkeypatch.setenv("MTKD_CACHE", str(tmp_path / f"cache {name}"))
        if name == "ray":
            runs = [output / "runs" / path.name for path in (outputs["local"] / "runs").iterdir()]
            victim = next(run for run in runs if run.name.startswith("pg-seed0"))
            threading.Thread(target=kill_once, args=(victim, killed), daemon=True).start()
        assert compare.main([str(path), "--output", str(output), *more[name], *flags]) == 0
    assert killed
    folders = [sorted((output / "runs").iterdir()) for output in outputs.values()]
    assert len(folders[0]) == 6
    for local, there in zip(*folders, strict=True):
        assert there.name == local.name
        assert comparable(there) == comparable(local)
        students = [load_checkpoint(run / "student.safetensors") for run in (local, there)]
        assert students[0].keys() == students[1].keys()
        assert all(torch.equal(students[1][key], students[0][key]) for key in students[0])
