"""Time passes and memory holds still: neither steps nor finished runs pile up."""

import ctypes
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
from test_resume import Interrupting, configuration

from agents import build_agent
from experiments.experiment import run_experiment
from mtkd_env import MTKDVectorEnv, Recipe
from tiny import STEPS_PER_EPOCH, make_tiny_env

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc"),
]

SETTLED, STEPS = 500, 2000

# [MB]. The agents were seen to grow by 0.1; if anything of 4 kB were kept of every one of the 1500
# steps in between, this would be exceeded.
BOUND = 6.0

ON_POLICY = {"n_steps": 8, "batch_size": 16, "n_epochs": 1}
# Full before the first measurement, so that it cannot be what grows.
OFF_POLICY = {"learning_starts": 8, "batch_size": 8, "buffer_size": 400, "train_freq": 8}
AGENTS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "aver": {},
    "camkd": {},
    "mmkd": {},
    "pg": {},
    "reinforce": {},
    "dpg": {},
    "ppo": ON_POLICY,
    "sac": OFF_POLICY,
}


def resident() -> float:
    """Memory of this process [MB], without what the allocator holds back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the listing itself is one of them


def measured(algo: str) -> list[tuple[float, int]]:
    """Memory and open files after each of the two numbers of steps."""
    env: MTKDVectorEnv = make_tiny_env(recipe=Recipe(epochs=STEPS // STEPS_PER_EPOCH, lr=0.01))
    env.reset(seed=0)
    agent = build_agent(algo, env, seed=0, arguments=AGENTS[algo])
    agent.warm_up(STEPS_PER_EPOCH)
    found = []

    def at_end() -> None:
        if env.steps in (SETTLED, STEPS):
            found.append((resident(), open_files()))

    agent.learn(STEPS // STEPS_PER_EPOCH - 1, at_end)
    return found


@pytest.mark.parametrize("algo", AGENTS)
def test_steps_leave_nothing_behind(algo: str) -> None:
    (before, files), (after, files_after) = measured(algo)
    print(f"{algo}: {before:.1f} MB, then {after - before:+.1f} MB, {files_after} files")  # noqa: T201 - asked for
    assert after - before < BOUND
    assert files_after == files


@pytest.mark.parametrize("algo", ["pg", "sac"])
def test_finished_runs_leave_nothing_behind(
    algo: str, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[MTKDVectorEnv] = weakref.WeakSet()
    make = MTKDVectorEnv.__init__

    def made(self: MTKDVectorEnv, *args: Any, **kwargs: Any) -> None:
        alive.add(self)
        make(self, *args, **kwargs)

    monkeypatch.setattr(MTKDVectorEnv, "__init__", made)
    files = []
    for number in range(3):
        run_experiment(configuration(small, algo), Interrupting(), tmp_path / str(number))
        gc.collect()  # Stable-Baselines3's models are cycles.
        assert not alive
        files.append(open_files())
    assert files[1] == files[2]
