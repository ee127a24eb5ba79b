"""The peak of the memory of a process of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarking import config_of, one_line_error, read, start
from experiments.benchmarks import peak_memory
from experiments.benchmarks.peak_memory import (
    forget_peak,
    memory_report,
    peak_bytes,
    train,
)
from experiments.benchmarks.timing import Percentiles
from experiments.executors import Failure
from mtkd_env.errors import ConfigError

CPU = torch.device("cpu")

LARGE = 200_000_000

on_linux = pytest.mark.skipif(
    not peak_memory.FORGET.is_file(), reason="only Linux can forget a peak"
)


def test_a_peak_knows_what_is_gone() -> None:
    before = peak_bytes(CPU)
    torch.ones(LARGE, dtype=torch.uint8)
    assert peak_bytes(CPU) >= before
    assert peak_bytes(CPU) >= LARGE


@on_linux
def test_a_forgotten_peak_is_what_is_there() -> None:
    torch.ones(LARGE, dtype=torch.uint8)
    high = peak_bytes(CPU)
    before = forget_peak(CPU)
    assert before < high - LARGE / 2
    torch.ones(LARGE, dtype=torch.uint8)
    assert peak_bytes(CPU) == pytest.approx(before + LARGE, rel=0.1)


@pytest.mark.gpu(pretended=False)
def test_the_peak_of_a_gpu_is_that_of_its_tensors() -> None:
    device = torch.device("cuda")
    before = forget_peak(device)
    torch.ones(LARGE, dtype=torch.uint8, device=device)
    assert peak_bytes(device) >= before + LARGE


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_without_the_kernels_mark_the_system_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, unit: int
) -> None:
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=7))
    monkeypatch.setattr(peak_memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(peak_memory, "resource", usage)
    monkeypatch.setattr(peak_memory, "sys", SimpleNamespace(platform=platform))
    assert peak_bytes(CPU) == 7 * unit


@pytest.mark.parametrize("algo", ["aver", "pg"])
def test_a_training_tells_its_memory(tmp_path: Path, algo: str) -> None:
    train(config_of(algo), 1, tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert 0 < found["before"] <= found["peak"]
    assert (found["history"] > 0) == (algo == "pg")


def test_ratios_are_to_the_reference_of_the_same_round() -> None:
    def found(*peaks: int) -> list[dict[str, int]]:
        return [{"before": 1_000_000, "peak": one, "history": 0} for one in peaks]

    peaks = {"aver": found(2_000_000, 4_000_000), "pg": found(3_000_000, 6_000_000)}
    values = memory_report(peaks, 2, config_of("aver"), CPU).values["methods"]
    assert values["pg"]["ratio"] == Percentiles(1.5, 1.5, 1.5)
    assert values["aver"]["ratio"].median == 1
    assert values["pg"]["bytes"]["training"] == 3_500_000


class Slot:
    """A process that never is: it does its work at once, or ends as it is told."""

    ended: Callable[[], Failure | None] = staticmethod(lambda: None)
    closed = 0

    def __init__(self, log: Path) -> None:
        self.log = log

    def start(self, task: Any) -> None:
        self.failure = type(self).ended()
        if self.failure is None:
            task.work()

    def result(self) -> Failure | None:
        return self.failure

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def slot(monkeypatch: pytest.MonkeyPatch) -> type[Slot]:
    kind = type("OwnSlot", (Slot,), {})
    monkeypatch.setattr(peak_memory, "ProcessSlot", kind)
    return kind


@pytest.mark.slow
def test_memory_from_the_shell(
    slot: type[Slot], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "memory.json"
    flags = ("--methods", "pg", "--rounds", "2", "--epochs", "1", "--json", str(path))
    assert start("memory", *flags) == 0
    assert "2 processes a method, in turns; each a warm-up and 1 epochs" in capsys.readouterr().out
    found = read(path)
    assert list(found["methods"]) == ["aver", "pg"]
    assert len(found["methods"]["pg"]["bytes_by_round"]) == 2
    assert slot.closed == 4


def test_a_process_that_fails_is_one_line(
    slot: type[Slot], capsys: pytest.CaptureFixture[str]
) -> None:
    slot.ended = lambda: Failure("the process was killed by SIGKILL", "...", died=True)  # type: ignore[method-assign]
    assert start("memory", "--methods", "pg") == 2
    assert "aver: the process was killed by SIGKILL" in one_line_error(capsys)
    assert slot.closed == 1


def test_a_process_ends_when_the_program_is_interrupted(
    slot: type[Slot], capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> Failure | None:
        raise KeyboardInterrupt

    slot.ended = interrupt  # type: ignore[method-assign]
    assert start("memory", "--methods", "pg") == 130
    assert capsys.readouterr().err == "interrupted: nothing was written\n"
    assert slot.closed == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "1,2"], "--epochs: expected one number >= 1, got 1,2"),
        (["--epochs", "0"], "--epochs: expected one number >= 1, got 0"),
        (["--methods", "pgg"], "pgg"),
    ],
)
def test_wrong_flags_of_memory_are_one_clear_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert start("memory", *flags) == 2
    assert message in one_line_error(capsys)


@pytest.mark.slow
def test_a_process_of_its_own_knows_nothing_of_the_memory_of_this_one() -> None:
    ballast = torch.ones(5 * LARGE, dtype=torch.uint8)
    found = peak_memory.alone(config_of("aver"), 1)
    assert found["peak"] < peak_bytes(CPU)
    assert found["before"] <= found["peak"]
    del ballast


@pytest.mark.slow
def test_a_configuration_that_breaks_a_process_is_named() -> None:
    broken = config_of("aver", "--data.dataset", "npz", "--data.arguments.path", "none.npz")
    with pytest.raises(ConfigError, match=r"aver: .*none\.npz"):
        peak_memory.alone(broken, 1)
